"""A run in which one process fails. Usage: `python -m tests.distributed.failing KIND MODEL_DIR OUTPUT_DIR`, under a launcher.

Kinds: `text`, a function of text raises in a step; `score`, one gives nan there; `file`, a direction's file is not there.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from tests import helpers
from tests.distributed import runs


CALIBRATION = 16
calls = itertools.count()


def main(kind: str, model: Path, output: Path) -> None:
    from shapedpo import Concept, Direction, ShapedDPOTrainer, TextFunction

    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    output.mkdir(exist_ok=True)

    def failed() -> None:
        (output / "failed").write_text(str(time.time()))

    def score(text: str) -> float:
        if rank == 1 and next(calls) >= CALIBRATION + 8:  # in the third step
            failed()
            if kind == "text":
                raise RuntimeError(f"nothing is known of {text!r}")
            return float("nan")
        return float(len(text))

    machine = output / f"machine-{rank}"  # each has its own disk, and one of them no file
    machine.mkdir(exist_ok=True)
    if kind != "file" or rank == 0:
        Direction(helpers.vector(), layer=1).save(machine / "direction.safetensors")
    else:
        failed()
    concepts: list[Any] = [
        Concept("way", Direction(path=str(machine / "direction.safetensors"))),
        Concept("scored", TextFunction(score), "suppress", strength=1.0),
    ]
    fields = {"output_dir": str(output), "per_device_train_batch_size": 2, "calibration_size": CALIBRATION}
    args = helpers.arguments(concepts=concepts, max_steps=4, save_strategy="steps", save_steps=1, **fields)
    helpers.build(ShapedDPOTrainer, args, helpers.load_model(model), train_dataset=runs.data()).train()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
