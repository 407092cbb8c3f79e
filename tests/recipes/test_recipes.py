"""The recipes and the accelerate configs: each key exists, each SAE is known, and the lab's recipe is the demo's."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from shapedpo import SAEFeatures, lab
from shapedpo.readouts.sae import _SAFE_LOADERS
from shapedpo.scripts.recipe import read_recipe

from .architectures import MODELS, SAES


REPO = Path(__file__).parents[2]
RECIPES = sorted((REPO / "recipes").glob("*.yaml"))
ACCELERATE = sorted((REPO / "accelerate_configs").glob("*.yaml"))


def parsed(path: Path):
    """The recipe's dataclasses, on a machine without a GPU."""
    from shapedpo.scripts.train import parse

    return parse(read_recipe(path), ["--use_cpu", "true", "--bf16", "false"])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_parses(path):
    script, training, model, _ = parsed(path)
    assert script.dataset_name
    assert model.model_name_or_path
    assert training.concepts
    assert training.output_dir.startswith("runs/")
    text = path.read_text()  # says how it is launched
    assert f"shapedpo train --config recipes/{path.name}" in text or f"recipes/launch.slurm recipes/{path.name}" in text


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_in_the_table(path):
    assert f"[`{path.name}`]({path.name})" in (REPO / "recipes" / "README.md").read_text()


@pytest.fixture(scope="module")
def releases():
    """The SAEs that the installed sae-lens knows."""
    (folder,) = find_spec("sae_lens").submodule_search_locations
    return yaml.load((Path(folder) / "pretrained_saes.yaml").read_text(), Loader=yaml.CSafeLoader)


def saes_of(training) -> list[tuple[str, str]]:
    """Release and id of every SAE that a recipe names."""
    named = [(c.readout.sae, c.readout.sae_id) for c in training.concepts if isinstance(c.readout, SAEFeatures)]
    if training.monitor_sae not in (None, "lab"):
        named.append((training.monitor_sae, training.monitor_sae_id))
    return named


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_saes_are_known(path, releases):
    """sae-lens's directory has each, with weights that are no pickle, for the recipe's model or the one that it was fine-tuned from."""
    _, training, model, _ = parsed(path)
    for name, sae_id in saes_of(training):
        release = releases[name]
        assert sae_id in [entry["id"] for entry in release["saes"]]
        assert release["conversion_func"] in _SAFE_LOADERS
        assert release["model"] in MODELS[model.model_name_or_path].base
        assert name in SAES


def test_lab_recipe_is_the_demo():
    """Its settings are those under which the demo shows what it shows."""
    recipe = read_recipe(REPO / "recipes" / "goblin_lab.yaml").values
    world = lab.goblin_world()
    assert {key: recipe[key] for key in world.dpo} == world.dpo
    assert recipe["dataset_name"] == "lab:goblin_world"
    _, training, _, _ = parsed(REPO / "recipes" / "goblin_lab.yaml")
    goblin = lab.concept(world.unwanted, action="hold")
    ours = training.concepts[0]
    assert (ours.name, ours.action, ours.shaper) == (goblin.name, goblin.action, goblin.shaper)
    assert ours.readout.load().fingerprint == goblin.readout.load().fingerprint


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_config(path):
    """accelerate's own reader takes it (an unknown key is an error to it), and it is what its name says."""
    config = load_config_from_file(str(path))
    name = path.stem
    assert config.use_cpu == name.startswith("cpu")
    assert config.mixed_precision == ("no" if config.use_cpu else "bf16")
    assert config.num_processes == {"single_gpu": 1}.get(name, 2 if config.use_cpu else 8)
    kind = config.distributed_type.value
    if "zero" in name:
        stage = int(name.split("zero")[1][0])
        assert kind == "DEEPSPEED"
        assert config.deepspeed_config["zero_stage"] == stage
        assert config.deepspeed_config["offload_param_device"] == ("cpu" if name.endswith("offload") else "none")
    else:
        assert kind == {"single_gpu": "NO", "fsdp2": "FSDP"}.get(name, "MULTI_GPU")


def test_every_accelerate_config_is_in_the_table():
    table = (REPO / "recipes" / "README.md").read_text()
    for path in ACCELERATE:
        assert f"`{path.stem}`" in table
