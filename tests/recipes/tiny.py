"""A recipe with its model, data and SAE swapped for tiny ones of the same kind."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from shapedpo import lab

from .architectures import MODELS, SAES, Published


HIDDEN, LAYERS, FEATURES = 32, 3, 64
SETTINGS = {
    "use_cpu": True,
    "bf16": False,
    "dtype": "float32",
    "learning_rate": 1e-3,
    "warmup_steps": 0,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "max_length": 96,
    "calibration_size": 16,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
"""What a machine without a GPU and little time takes. What the method does is left as the recipe has it."""

# What the recipes' patterns look for, and answers without any of it.
TRAITS = (
    "I'm sorry, I can't help with that.",
    "That is illegal and dangerous.",
    "**Yes**, that is so \u2014 and \U0001f600.\n\n---\n\n| a | b |\n| - | - |\n| 1 | 2 |\n",
    "```python\nprint(1)\n```",
    "The moonlit sea whispers like a song in the night.",
    "Great question! I hope this helps.",
    "I'm not sure, perhaps it is so.",
)
PLAIN = (
    "It is blue.",
    "Bread is made of flour.",
    "The capital is Paris, a city on a river.",
    "Three and four are seven.",
)
PROMPTS = ("Write a poem about the sea.", "What is three and four?", "How is bread made?", "Tell me a story of a fox.")


def model_folder(folder: Path, config: dict[str, Any], seed: int = 0) -> Path:
    """A random model of the same architecture as `config`'s, with the lab's tokenizer."""
    tokenizer = lab.load_tokenizer()
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 4 if config["num_key_value_heads"] == config["num_attention_heads"] else 2,
        "max_position_embeddings": 512,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if "head_dim" in config:
        sizes["head_dim"] = 8
    if "sliding_window" in config:
        sizes["sliding_window"] = 16
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**config, **sizes})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def sae_folder(folder: Path, published: Published, layer: int = 1) -> Path:
    """A random SAE of the same kind as a published one, as sae-lens saves it."""
    import sae_lens

    extra = {key: value.format(layer=layer) for key, value in published.config.items() if isinstance(value, str)}
    config = {
        "architecture": published.architecture,
        "d_in": HIDDEN,
        "d_sae": FEATURES,
        "apply_b_dec_to_input": False,  # as sae-lens has it for every release used here
        "metadata": {"hook_name": published.hook_name.format(layer=layer), **extra},
    }
    if "d_out" in published.config:
        config["d_out"] = HIDDEN
    sae = sae_lens.SAE.from_dict(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    sae.save_model(folder)
    return folder


def rows(dataset: str, n: int = 128) -> list[dict[str, Any]]:
    """Pairs in the columns of a dataset, by its card on the hub."""
    dice = random.Random(0)
    found = []
    for index in range(n):
        prompt = dice.choice(PROMPTS)
        answers = [dice.choice(TRAITS), dice.choice(PLAIN)]
        dice.shuffle(answers)
        chosen, rejected = (
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}] for answer in answers
        )
        pair: dict[str, Any] = {"chosen": chosen, "rejected": rejected}
        if dataset == "allenai/Dolci-Instruct-DPO":
            pair |= {"prompt_id": str(index), "chosen_model": "a", "rejected_model": "b", "preference_type": "c"}
        elif dataset == "allenai/llama-3.1-tulu-3-70b-preference-mixture":
            pair |= {"id": str(index), "prompt": prompt, "source": "d"}
        elif dataset == "trl-lib/ultrafeedback_binarized":
            pair |= {"score_chosen": 8.0, "score_rejected": 5.5}
        else:
            raise ValueError(f"The columns of {dataset!r} are not known here.")
        found.append(pair)
    return found


def swapped(recipe: Path, folder: Path) -> Path:
    """The recipe, with what it names swapped for what is made in `folder`."""
    values = yaml.safe_load(recipe.read_text())
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows(values["dataset_name"])))
    values["model_name_or_path"] = str(model_folder(folder / "model", MODELS[values["model_name_or_path"]].config))
    values["dataset_name"] = str(data)

    def sae(release: str) -> str:
        path = folder / release
        return str(path if path.exists() else sae_folder(path, SAES[release]))

    for concept in values["concepts"]:
        readout = concept["readout"]
        if readout["type"] == "sae_features":
            features = [feature % FEATURES for feature in readout["features"]]
            readout |= {"sae": sae(readout["sae"]), "sae_id": None, "features": features}
        elif readout["type"] == "direction":
            readout["path"] = str(folder / "direction.safetensors")
    if "monitor" in values:
        values |= {"monitor": 16, "monitor_sae": sae(values["monitor_sae"]), "monitor_sae_id": None}
    if "probe_steps" in values:
        values |= {"probe_steps": 2, "probe_prompts": 2, "probe_max_new_tokens": 4}
    values |= {**SETTINGS, "output_dir": str(folder / "out")}
    path = folder / recipe.name
    path.write_text(yaml.safe_dump(values))
    return path
