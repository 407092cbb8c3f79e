"""A few shaped steps on a global batch of eight pairs, over however many processes there are. Run by `test_ranks.py`.

Usage: `python -m tests.distributed.steps MODEL_DIR DATA_DIR OUTPUT_DIR [key=value ...]`, alone or under a launcher.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from tests import helpers


GLOBAL_BATCH = 8


def main(model: Path, data: Path, output: Path, settings: dict[str, object]) -> None:
    from datasets import load_from_disk

    from shapedpo import Concept, Direction, Gate, Mask, Regex, ShapedDPOTrainer

    torch.set_num_threads(1)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if settings.pop("zero3", False):
        import deepspeed

        # `zero.Init` of the reference model asks for the world's size before the trainer has set it up.
        deepspeed.init_distributed("gloo")
    concepts = [
        Concept("goblin", Regex("goblin"), action="suppress", strength=1.5, gate=Gate(column="fruity")),
        Concept("way", Direction(helpers.vector(), layer=0), action="amplify", method="reweight", strength=0.7),
        Concept("side", Direction(helpers.vector(1), layer=1), action="suppress", method="project"),
        Concept(
            "stream",
            Direction(helpers.vector(2), layer=1),
            action="suppress",
            method={"name": "project", "space": "residual"},
        ),
        Concept("rare", Direction(helpers.vector(3), layer=2), action="suppress", method=Mask(fraction=0.2)),
        Concept("level", Direction(helpers.vector(4), layer=1), action="hold", gate=Gate(column="fruity")),
    ]
    lora = settings.pop("lora", False)
    options = {}
    if lora:
        from peft import LoraConfig

        options["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    args = helpers.arguments(
        output_dir=str(output),
        concepts=concepts,
        per_device_train_batch_size=GLOBAL_BATCH // processes,
        learning_rate=1e-3,
        **settings,
    )
    trainer = helpers.build(
        ShapedDPOTrainer, args, helpers.load_model(model), train_dataset=load_from_disk(str(data)), **options
    )
    trainer.train()
    trainer.save_model()
    calibration = trainer._calibration
    # What each rank believes: they must agree.
    sums = torch.stack(
        [
            torch.stack([t.double().sum() for t in calibration.statistics]).sum(),
            calibration.deltas.double().sum(),
            *trainer._shaping.hold.strengths,
        ]
    )
    everyone = trainer.accelerator.gather(sums[None]).tolist()
    if trainer.accelerator.is_main_process:
        (output / "result.json").write_text(
            json.dumps(
                {
                    "history": trainer.state.log_history,
                    "calibration": everyone,
                    "launched": f"{trainer.accelerator.distributed_type.value} {processes}",
                }
            )
        )


if __name__ == "__main__":
    words = (word.split("=", 1) for word in sys.argv[4:])
    main(*map(Path, sys.argv[1:4]), {key: json.loads(value) for key, value in words})
