"""Data that lacks what a concept asks of it."""

from __future__ import annotations

import copy
import logging
import math

import pytest
from trl import DPOTrainer

from shapedpo import Concept, Direction, Gate, Inoculate, Mask, Regex, ShapedDPOTrainer
from shapedpo.collator import ROW
from tests.helpers import arguments, build, load_model, pairs, shaped, tokenizer, vector

from . import goblin, refused


def test_gate_column():
    concept = goblin("suppress", strength=1.0, gate=Gate(column="creative"))
    refused("Concept 'goblin': ...gate column 'creative'...prompt, chosen, rejected", lambda: shaped(concept))
    for stream in (False, True):
        data = pairs(creative=["yes", "no"] * 12)
        data = data.to_iterable_dataset() if stream else data
        refused("'creative'...between 0 and 1, got 'yes'", lambda data=data: shaped(concept, data=data))


def test_gate_values_further_down():
    """Not only the first row is looked at: a run would stop hours in."""
    concept = goblin("suppress", strength=1.0, gate=Gate(column="creative"))
    refused("'creative'...got 7.0", lambda: shaped(concept, data=pairs(creative=[1.0] * 23 + [7.0])))


def test_gate_concept():
    concept = goblin("suppress", strength=1.0, gate=Gate(concept="poetic"))
    refused("Concept 'goblin': ...'poetic'...goblin, seen", lambda: shaped(concept, Concept("seen", Regex("x"))))


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_weights(weight):
    data = pairs(weight=[1.0] * 23 + [weight])
    refused(f"'weight'...finite and not negative, got {weight!r}", lambda: shaped(goblin(), data=data))
    stream = data.to_iterable_dataset()
    trainer = shaped(goblin(), data=stream, max_steps=10, calibration_size=4)
    refused("'weight'...finite and not negative", trainer.train)


def test_weights_that_are_no_numbers():
    refused("'weight'...'high'", lambda: shaped(data=pairs(weight=["high"] * 24)))
    refused("'weight'...got [1.0]", lambda: shaped(data=pairs(weight=[[1.0]] * 24)))


def test_a_function_of_text_that_fails():
    with pytest.raises(IndexError) as error:
        shaped(Concept("hundredth", lambda text: text[100] == "a")).train()
    assert "<lambda>, for '" in error.value.__notes__[0]


def test_data_and_settings_of_another_trainer():
    """Both can be used again, as with TRL's trainer."""
    args = arguments()
    first = build(ShapedDPOTrainer, args, concepts=[goblin()])
    assert args.concepts is None
    assert first.args.concepts == first.concepts
    data = first.train_dataset.select(range(4, 24))
    again = build(ShapedDPOTrainer, args, concepts=[goblin("suppress", strength=1.0)], train_dataset=data)
    assert again.train_dataset[ROW] == list(range(20))  # counted in what was given


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_copied_settings(copied):
    """A function and a direction in memory are still there; only what is pickled is without them."""
    args = arguments(concepts=[Concept("length", len), Concept("way", Direction(vector(), layer=0))])
    assert build(ShapedDPOTrainer, copied(args)).concepts == args.concepts


def test_weight_column():
    refused("no weight column 'trust'...prompt, chosen, rejected", lambda: shaped(weight_column="trust"))


def test_no_rows():
    refused("`train_dataset` has no rows", lambda: shaped(goblin(), data=pairs(2).select([])))
    text = "No row...fills `max_length=2`...keep_end"
    for fields in ({}, {"precompute_ref_log_probs": True}):
        refused(text, lambda fields=fields: shaped(goblin(), max_length=2, **fields))


def test_a_gate_that_never_opens(caplog):
    concept = goblin("suppress", strength=1.0, gate=Gate(column="creative"))
    with caplog.at_level(logging.WARNING, logger="shapedpo"):
        shaped(concept, data=pairs(creative=[False] * 24)).train()
    assert "Concept 'goblin': its gate is 0 on all 24 pairs" in caplog.text


def test_a_threshold_that_nothing_reaches(caplog):
    beyond = goblin("suppress", Mask(threshold=50.0))
    within = Concept("way", Direction(vector(), layer=0), "amplify", Mask(threshold=0.5))
    asked = Concept("asked", Direction(vector(1), layer=0), "suppress", Inoculate("Be a goblin.", threshold=40.0))
    with caplog.at_level(logging.WARNING, logger="shapedpo"):
        shaped(beyond, within, asked, max_steps=1).train()
    assert (
        "Concept 'goblin': method 'mask' has threshold=50, and the largest delta of the calibration sample is"
        in caplog.text
    )
    assert "Concept 'asked': method 'inoculate' has threshold=40, and the largest score of" in caplog.text
    assert "'way'" not in caplog.text


def test_a_tokenizer_with_more_tokens_than_the_model(caplog):
    model = load_model()
    model.resize_token_embeddings(len(tokenizer()) - 1, mean_resizing=False)
    way = Concept("way", Direction(vector(), layer=0))
    with caplog.at_level(logging.WARNING, logger="shapedpo"):
        shaped(way, model=model, trainer={"ref_model": copy.deepcopy(model)})
    assert (
        f"{len(tokenizer())} tokens...embeddings for {len(tokenizer()) - 1}".replace(
            "...", ", and LlamaForCausalLM has "
        )
        in caplog.text
    )


@pytest.mark.parametrize("data", [None, "pairs", [{"prompt": "x"}]])
def test_no_data(data):
    """TRL says what is wrong with it."""
    errors = []
    for cls, options in ((DPOTrainer, {}), (ShapedDPOTrainer, {"concepts": [goblin()]})):
        with pytest.raises((ValueError, TypeError)) as error:
            build(cls, arguments(False), train_dataset=data, **options)
        errors.append((error.type, str(error.value)))
    assert errors[0] == errors[1]
