"""Some of the runs of `runs.py` and `interventions.py`, one after the other in the same processes, alone or under a launcher.

Usage: `python -m tests.distributed.steps MODEL_DIR DATA_DIR OUTPUT_DIR RUN...`, with the tiny SAE's folder in `TINY_SAE`.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path

import torch
from datasets import load_from_disk

from tests import helpers
from tests.distributed import interventions, runs


def main(model: Path, data: Path, output: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed

        # `zero.Init` of the reference model asks for the world's size before the trainer has set it up.
        deepspeed.init_distributed("gloo")
    for name in names:
        folder = output / name
        if name in interventions.RUNS:
            interventions.run(name, folder, model, load_from_disk(str(data / "interventions")))
            continue
        trainer = runs.build(name, folder, model, load_from_disk(str(data / "runs")))
        trainer.train()
        trainer.save_model()
        result = runs.result(trainer)
        if trainer.accelerator.is_main_process:
            (folder / "result.json").write_text(json.dumps(result))
        trainer.accelerator.wait_for_everyone()
        trainer.accelerator.free_memory()
        del trainer
        gc.collect()


if __name__ == "__main__":
    helpers.sae_path = lambda: Path(os.environ["TINY_SAE"])  # the one of the test that compares
    main(*map(Path, sys.argv[1:4]), sys.argv[4:])
