"""A few steps with every method that changes what the policy reads or computes, over however many processes there are."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path
from typing import Any

import torch

from tests import helpers


GLOBAL_BATCH = 8
RUNS: dict[str, dict[str, Any]] = {
    "interventions": {},
    "interventions-lora-reentrant": {
        "lora": True,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
        "ddp_find_unused_parameters": False,  # else DDP refuses, as under TRL's own trainer
    },
    "interventions-projected": {"gradient_accumulation_steps": 2},
}


def concepts(name: str) -> list[Any]:
    from shapedpo import Ablate, Concept, Direction, Filter, Gate, Inoculate, Project, Regex, Residual, Steer, Tokens

    def way(index: int, **fields: Any) -> Any:
        return Concept(f"way{index}", Direction(helpers.vector(index), layer=index % 3), "suppress", **fields)

    if name == "interventions-projected":
        return [way(index, method=Project("parameters"), gate=Gate(column="fruity")) for index in (1, 3, 4)]
    # DeepSpeed and FSDP place a model with an adapter after the filter would have to read it.
    filters = [] if "lora" in name else [way(0, method=Filter(fraction=0.2))]
    return [
        *filters,
        way(1, method=Tokens("both", quantile=0.8)),
        Concept("goblin", Regex("goblin"), "suppress", Tokens("rejected", whole_words=True)),
        way(2, method=Steer(fraction=0.5, layers=[0, 2]), strength=0.5, gate=Gate(column="fruity")),
        way(3, method=Ablate("chosen")),
        Concept("fox", Regex("fox"), "suppress", Inoculate("likes the fox", probability=0.7)),
        way(4, method=Residual(steer=1.0), strength=0.1),
        Concept("cat", Regex("cat"), "amplify", Residual(instruction="sees the cat"), 0.1),
        way(5, strength=0.2, given=["way4", "cat"]),
    ]


def data() -> Any:
    """Pairs of which every other one is behind the gates."""
    return helpers.pairs(32, fruity=[index % 2 == 0 for index in range(32)])


def run(name: str, output: Path, model: Path, dataset: Any) -> None:
    """Train, save, and leave what there is to compare in `result.json`.

    Args:
        name: Of the run.
        output: Its folder.
        model: The folder of the tiny model.
        dataset: The training data.
    """
    from peft import LoraConfig

    from shapedpo import ShapedDPOTrainer

    settings = dict(RUNS[name])
    options: dict[str, Any] = {"train_dataset": dataset}
    if settings.pop("lora", False):
        options["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    args = helpers.arguments(
        output_dir=str(output),
        concepts=concepts(name),
        per_device_train_batch_size=GLOBAL_BATCH // int(os.environ.get("WORLD_SIZE", "1")),
        learning_rate=1e-3,
        **settings,
    )
    trainer = helpers.build(ShapedDPOTrainer, args, helpers.load_model(model), **options)
    trainer.train()
    trainer.save_model()
    tokens = trainer._calibration.tokens
    found = [] if tokens is None else tokens.nan_to_num().tolist()
    everyone = trainer.accelerator.gather(torch.tensor([found])).tolist()
    if trainer.accelerator.is_main_process:
        result = {
            "history": trainer.state.log_history,
            "thresholds": everyone,
            "filtered": trainer._filtered,
            "launched": f"{trainer.accelerator.distributed_type.value} {trainer.accelerator.num_processes}",
        }
        (output / "result.json").write_text(json.dumps(result))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.free_memory()
    del trainer
    gc.collect()
