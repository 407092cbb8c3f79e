"""Each recipe on the real architecture, built without weights on the meta device: hooks, widths, LoRA's modules, and the memory table."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from shapedpo.hookpoints import resolve_site

from .architectures import MODELS, SAES


REPO = Path(__file__).parents[2]
RECIPES = [path for path in sorted((REPO / "recipes").glob("*.yaml")) if path.stem != "goblin_lab"]
README = (REPO / "recipes" / "README.md").read_text()


def config_of(name: str):
    return AutoConfig.for_model(**MODELS[name].config)


@pytest.fixture(scope="module")
def on_meta():
    """The real models, each built once."""
    built = {}

    def build(name: str):
        if name not in built:
            with torch.device("meta"):
                built[name] = AutoModelForCausalLM.from_config(config_of(name))
        return built[name]

    return build


@pytest.fixture(scope="module")
def estimate():
    """recipes/memory.py."""
    spec = importlib.util.spec_from_file_location("recipes_memory", REPO / "recipes" / "memory.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def readouts(recipe: dict) -> list[dict]:
    """What a recipe reads activations with, the monitored SAE among it."""
    found = [concept["readout"] for concept in recipe["concepts"] if concept["readout"]["type"] != "regex"]
    if "monitor" in recipe:
        found.append({"type": "sae_features", "sae": recipe["monitor_sae"], "sae_id": recipe["monitor_sae_id"]})
    return found


@pytest.mark.parametrize("name", MODELS)
def test_architecture_is_the_published_one(name, on_meta):
    assert sum(parameter.numel() for parameter in on_meta(name).parameters()) == MODELS[name].parameters


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_fits_its_model(path, on_meta):
    recipe = yaml.safe_load(path.read_text())
    model = on_meta(recipe["model_name_or_path"])
    assert readouts(recipe) or "monitor" in recipe
    for readout in readouts(recipe):
        if readout["type"] == "direction":  # made by the command in the recipe's head, at the layer that it names
            layer = int(re.search(r"shapedpo fit .*--kinds direction --layers (\d+)", path.read_text())[1])
            assert resolve_site(model, f"blocks.{layer}.hook_resid_post").width == model.config.hidden_size
            continue
        published = SAES[readout["sae"]]
        layer = int(re.search(r"\d+", readout["sae_id"])[0])
        site = resolve_site(model, published.hook_name.format(layer=layer))
        assert site.width == published.d_in
        assert all(feature < published.d_sae for feature in readout.get("features", []))
    if recipe.get("use_peft"):
        names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        for target in recipe["lora_target_modules"]:
            assert sum(name.endswith(target) for name in names) == model.config.num_hidden_layers


def test_gemma_scope_is_as_sae_lens_says():
    """The one release whose configuration sae-lens knows without a network."""
    from sae_lens.loading.pretrained_sae_loaders import get_gemma_2_config_from_hf

    theirs = get_gemma_2_config_from_hf("google/gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71", "cpu")
    ours = SAES["gemma-scope-2b-pt-res-canonical"]
    assert (theirs["d_in"], theirs["d_sae"], theirs["architecture"]) == (ours.d_in, ours.d_sae, ours.architecture)
    assert theirs["hook_name"] == ours.hook_name.format(layer=20)


def table() -> dict[str, list[str]]:
    """The README's table of estimates, by recipe."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in README.splitlines() if line.endswith(" h |")
    ]
    return {row[0].strip("`"): row[1:] for row in rows}


def test_every_recipe_has_an_estimate():
    assert list(table()) == [path.stem for path in RECIPES]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_estimate_is_what_the_script_gives(path, estimate):
    """Each cell of the table, to the digit."""
    recipe = yaml.safe_load(path.read_text())
    config = config_of(recipe["model_name_or_path"])
    hardware, pairs, tokens, *cells = table()[path.stem]
    gpus, zero = (int(number) for number in re.fullmatch(r"(\d+), ZeRO-(\d)", hardware).groups())
    sae = SAES[recipe["monitor_sae"]] if "monitor" in recipe else None
    parts = estimate.memory(config, recipe, gpus=gpus, zero=zero, sae=(sae.d_in, sae.d_sae) if sae else None)
    expected = [f"{size:.1f}" for size in parts.values()] + [f"{sum(parts.values()):.0f} GB"]
    numbers = {"pairs": int(pairs.replace(",", "")), "tokens_per_pair": int(tokens.replace(",", ""))}
    expected.append(f"{estimate.hours(config, recipe, gpus=gpus, **numbers):.1f} h")
    assert cells == expected
    # 128 pairs a step on that many GPUs, except where one GPU is enough
    batch = gpus * recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"]
    assert batch == (128 if gpus > 1 else 32)
    assert sum(parts.values()) < 0.9 * 80


def test_memory_by_hand(estimate):
    """A small Llama with figures that can be followed: 1 MB of each kind is counted once."""
    config = AutoConfig.for_model(
        model_type="llama",
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    recipe = {"per_device_train_batch_size": 3, "max_length": 50, "attn_implementation": "eager"}
    weights = 2 * 1000 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64
    parts = estimate.memory(config, recipe, gpus=4, zero=2, sae=(64, 256))
    tokens = 2 * 3 * 50
    assert {name: round(size * 1e9) for name, size in parts.items()} == {
        "weights": 2 * weights,
        "gradients": 2 * weights // 4,
        "optimizer": 12 * weights // 4,
        "reference": 2 * weights,
        "gathered": 0,
        "activations": 2 * 2 * tokens * 64 + 34 * tokens * 64 + 5 * 4 * tokens * 50,
        "head": 4 * 1000 * 64,
        "SAE": 4 * 2 * 64 * 256,
    }
    lora = {**recipe, "use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj"]}
    parts = estimate.memory(config, lora, gpus=1, zero=0, sae=None)
    assert round(parts["optimizer"] * 1e9) == 12 * 2 * 4 * (64 + 64)
    assert parts["reference"] == parts["head"] == parts["gathered"] == 0


def test_memory_on_the_command_line(estimate, tmp_path, capsys, monkeypatch):
    """A folder does instead of a name on the hub."""
    recipe = yaml.safe_load((REPO / "recipes" / "qwen3_4b.yaml").read_text())
    config_of(recipe["model_name_or_path"]).save_pretrained(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**recipe, "model_name_or_path": str(tmp_path)}))
    monkeypatch.setattr("sys.argv", ["memory.py", str(path), "--gpus", "4", "--sae", "2560", "163840"])
    estimate.main()
    printed = capsys.readouterr().out
    assert re.search(r"^all +" + table()["qwen3_4b"][-2].removesuffix(" GB"), printed, flags=re.MULTILINE)
    assert re.search(r"^optimizer +12\.1 GB$", printed, flags=re.MULTILINE)
