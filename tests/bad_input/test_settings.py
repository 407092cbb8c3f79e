"""Methods that have no meaning for the run's loss and settings, or for the installed TRL."""

from __future__ import annotations

import logging

import pytest
from trl import DPOTrainer

from shapedpo import Concept, Direction, Gate, Mask, Project, Regex
from tests.helpers import LAYERS, pairs, shaped, vector

from . import goblin, refused


@pytest.mark.parametrize("loss", ["aot", "aot_unpaired", "sft"])
@pytest.mark.parametrize(
    "concept",
    [
        goblin("suppress", "reweight", 1.0),
        goblin("suppress", Mask(fraction=0.1)),
        goblin("amplify", Mask(threshold=1.0)),
    ],
    ids=["reweight", "mask", "mask-amplify"],
)
def test_weights_have_no_meaning(loss, concept):
    refused(f"Concept 'goblin': method {concept.shaper.name!r}...{loss!r}", lambda: shaped(concept, loss_type=[loss]))
    refused(f"Concept 'goblin': ...{loss!r}", lambda: shaped(concept, loss_type=["sigmoid", loss]))


@pytest.mark.parametrize("loss", ["aot", "aot_unpaired", "sft"])
def test_nor_has_a_weight_column(loss):
    refused(f"weight column 'weight'...{loss!r}", lambda: shaped(data=pairs(weight=[1.0] * 24), loss_type=[loss]))


@pytest.mark.parametrize("loss", ["aot", "aot_unpaired"])
def test_projection_of_sorted_pairs(loss):
    refused(
        f"Concept 'goblin': ...'project'...{loss!r}",
        lambda: shaped(goblin("suppress", "project"), loss_type=[loss]),
    )


def test_sft_compares_nothing():
    refused(
        "Concept 'goblin': ...'reward'...'sft'", lambda: shaped(goblin("suppress", strength=1.0), loss_type=["sft"])
    )
    refused("Concept 'goblin': ...'project'...'sft'", lambda: shaped(goblin("suppress", "project"), loss_type=["sft"]))
    shaped(goblin("suppress", strength=1.0), loss_type=["sft", "sigmoid"])


@pytest.mark.parametrize("losses", [["ipo"], ["sppo_hard"], ["sigmoid", "discopop"], ["sigmoid", "sigmoid_norm"]])
def test_hold_weighs_its_pull_against_dpos(losses):
    refused(f"Concept 'goblin': action 'hold'...{losses[-1]}", lambda: shaped(goblin("hold"), loss_type=losses))
    shaped(goblin("hold"), loss_type=["sigmoid_norm", "sft"])


def test_hold_does_not_know_how_far_other_divergences_pull():
    refused(
        "Concept 'goblin': action 'hold'...'js_divergence'",
        lambda: shaped(goblin("hold"), f_divergence_type="js_divergence"),
    )


@pytest.mark.parametrize(("loss", "pull"), [("hinge", "2"), ("apo_down", "0.25"), ("robust", "1.2")])
def test_hold_knows_how_far_others_pull_at_first_only(loss, pull, caplog):
    with caplog.at_level(logging.WARNING, logger="shapedpo"):
        shaped(goblin("hold"), loss_type=[loss], label_smoothing=0.1)
    assert (
        f"Concept 'goblin': action 'hold' takes the pull of the loss type {loss!r} for DPO's, and it is {pull} times"
        in caplog.text
    )


def test_hold_does_not_know_wpos_weights():
    refused(
        "Concept 'goblin': action 'hold'...`use_weighting=True`", lambda: shaped(goblin("hold"), use_weighting=True)
    )


@pytest.mark.parametrize("loss", ["ipo", "sigmoid_norm"])
def test_losses_that_divide_by_length(loss, caplog):
    """They divide what `reward` adds as well, which a user of the usual strengths must know."""
    with caplog.at_level(logging.WARNING, logger="shapedpo"):
        shaped(goblin("suppress", strength=2.0), loss_type=[loss])
    assert f"'reward' shifts a completion's reward before the loss type {loss!r} divides it" in caplog.text
    assert "a strength of 2 counts as 0.01" in caplog.text


def test_projection_needs_more_pairs_than_concepts(caplog):
    concepts = [
        Concept(f"c{i}", Regex(word), "suppress", "project") for i, word in enumerate(("cat", "dog", "fox", "the"))
    ]
    for size, count in ((1, 1), (3, 3), (2, 4)):
        text = f"'project'...{size} pair(s)...`per_device_train_batch_size`"
        make = lambda size=size, count=count: shaped(*concepts[:count], per_device_train_batch_size=size)  # noqa: E731
        message = refused(text, make)
        assert all(repr(concept.name) in message for concept in concepts[:count])
    with caplog.at_level(logging.WARNING, logger="shapedpo"):
        shaped(*concepts[:2], per_device_train_batch_size=4)
    assert "2 of 4 directions" in caplog.text


def test_residual_projection():
    residual = Project(space="residual", layers=[0, LAYERS])
    way = Concept("way", Direction(vector(), layer=0), "suppress", residual)
    refused(f"Concept 'way': ...layer {LAYERS}...{LAYERS}", lambda: shaped(way))
    refused("Concept 'goblin': ...readout of text", lambda: shaped(goblin("suppress", Project(space="residual"))))
    gated = Concept("way", Direction(vector(), layer=0), "suppress", Project("residual"), gate=Gate(column="creative"))
    refused("Concept 'way': ...no gate", lambda: shaped(gated, data=pairs(creative=[True] * 24)))


def test_a_moving_reference():
    refused("`sync_ref_model=True`...concepts", lambda: shaped(goblin(), sync_ref_model=True, ref_model_sync_steps=1))
    shaped(sync_ref_model=True, ref_model_sync_steps=1)  # TRL's own business


def test_no_beta():
    refused("Concept 'goblin': ...`beta`", lambda: shaped(goblin("suppress", strength=1.0), beta=0.0))


# A TRL without one of the openings, an older or a later one; taking one away is the only way to have it here.


@pytest.mark.parametrize("name", ["_compute_loss", "compute_ref_log_probs", "_precompute_ref_logps"])
def test_without_an_opening(monkeypatch, name):
    monkeypatch.delattr(DPOTrainer, name)
    text = refused(f"DPOTrainer.{name}...pip install 'trl>=1.", lambda: shaped(goblin()), ImportError)
    assert "trl 1." in text  # what is installed


def test_with_another_signature(monkeypatch):
    monkeypatch.setattr(DPOTrainer, "_compute_loss", lambda self, model, inputs: None)
    refused("DPOTrainer._compute_loss...return_outputs", lambda: shaped(goblin()), ImportError)


def test_without_fused_log_probabilities(monkeypatch):
    from trl.trainer import utils

    monkeypatch.delattr(utils, "FusedCausalLMOutput")
    refused("FusedCausalLMOutput.log_probs", lambda: shaped(goblin()), ImportError)
