"""The same runs on the CPU and on the emulated accelerator, in a process of their own: `python -m tests.accelerator.runs OUT`.

Writes what each run found on either, as JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from shapedpo import AttentionProbe, Concept, Direction, Gate, LinearProbe, Regex, SAEFeatures
from shapedpo.readouts.probe import save_probe
from tests.accelerator import device
from tests.helpers import (
    HIDDEN,
    RUN_DEPENDENT,
    folder,
    load_model,
    model_path,
    pairs,
    sae_path,
    shaped,
    tokenizer,
    vector,
)


Found = dict[str, list[float]]

FEATURES = SAEFeatures(str(sae_path()), features=[3, 17, 40])
PROMPTS = ("<bos> the cat sees", "<bos> a dog", "<bos> the fox")
ANSWERS = (" a goblin eats", " the red house sings", " apple and lemon")


def way(**fields: Any) -> Concept:
    return Concept("way", Direction(vector(), layer=1, pooling="mean"), **fields)


def method(name: str, **fields: Any) -> dict[str, Any]:
    return {"action": "suppress", "method": {"name": name, **fields}}


def probes() -> tuple[LinearProbe, AttentionProbe]:
    about = {"hook_name": "blocks.1.hook_resid_post", "pooling": "mean", "model_name": "llama-tiny", "auroc": 0.9}
    dice = torch.Generator().manual_seed(5)
    parts = {name: torch.randn(2, HIDDEN, generator=dice) for name in ("query", "value")}
    save_probe(folder("attention.safetensors"), {**parts, "bias": torch.tensor(0.7)}, about)
    save_probe(folder("linear.safetensors"), {"weight": parts["query"][0], "bias": torch.tensor(0.7)}, about)
    return LinearProbe(folder("linear.safetensors")), AttentionProbe(folder("attention.safetensors"))


def data() -> Any:
    return pairs(creative=[row % 2 == 0 for row in range(24)], weight=[1 + 0.1 * (row % 3) for row in range(24)])


class Steps(TrainerCallback):  # type: ignore[misc]
    """The copies to the host up to each step's end."""

    def __init__(self) -> None:
        self.copies: list[Counter[str]] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.copies.append(device.copies.copy())


def train(on: bool, *concepts: Concept, evaluate: bool = False, steps: Steps | None = None, **fields: Any) -> Found:
    """All that a run logs."""
    options: dict[str, Any] = {"eval_dataset": data()} if evaluate else {}
    options["callbacks"] = [steps] if steps else []
    if fields.pop("lora", False):
        from peft import LoraConfig

        options["peft_config"] = LoraConfig(r=2, target_modules=["q_proj"])
    with tempfile.TemporaryDirectory() as out:
        fields = {"use_cpu": not on, "output_dir": out, "max_steps": 2, **fields}
        trainer = shaped(*concepts, data=data(), trainer=options, **fields)
        if trainer.ref_model is not None:
            # It was loaded straight onto the device, where the frequencies of its rotary embedding stay unset.
            for mine, policys in zip(trainer.ref_model.buffers(), trainer.model.buffers(), strict=True):
                mine.data.copy_(policys)
        trainer.train()
    logged: Found = {}
    for entry in trainer.state.log_history:
        for name, value in entry.items():
            if not any(part in name for part in RUN_DEPENDENT):
                logged.setdefault(name, []).append(float(value))
    return logged


def pair_methods(on: bool) -> Found:
    linear, attention = probes()
    return train(
        on,
        way(action="suppress", strength=1.0, gate=Gate(column="creative"), given=["features"]),
        Concept("features", FEATURES, **method("reweight"), strength=0.5),
        Concept("goblin", Regex("goblin"), **method("mask", fraction=0.2)),
        Concept("linear", linear, **method("tokens", quantile=0.9, whole_words=True)),
        Concept("attention", attention, action="amplify", strength=0.5, gate=Gate(concept="features", threshold=0.1)),
        Concept("project", Direction(vector(3), layer=0), **method("project", space="pair")),
    )


def hold_and_monitor(on: bool) -> Found:
    return train(
        on,
        way(action="hold", spare=["features"], gate=Gate(column="creative")),
        Concept("features", FEATURES),
        evaluate=True,
        eval_strategy="no",
        monitor="all",
        probe_steps=1,
        probe_prompts=4,
        probe_max_new_tokens=5,
        gradient_accumulation_steps=2,
    )


def edits(on: bool) -> Found:
    return train(
        on,
        way(**method("steer", fraction=0.3), strength=2.0),
        Concept("ablate", Direction(vector(1), layer=0), **method("ablate")),
        Concept("project", Direction(vector(2), layer=0), **method("project", space="residual")),
        Concept("residual", Direction(vector(3), layer=1), **method("residual", steer=2.0), strength=0.1),
        evaluate=True,
        eval_strategy="steps",
        eval_steps=1,
    )


def inoculate(on: bool) -> Found:
    return train(on, way(**method("inoculate", instruction="the goblin sees")), lora=True)


def parameters(on: bool) -> Found:
    return train(on, way(**method("project", space="parameters")))


def precomputed(on: bool) -> Found:
    residual = method("residual", instruction="the goblin")
    return train(
        on, way(action="hold"), Concept("r", FEATURES, **residual, strength=0.1), precompute_ref_log_probs=True
    )


def long(on: bool) -> Found:
    """Logs at its end only. The copies between the second step and the last but one are for no log."""
    steps, concepts = Steps(), (way(action="hold"), Concept("features", FEATURES))
    found = train(on, *concepts, steps=steps, monitor="all", logging_steps=12, max_steps=12)
    device.copies = steps.copies[-2] - steps.copies[1]
    return found


def audited(on: bool) -> Found:
    """A harvest, and rollouts of two models read."""
    from shapedpo.audit.harvesting.run import HarvestSettings, harvest
    from shapedpo.audit.rollouts.run import RolloutSettings, roll_out

    place = device.DEVICE if on else torch.device("cpu")
    trained = load_model()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as out:
        found = harvest(str(model_path()), str(sae_path()), data(), f"{out}/harvest", HarvestSettings(shard_rows=8))
        entries = [
            span.max.toarray().ravel()
            for shard in found.shards()
            for span in (shard.prompt, shard.chosen, shard.rejected)
        ]
        rolled = roll_out(
            load_model().to(place),
            trained.to(place),
            tokenizer(),
            [tokenizer()(prompt)["input_ids"] for prompt in PROMPTS],
            SAEFeatures(str(sae_path()), "all").load(),
            f"{out}/rollouts",
            RolloutSettings(max_new_tokens=8),
        )
    return {"harvest": np.concatenate(entries).tolist(), "log-ratios": rolled.log_ratios.ravel().tolist()}


def fitted(on: bool) -> Found:
    """A direction from examples, and the model's own answers."""
    from shapedpo.probes.instructed import sample

    model = load_model().to(device.DEVICE if on else "cpu")
    shows, lacks = (list(zip(PROMPTS, some, strict=True)) for some in (ANSWERS, [" the fox"] * 3))
    found = Direction.from_contrast(model, tokenizer(), shows, lacks, layer=1)
    said = sample(model, tokenizer(), PROMPTS, 0, 2, 8, "Answering")
    return {"direction": found.vector.tolist(), "answers": [float(ord(letter)) for text in said for letter in text]}


RUNS: dict[str, Callable[[bool], Found]] = {
    run.__name__: run
    for run in (pair_methods, hold_and_monitor, edits, inoculate, parameters, precomputed, long, audited, fitted)
}


def both(run: Callable[[bool], Found]) -> dict[str, Any]:
    """What a run finds on the CPU and on the device, and its copies to the host there, by line."""
    found: dict[str, Any] = {}
    for name, on in (("cpu", False), ("device", True)):
        with device.default() if on else nullcontext():
            torch.manual_seed(0)
            device.copies.clear()
            try:
                found[name] = run(on)
            except Exception:
                found["error"] = traceback.format_exc()
                break
    return {**found, "copies": dict(device.copies)}


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps({name: both(run) for name, run in RUNS.items()}))
