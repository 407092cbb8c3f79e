"""`shapedpo sae train` and `check`, as a user runs them: an SAE is trained, checked and used in a run."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest
import torch
import yaml
from sae_lens.training.sae_trainer import SAETrainer

from shapedpo import SAEFeatures, cli
from shapedpo.capture import resolve_site
from tests import helpers


LAB = Path(__file__).parents[2] / "recipes" / "goblin_lab.yaml"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A recipe of the tiny model on its little data."""
    folder = tmp_path_factory.mktemp("sae")
    helpers.pairs(200).to_json(folder / "pairs.jsonl")
    path = folder / "recipe.yaml"
    values = {
        "model_name_or_path": str(helpers.model_path()),
        "dataset_name": str(folder / "pairs.jsonl"),
        "max_length": 24,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "calibration_size": 16,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "output_dir": str(folder / "out"),
    }
    path.write_text(yaml.safe_dump(values))
    return path


def sae(*words: object) -> int:
    return cli.main(["sae", *map(str, words)])


def figure(printed: str, name: str) -> float:
    """A figure of the printed table."""
    return float(re.search(rf"{re.escape(name)}\W+([\d.,]+)", printed)[1].replace(",", ""))


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--features", 0, "--features: must be at least 1, got 0"),
        ("--k", 0, "--k: must be at least 1, got 0"),
        ("--tokens", "nan", "--tokens: must be at least 1, got nan"),
        ("--batch-tokens", 0, "--batch-tokens: must be at least 1, got 0"),
        ("--sample", 0, "--sample: must be at least 1, got 0"),
        ("--k", 49, "`k` is 49: of 48 features, 1 to 48 can be active"),
        ("--out", __file__, "is a file. Name a folder"),
        ("--model_name_or_path", "nobody/nothing", "The model 'nobody/nothing' cannot be loaded"),
    ],
)
def test_what_cannot_be_trained_is_refused_at_once(recipe, option, value, said, capsys):
    words = {"--layer": 1, "--out": recipe.parent / "no", "--features": 48, "--k": 4, "--tokens": 1e4, option: value}
    try:
        status = sae("train", "--config", recipe, *(word for pair in words.items() for word in pair))
    except SystemExit as refused:  # by argparse
        status = refused.code
    assert status == 2
    assert said in capsys.readouterr().err


def test_an_interrupted_training_is_interrupted(recipe, monkeypatch, capsys):
    """sae-lens takes the signal for its own, and keeps its handler."""
    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(SAETrainer, "fit", lambda trainer: signal.raise_signal(signal.SIGINT))
    sizes = ["--features", 48, "--k", 4, "--tokens", 20_000, "--batch-tokens", 100]
    assert sae("train", "--config", recipe, "--layer", 1, "--out", recipe.parent / "no", *sizes) == 130
    assert capsys.readouterr().err.endswith("shapedpo: interrupted\n")
    assert signal.getsignal(signal.SIGINT) is handler


def test_train_check_use(recipe, capfd):
    folder = recipe.parent / "sae"
    sizes = ["--features", 48, "--k", 4, "--tokens", 20_000, "--batch-tokens", 100, "--sae-learning-rate", 3e-3]
    assert sae("train", "--config", recipe, "--layer", 1, "--out", folder, *sizes) == 0
    printed = capfd.readouterr().out
    assert figure(printed, "variance explained") > 0.6
    assert 2 < figure(printed, "active features a token (L0)") < 8

    # What is saved is an SAE of sae-lens that names its layer, and says nothing of this machine.
    assert {path.name for path in folder.iterdir()} == {"cfg.json", "sae_weights.safetensors"}
    config = json.loads((folder / "cfg.json").read_text())
    assert config["architecture"] == "jumprelu"
    assert config["metadata"]["hook_name"] == "model.layers.1"
    assert str(recipe.parent) not in json.dumps(config)
    model = helpers.load_model()
    site = resolve_site(model, SAEFeatures(str(folder), "all").load().hook_name)
    assert site == (model.model.layers[1], "output", helpers.HIDDEN)

    assert sae("check", "--config", recipe, "--sae", folder) == 0
    again = capfd.readouterr().out
    for name in ("tokens", "variance explained", "active features a token (L0)", "features active on no token"):
        assert figure(again, name) == figure(printed, name)
    concepts = [
        {"name": "x", "readout": {"type": "sae_features", "sae": str(folder), "features": [0, 1]}, "action": "hold"}
    ]
    flags = ["--concepts", json.dumps(concepts), "--monitor", "all"]
    assert cli.main(["train", "--config", str(recipe), *flags]) == 0


def test_training_repeats(recipe, capfd):
    """The same seed gives the same SAE."""
    found = []
    for name in ("one", "two"):
        folder = recipe.parent / name
        sizes = ["--features", 16, "--k", 2, "--tokens", 1000, "--batch-tokens", 100, "--sample", 20]
        assert sae("train", "--config", recipe, "--layer", 0, "--out", folder, *sizes) == 0
        found.append(SAEFeatures(str(folder), "all").load().directions())
    assert torch.equal(*found)


BAD = {
    "layer": (
        ["train", "--layer", 9, "--out", "x", "--features", 8, "--k", 2, "--tokens", 1000, "--batch-tokens", 9],
        "3 layers",
    ),
    "tokens": (["train", "--layer", 0, "--out", "x", "--features", 8, "--k", 2, "--tokens", 100], "too few"),
    "no sae": (["check"], "Which SAE?"),
    "sae": (["check", "--sae", "./nowhere"], "no SAE folder"),
    "key": (["check", "--sae", "lab", "--modle", "x"], "--modle"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, recipe, capfd, tmp_path, monkeypatch):
    words, expected = BAD[case]
    monkeypatch.chdir(tmp_path)
    assert sae(words[0], "--config", recipe, *words[1:]) == 2
    assert expected in capfd.readouterr().err
