"""`action="hold"` on the lab's model: a taught trait stays about where it was, another one is learned."""

from __future__ import annotations

import pytest

from benchmarks.case_studies.worlds import batched_by_length
from benchmarks.training import train
from shapedpo import lab


LESSONS = (lab.Lesson("bold", rate=0.25), lab.Lesson("cheerfulness", rate=0.25))
DPO = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": 16,
    "learning_rate": 6e-4,
    "max_length": 160,
    "train_sampling_strategy": "sequential",
}


@pytest.fixture(scope="module")
def dataset():
    """In batches of like lengths: little padding."""
    data = lab.preference_data(LESSONS, n=384, seed=0)
    size = [{part: len(row[part][0]["content"]) for part in ("prompt", "chosen", "rejected")} for row in data]
    lengths = [one["prompt"] + max(one["chosen"], one["rejected"]) for one in size]
    return data.select(batched_by_length(lengths, DPO["per_device_train_batch_size"], seed=0))


def rates(model) -> dict[str, float]:
    texts = lab.rollouts(model, lab.load_tokenizer(), lab.heldout_prompts(160, seed=1), seed=2)
    return {name: rate.rate for name, rate in lab.trait_rates(texts, ["bold", "cheerfulness"]).items()}


def trained(dataset, concepts):
    model = lab.load_model()
    trainer = train(model, lab.load_tokenizer(), dataset, DPO, concepts, seed=42)
    return rates(model), trainer.state.log_history


@pytest.mark.timeout(300)
def test_holds_one_trait_and_learns_the_other(dataset):
    before = rates(lab.load_model())
    plain, _ = trained(dataset, None)
    held, history = trained(dataset, [lab.concept("bold", action="hold")])
    assert plain["bold"] > before["bold"] + 0.2
    assert abs(held["bold"] - before["bold"]) < 0.2 * (plain["bold"] - before["bold"])
    assert held["cheerfulness"] - before["cheerfulness"] > 0.7 * (plain["cheerfulness"] - before["cheerfulness"])
    strengths = [entry["concepts/bold/strength"] for entry in history if "concepts/bold/strength" in entry]
    # From the first step on: no pair of this data teaches against bold.
    assert all(strength > 0 for strength in strengths)
