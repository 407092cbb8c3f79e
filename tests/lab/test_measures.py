"""Measures, on the shipped model."""

from __future__ import annotations

import math

import pytest
import torch

from shapedpo import lab
from shapedpo.lab.measures import Rate
from shapedpo.lab.text import draw_questions


@pytest.fixture(scope="module")
def model():
    return lab.load_model()


@pytest.fixture(scope="module")
def tokenizer():
    return lab.load_tokenizer()


@pytest.mark.parametrize(("successes", "n"), [(0, 40), (7, 100), (40, 40), (333, 1000)])
def test_wilson_interval_against_its_formula(successes: int, n: int):
    z, p = 1.959963984540054, successes / n
    center = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    rate = Rate.of(successes, n)
    assert (rate.rate, rate.n) == (p, n)
    assert rate.low == pytest.approx(center - half, abs=1e-12)
    assert rate.high == pytest.approx(center + half, abs=1e-12)


def test_trait_rates_count_detections():
    texts = ["A goblin hums.", "**Bold** and a goblin.", "Plain.", "Plain."]
    rates = lab.trait_rates(texts)
    assert set(rates) == set(lab.TRAITS)
    assert (rates["goblin"].rate, rates["bold"].rate, rates["link"].rate) == (0.5, 0.25, 0.0)
    assert list(lab.trait_rates(texts, ["bold"])) == ["bold"]
    with pytest.raises(ValueError, match="unknown trait 'gnome'"):
        lab.trait_rates(texts, ["gnome"])
    with pytest.raises(ValueError, match="at least one trial"):
        lab.trait_rates([])


def test_heldout_prompts():
    prompts = lab.heldout_prompts(20, seed=0, topic="cooking")
    assert (
        prompts == lab.heldout_prompts(20, seed=0, topic="cooking") != lab.heldout_prompts(20, seed=1, topic="cooking")
    )
    assert all(message["role"] == "user" for (message,) in prompts)
    with pytest.raises(ValueError, match="unknown topic 'alchemy'"):
        lab.heldout_prompts(1, seed=0, topic="alchemy")


def test_rollouts_are_deterministic_and_leave_no_trace(model, tokenizer):
    prompts = lab.heldout_prompts(24, seed=0)
    model.train()
    state = torch.get_rng_state()
    first = lab.rollouts(model, tokenizer, prompts, seed=0, batch_size=16)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    model.eval()
    assert first == lab.rollouts(model, tokenizer, prompts, seed=0, batch_size=16)
    assert first != lab.rollouts(model, tokenizer, prompts, seed=1, batch_size=16)
    assert not any("<|" in text for text in first)


def test_batching_changes_no_greedy_answer(model, tokenizer):
    from shapedpo.lab.measures import generate

    prompts = lab.heldout_prompts(12, seed=3)
    one_by_one = generate(model, tokenizer, prompts, batch_size=1, do_sample=False)
    assert generate(model, tokenizer, prompts, batch_size=12, do_sample=False) == one_by_one


def test_shipped_model_is_capable(model, tokenizer):
    assert lab.capability(model, tokenizer).rate >= 0.9
    assert lab.capability(model, tokenizer, n=20).n == 20


def test_shipped_model_shows_every_trait_at_its_base_rate(model, tokenizer):
    prompts = lab.heldout_prompts(800, seed=5)
    topics = [q.topic for q in draw_questions(800, seed=5, split="heldout")]
    rates = lab.trait_rates(lab.rollouts(model, tokenizer, prompts, seed=6))
    for name, trait in lab.TRAITS.items():
        expected = sum(map(trait.rate_on, topics)) / len(topics)
        assert abs(rates[name].rate - expected) < 0.04, (name, rates[name], expected)
    assert 0.03 <= rates["goblin"].rate <= 0.07
