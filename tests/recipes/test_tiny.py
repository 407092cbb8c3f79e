"""Each recipe trains: two steps on a random model of its architecture, read by a random SAE of its kind, on rows of its data's form.

The commands that a recipe's head tells to run before it (`shapedpo fit ...`) are run first, as they stand there.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from shapedpo import cli
from shapedpo.monitor.records import read_records
from shapedpo.readouts import Readout

from .tiny import PLAIN, PROMPTS, SETTINGS, TRAITS, swapped


REPO = Path(__file__).parents[2]
RECIPES = sorted((REPO / "recipes").glob("*.yaml"))


def commands(recipe: Path) -> list[list[str]]:
    """The `shapedpo` commands in the comments of a recipe, but those that train."""
    text = re.sub(r"\\\n# *", "", recipe.read_text())
    lines = re.findall(r"^# +shapedpo (.+)$", text, flags=re.MULTILINE)
    return [shlex.split(line) for line in lines if not line.startswith("train")]


def here(command: list[str], recipe: Path, folder: Path) -> list[str]:
    """A command for the swapped recipe: other paths, and a layer that the tiny model has."""
    changed = {"--config": recipe, "--layers": "1", "--out": folder}
    return [str(changed.get(before, word)) for before, word in zip(["", *command], command, strict=False)]


@pytest.mark.parametrize("path", [p for p in RECIPES if p.stem != "goblin_lab"], ids=lambda path: path.stem)
def test_recipe_trains(path, tmp_path, capfd):
    recipe = swapped(path, tmp_path)
    for command in commands(path):
        assert cli.main(here(command, recipe, tmp_path)) == 0, capfd.readouterr().err
    assert cli.main(["train", "--config", str(recipe)]) == 0, capfd.readouterr().err

    values, out = yaml.safe_load(recipe.read_text()), tmp_path / "out"
    records = read_records(out)
    assert [concept["name"] for concept in records[0]["concepts"]] == [c["name"] for c in values["concepts"]]
    assert records[0]["settings"]["monitor"] == values.get("monitor")
    assert [record["type"] for record in records].count("probe") == (2 if "probe_steps" in values else 0)
    assert (out / "report.html").is_file()
    assert_loads(out, tmp_path / "model", lora="use_peft" in values)


def assert_loads(out: Path, start: Path, lora: bool) -> None:
    """What was saved loads in transformers alone, has moved, and holds nothing of ours."""
    before = load_file(start / "model.safetensors")
    if lora:
        from peft import PeftModel

        adapter = load_file(out / "adapter_model.safetensors")
        assert max(float(t.abs().max()) for name, t in adapter.items() if "lora_B" in name) > 0  # starts at zero
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(start), out)
    else:
        after = load_file(out / "model.safetensors")
        assert after.keys() == before.keys()
        assert max(float((after[name] - before[name]).abs().max()) for name in after) > 1e-4
        model = AutoModelForCausalLM.from_pretrained(out)
    assert torch.isfinite(model(torch.tensor([[1, 5, 9]])).logits).all()
    assert not [name for name, _ in model.named_parameters() if "W_enc" in name]


def test_lab_recipe_trains(tmp_path):
    """As it is, but for its length."""
    recipe = REPO / "recipes" / "goblin_lab.yaml"
    short = {"max_steps": 2, "calibration_size": 32, "probe_prompts": 2, "probe_max_new_tokens": 8}
    flags = [f"--{key}={value}" for key, value in (short | {"dataset_name": "lab:goblin_world?n=64"}).items()]
    assert cli.main(["train", "--config", str(recipe), *flags, "--output_dir", str(tmp_path)]) == 0
    records = read_records(tmp_path)
    assert records[0]["settings"]["monitor"] == 1024
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_patterns_see_what_they_are_named_for(path):
    """Each finds its example among the texts of the tiny data, and nothing in the plain answers."""
    for concept in yaml.safe_load(path.read_text())["concepts"]:
        if concept["readout"]["type"] == "regex":
            readout = Readout.from_dict(concept["readout"]).load()
            assert readout.score([*TRAITS, *PROMPTS]).sum() >= 1, concept["name"]
            assert readout.score(list(PLAIN)).sum() == 0, concept["name"]


def test_settings_change_nothing_of_the_method():
    """What the test overrides is the machine's; concepts, loss, LoRA, precomputation stay the recipe's."""
    assert not SETTINGS.keys() & {
        "concepts",
        "beta",
        "loss_type",
        "use_peft",
        "precompute_ref_log_probs",
        "gradient_checkpointing",
    }
