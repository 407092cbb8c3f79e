"""What a readout names is not there, or does not fit the model."""

from __future__ import annotations

import logging

import pytest
import torch

from shapedpo import Concept, Direction, TextFunction
from tests.helpers import HIDDEN, LAYERS, save_sae, shaped, vector

from . import features, refused


@pytest.mark.parametrize("index", [48, 100_000])
def test_feature_outside_the_sae(index):
    refused(
        f"Concept 'goblin': ...Feature {index} is outside the SAE...48 features (0 to 47)",
        lambda: shaped(features(indices=[3, index])),
    )


@pytest.mark.parametrize("indices", [[], [-1], [1.5], [True], [3, 3], "every", 7, None])
def test_no_feature_indices(indices):
    data = {"name": "goblin", "readout": {"type": "sae_features", "sae": "x", "features": indices}}
    refused("Concept 'goblin': ", lambda: shaped(data))


def test_width_of_the_sae():
    refused(
        f"Concept 'goblin': ...16 wide...'blocks.1.hook_resid_post' of LlamaForCausalLM is {HIDDEN} wide",
        lambda: shaped(features(save_sae("narrow", d_in=16))),
    )


def test_width_of_a_direction():
    way = Concept("way", Direction(torch.ones(HIDDEN + 1), layer=0))
    refused(f"Concept 'way': ...{HIDDEN + 1} wide...is {HIDDEN} wide", lambda: shaped(way))


@pytest.mark.parametrize("peft", [False, True])
def test_a_layer_that_the_model_lacks(peft):
    from peft import LoraConfig

    options = {"peft_config": LoraConfig(r=2, target_modules=["q_proj"])} if peft else {}
    way = Concept("way", Direction(vector(), layer=LAYERS))
    refused(
        f"Concept 'way': ...layer {LAYERS}...{LAYERS} layers (0 to {LAYERS - 1})",
        lambda: shaped(way, trainer=options),
    )


@pytest.mark.parametrize("hook", ["model.layers.1.mpl", "blocks.1.hook_nonsense", "encoder.layer.1"])
def test_a_hook_that_the_model_lacks(hook):
    text = refused(f"Concept 'goblin': ...{hook!r}", lambda: shaped(features(hook_name=hook)))
    assert "model.layers" in text or "hook_resid_post" in text  # what there is instead


def test_another_family(caplog):
    """Only names say so: a warning, and the run goes on."""
    with caplog.at_level(logging.WARNING, logger="shapedpo"):
        shaped(features(save_sae("gemma", model_name="gemma-2-2b"))).train()
    (text,) = [record.getMessage() for record in caplog.records if "gemma" in record.getMessage()]
    for part in ("Concept 'goblin'", "'gemma-2-2b'", "gemma 2", "llama"):
        assert part in text
    caplog.clear()
    shaped(features())
    assert not [record for record in caplog.records if "family" in record.getMessage()]


def test_missing_files(tmp_path):
    refused("Concept 'goblin': ...no SAE folder", lambda: shaped(features(tmp_path / "nowhere")))
    refused("Concept 'goblin': ...lacks", lambda: shaped(features(tmp_path)))
    way = Concept("way", Direction(path=str(tmp_path / "none.safetensors"), layer=0))
    refused("Concept 'way': ...There is no file", lambda: shaped(way))


def test_pickles_are_not_loaded(tmp_path):
    path = tmp_path / "way.pt"
    torch.save({"direction": vector()}, path)
    refused(
        "Concept 'way': ...not a safetensors file",
        lambda: shaped(Concept("way", Direction(path=str(path), layer=0))),
    )


def test_pooling():
    for readout in (
        {"type": "direction", "path": "x", "pooling": "median"},
        {"type": "sae_features", "sae": "x", "features": [1], "pooling": "median"},
    ):
        data = {"name": "goblin", "readout": readout}
        refused("Concept 'goblin': ...'median'...max, mean, freq", lambda data=data: shaped(data))


@pytest.mark.parametrize(
    ("readout", "text"),
    [
        (
            {"type": "probe"},
            "'probe'...attention_probe, direction, function, lab, linear_probe, regex, sae_features",
        ),
        ({"type": "sae_feature"}, "'sae_feature'. Did you mean 'sae_features'?"),
        ({"type": ["regex"]}, "['regex']...direction"),
        ({"type": "regex", "patern": "x"}, "'patern'. Did you mean 'pattern'?"),
        ({"pattern": "x"}, "None...direction"),
        ({"type": "regex"}, "'pattern'"),
        ({"type": "regex", "pattern": "x", "mode": 1}, "'mode'...pattern, flags"),
        ({"type": "regex", "pattern": "("}, "'('...not valid"),
        ({"type": "regex", "pattern": 7}, "7"),
        ({"type": "regex", "pattern": "x", "flags": 2}, "`flags` must be a text...got 2"),
        ({"type": "function", "function": "no.such:thing"}, "no.such:thing"),
        ({"type": "function", "function": "thing"}, "'thing'"),
        ("goblin", "'goblin'"),
    ],
)
def test_descriptions(readout, text):
    refused(f"Concept 'odd': ...{text}", lambda: shaped({"name": "odd", "readout": readout}))


def test_no_readout():
    refused("Concept 'goblin': `readout` is missing", lambda: shaped({"name": "goblin"}))
    refused("Concept 'goblin': ...`readout`...3", lambda: Concept("goblin", 3))  # type: ignore[arg-type]


def test_a_function_that_gives_no_number():
    trainer = shaped(Concept("odd", TextFunction(lambda text: "0.5", name="half")))  # type: ignore[arg-type,return-value]
    refused("half must return a number, got '0.5'", trainer.train)
