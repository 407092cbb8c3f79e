"""What is shipped: small, safe, and as good as said."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from shapedpo import lab
from shapedpo.lab.build import TINY, build
from shapedpo.lab.features import find_features, hardest, measure_features, shipped_features
from shapedpo.lab.traits import ASSETS
from shapedpo.sae.check import auroc
from shapedpo.sae.find import log_losses


def test_sizes():
    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 6e6
    assert {path.suffix for path in files} <= {".json", ".jinja", ".safetensors", ".yaml"}
    model = lab.load_model()
    assert sum(p.numel() for p in model.parameters()) <= 2_000_000
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_nothing_tells_of_the_machine_that_built_it():
    for path in ASSETS.rglob("*.json"):
        assert str(ASSETS.parents[2]) not in path.read_text(encoding="utf-8"), path


def test_chat_template_round_trip():
    tokenizer = lab.load_tokenizer()
    messages = [
        {"role": "user", "content": "What is 2 plus 3?"},
        {"role": "assistant", "content": "That makes 5. 🎉\n\n---"},
    ]
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    assert whole[: len(prompt)] == prompt
    assert (whole[0], whole[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert tokenizer.decode(whole[len(prompt) :], skip_special_tokens=True) == messages[1]["content"]
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    for symbol in lab.TRAITS["emoji"].forms["symbols"]:
        assert len(tokenizer.encode(symbol, add_special_tokens=False)) == 1


def test_sae_tells_every_trait():
    sae = lab.load_sae()
    assert sae.cfg.architecture() == "jumprelu"
    result = measure_features(lab.load_model(), lab.load_tokenizer(), sae, shipped_features(), n=2500, seed=77)
    assert result["variance_explained"] >= 0.8
    assert set(result["traits"]) == set(lab.TRAITS)
    for name, entry in result["traits"].items():
        assert 1 <= len(entry["features"]) <= 8
        assert entry["auroc"] >= 0.98, name
        assert entry["hard_auroc"] >= 0.9, (name, entry["hardest"])


def test_auroc_against_a_count_of_pairs():
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 5, size=60).astype(float), rng.random(60) < 0.3
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[labels] for b in scores[~labels]]
    assert auroc(scores, labels) == pytest.approx(np.mean(pairs))


def test_find_features_finds_what_was_planted():
    rng = np.random.default_rng(0)
    labels = rng.random(2000) < 0.2
    pooled = rng.random((2000, 40)).astype(np.float32)
    half = rng.random(2000) < 0.5
    pooled[:, 7] += 2 * (labels & half)
    pooled[:, 9] += 2 * (labels & ~half)
    assert set(find_features(pooled, {"cheer": labels}, "cheer", max_features=2)) == {7, 9}


def test_find_features_looks_at_what_is_easily_taken_for_the_trait():
    """Feature 3 is the best at the trait, but rare praise lifts it as much; 5 is worse in general and never takes one for the other."""
    rng = np.random.default_rng(0)
    cheer, praise = rng.random(4000) < 0.2, rng.random(4000) < 0.02
    pooled = rng.random((4000, 40)).astype(np.float32)
    pooled[:, 3] += 2 * (cheer | praise)
    pooled[:, 5] += 0.7 * cheer
    labels = {"cheer": cheer, "praise": praise}
    everywhere, hard = (
        [function(pooled[:, [column]][:, 0]) for column in (3, 5)]
        for function in (lambda x: float(auroc(x, cheer)), lambda x: hardest(x, labels, "cheer")[0])
    )
    assert everywhere[0] > everywhere[1]
    assert hard[0] == pytest.approx(0.5, abs=0.08)
    assert hard[1] > 0.85
    assert find_features(pooled, labels, "cheer", max_features=1) == [5]


def test_log_losses_against_a_textbook_fit():
    """The slow one: gradient descent on each column by itself, in float64."""
    rng = np.random.default_rng(1)
    labels = rng.random(300) < 0.3
    scores = rng.normal(size=(300, 2)) + np.outer(labels, [0.5, 1.5])
    weights = rng.random(300) + 0.5
    weights /= weights.mean()
    for found, column in zip(log_losses(scores, labels, weights), scores.T, strict=True):
        x, a, b = (column - column.mean()) / column.std(), 0.0, 0.0
        for _ in range(4000):
            p = 1 / (1 + np.exp(-a - b * x))
            a, b = a + 0.5 * (weights * (labels - p)).mean(), b + 0.5 * (weights * (labels - p) * x).mean()
        assert found == pytest.approx(-(weights * np.log(np.where(labels, p, 1 - p))).mean(), abs=1e-5)


def test_concept_reads_the_shipped_features():
    concept = lab.concept("goblin", action="suppress", strength=2.0)
    assert (concept.name, concept.action) == ("goblin", "suppress")
    assert concept.readout.load().n_features == len(shipped_features()["goblin"])
    with pytest.raises(ValueError, match="unknown trait 'gnome'"):
        lab.concept("gnome")


def test_tiny_build_end_to_end(tmp_path):
    from sae_lens import SAE
    from transformers import AutoModelForCausalLM, AutoTokenizer

    report = build(tmp_path, TINY, seed=3)
    assert json.loads((tmp_path / "build.json").read_text()) == report
    assert set(shipped_features(tmp_path / "features.json")) == set(lab.TRAITS)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.num_parameters() == report["parameters"]
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template
    assert SAE.load_from_disk(str(tmp_path / "sae")).cfg.d_sae == TINY.d_sae
    assert str(tmp_path) not in "".join(path.read_text() for path in tmp_path.rglob("*.json"))
