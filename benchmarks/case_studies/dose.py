"""Dose and response: how much more of a trait a model shows as it is steered along the trait's direction, before and after training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.case_studies.study import BEFORE, PLAIN, SIZES, Job, record
from benchmarks.case_studies.worlds import LAYER, direction
from shapedpo import lab


DOSES = (-8.0, -4.0, 0.0, 4.0, 8.0)
"""Times the direction, added after the layer that it is of at every token; the hidden states have a norm of about 26."""
TARGET = "goblin"
LABELS = {BEFORE: "before DPO", PLAIN: "plain DPO"}


def responses(jobs: Sequence[Job]) -> dict[str, list[float]]:
    """The trait's rate at each dose, in percent, by method; of the runs of the goblin case that are there."""
    found = {}
    for job in jobs:
        key = f"{job.key} doses"
        kept = record(job.size).find(key)
        if kept is None and job.model.is_dir():
            kept = {"rates": _rates(job.model, SIZES[job.size].prompts // 3)}
            record(job.size).keep(key, kept)
        if kept is not None:
            found[LABELS.get(job.method, job.method)] = kept["rates"]
    return found


def _rates(folder: Path, n: int) -> list[float]:
    from transformers import LlamaForCausalLM

    model, tokenizer = LlamaForCausalLM.from_pretrained(folder, local_files_only=True), lab.load_tokenizer()
    vector = direction(TARGET).load().directions()[0]
    rates = []
    for dose in DOSES:

        def add(module: Any, args: Any, output: Any, dose: float = dose) -> Any:
            return output + dose * vector

        handle = model.model.layers[LAYER].register_forward_hook(add)
        try:
            answers = lab.rollouts(model, tokenizer, lab.heldout_prompts(n, 11), seed=12)
        finally:
            handle.remove()
        rates.append(100 * lab.trait_rates(answers, [TARGET])[TARGET].rate)
    return rates


def draw(found: dict[str, list[float]], path: Path) -> None:
    """The response of each model."""
    from matplotlib.figure import Figure

    chart = Figure(figsize=(5.6, 3.8), layout="constrained")
    axis = chart.subplots()
    for index, (name, rates) in enumerate(found.items()):
        axis.plot(DOSES, rates, "o-", label=name, color="black" if name == LABELS[BEFORE] else f"C{index - 1}")
    axis.set(xlabel="steered along the goblin's direction", ylabel="% of rollouts with a goblin", ylim=(0, None))
    axis.legend(fontsize=8, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    chart.savefig(path, dpi=100)
