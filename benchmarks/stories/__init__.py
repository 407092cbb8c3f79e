"""A preference for dialogue planted in a real model's own samples: what the studies on it share.

The model continues children's stories. Prompts are first sentences that it wrote; of four continuations of each, the best and the
worst under a planted reward make a pair. The reward likes quotation marks (dialogue), `mom`, `happy` and `big`, and dislikes `friend`,
`sad` and `play`. One of these is unwanted, and the rest wanted. The concept is the six features of a BatchTopK SAE that best tell text with
the unwanted trait from text without.

The model is looked for in `SHAPEDPO_STORIES` (default `../shared/models/stories260k` beside the repository). Samples and SAE are kept
in `benchmarks/cache/`, by recipe and seed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import training
from benchmarks.folders import CACHE, REPOSITORY


MODEL = Path(os.environ.get("SHAPEDPO_STORIES") or REPOSITORY.parent / "shared" / "models" / "stories260k")

# What the planted reward sees: a pattern and its reward.
REWARDS = {
    "dialogue": (r'["“”]', 2.0),
    "mom": (r"mom", 1.5),
    "friend": (r"friend", -1.0),
    "happy": (r"happy", 1.0),
    "sad": (r"sad", -1.5),
    "big": (r"big", 0.7),
    "play": (r"play", -0.7),
}
NOISE = 0.7  # times Gumbel noise
LAYER = 3
OPENING = "Once upon a time"
SHOWN = "shown"
"""Column that names the traits that a pair's chosen text shows and its rejected one does not, between commas."""


@dataclass(frozen=True)
class Recipe:
    """The sizes of an experiment."""

    train_prompts: int = 2000
    heldout_prompts: int = 400
    continuations: int = 4
    tokens: int = 60  # of a continuation
    rollouts: int = 4  # of a held-out prompt
    sae_tokens: int = 1_000_000
    sae_batch: int = 512
    sae_features: int = 512
    sae_k: int = 8
    concept_features: int = 6
    epochs: int = 1
    learning_rate: float = 1e-4
    batch: int = 16
    beta: float = 0.1
    seed: int = 0


# Half the pairs at a higher learning rate, and a third of the tokens for the SAE: as small as it can be while it still says the same.
QUICK = Recipe(train_prompts=1000, heldout_prompts=250, sae_tokens=300_000, sae_batch=256, learning_rate=1.5e-4)


# --- samples -----------------------------------------------------------------------------------------------------------------------


def load() -> tuple[Any, Any]:
    """The model and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32), AutoTokenizer.from_pretrained(MODEL)


@torch.no_grad()
def sample(model: Any, tokenizer: Any, prompts: Sequence[str], tokens: int, seed: int, batch: int = 512) -> list[str]:
    """One continuation of each prompt, at temperature 1."""
    torch.manual_seed(seed)
    model.eval()
    texts = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))  # little padding
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        inputs = tokenizer([prompts[row] for row in rows], return_tensors="pt", padding=True, padding_side="left")
        length = inputs["input_ids"].shape[1]
        out = model.generate(
            **inputs, do_sample=True, top_k=0, max_new_tokens=tokens, pad_token_id=tokenizer.pad_token_id
        )
        for row, ids in zip(rows, out[:, length:], strict=True):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            # The tokenizer drops the space before a text's first word.
            texts[row] = text if text.startswith(" ") else f" {text}"
    return texts


def first_sentences(model: Any, tokenizer: Any, n: int, seed: int) -> list[str]:
    """`n` first sentences of stories, as often as the model writes them (a third of them are about a girl named Lily)."""
    found: list[str] = []
    while len(found) < n:
        for text in sample(model, tokenizer, [OPENING] * int(1.1 * (n - len(found)) + 16), 32, seed):
            if (sentence := re.match(r"[^.\"]{8,}\.", text)) is not None:
                # `sample` puts a space before each continuation, the comma after the opening included
                found.append(OPENING + re.sub("^ ,", ",", sentence[0]))
        seed += 1000
    return found[:n]


def planted_reward(text: str, draw: np.random.Generator) -> float:
    """What the planted preference thinks of a continuation."""
    return sum(reward for pattern, reward in REWARDS.values() if re.search(pattern, text)) + NOISE * draw.gumbel()


def rates(texts: Sequence[str]) -> dict[str, float]:
    """Share of texts that show each trait."""
    return {
        name: sum(re.search(pattern, text) is not None for text in texts) / len(texts)
        for name, (pattern, _) in REWARDS.items()
    }


@dataclass
class World:
    """What all runs of an experiment share.

    Attributes:
        pairs: Rows with `prompt`, `chosen`, `rejected` and [`SHOWN`].
        texts: All continuations of the training prompts, with their prompts before them.
        heldout: Prompts drawn apart from training's. The commonest openings are among both.
        sae: Folder of the SAE.
    """

    recipe: Recipe
    pairs: list[dict[str, str]]
    texts: list[tuple[str, str]]
    heldout: list[str]
    sae: Path

    @classmethod
    def build(cls, recipe: Recipe, folder: Path) -> World:
        """Samples the pairs and trains the SAE, or reads them from `folder` where an earlier call left them."""
        folder.mkdir(parents=True, exist_ok=True)
        samples, sae = folder / "samples.json", folder / "sae"
        if not samples.exists():
            model, tokenizer = load()
            sentences = first_sentences(model, tokenizer, recipe.train_prompts + recipe.heldout_prompts, recipe.seed)
            prompts = sentences[recipe.heldout_prompts :]
            repeated = [prompt for prompt in prompts for _ in range(recipe.continuations)]
            texts = sample(model, tokenizer, repeated, recipe.tokens, recipe.seed + 1)
            samples.write_text(
                json.dumps(
                    {"heldout": sentences[: recipe.heldout_prompts], "texts": [*zip(repeated, texts, strict=True)]}
                )
            )
        data = json.loads(samples.read_text())
        texts = [(prompt, text) for prompt, text in data["texts"]]
        if not sae.exists():
            train_story_sae(recipe, [prompt + text for prompt, text in texts], sae)
        draw = np.random.default_rng(recipe.seed)
        pairs = []
        for start in range(0, len(texts), recipe.continuations):
            group = texts[start : start + recipe.continuations]
            ranked = sorted((planted_reward(text, draw), index) for index, (_, text) in enumerate(group))
            worst, best = ranked[0][1], ranked[-1][1]
            pair = {"prompt": group[0][0], "chosen": group[best][1], "rejected": group[worst][1]}
            shown = [
                name
                for name, (pattern, _) in REWARDS.items()
                if re.search(pattern, pair["chosen"]) and not re.search(pattern, pair["rejected"])
            ]
            pairs.append(pair | {SHOWN: ",".join(shown)})
        return cls(recipe, pairs, texts, data["heldout"], sae)


# --- the concept -------------------------------------------------------------------------------------------------------------------


def train_story_sae(recipe: Recipe, texts: Sequence[str], out: Path) -> None:
    """Trains a BatchTopK SAE on the output of decoder layer [`LAYER`]."""
    from shapedpo.sae.train import token_rows, train_sae

    _, tokenizer = load()
    train_sae(
        MODEL,
        tokenizer,
        token_rows(tokenizer(list(texts))["input_ids"], 96, tokenizer.pad_token_id),
        out,
        layer=LAYER,
        d_sae=recipe.sae_features,
        k=recipe.sae_k,
        training_tokens=recipe.sae_tokens,
        batch_tokens=recipe.sae_batch,
        learning_rate=1e-3,
        seed=recipe.seed,
        model_name="stories260k",
    )


def choose_features(world: World, n_texts: int = 2000, trait: str = "dialogue") -> tuple[list[int], list[float]]:
    """The features that best tell continuations with a trait from those without, and their AUROC."""
    from shapedpo import SAEFeatures
    from shapedpo.readouts.responses import read_responses
    from shapedpo.sae.check import auroc

    texts = world.texts[:n_texts]
    scores = read_responses(*load(), texts, SAEFeatures(str(world.sae), "all").load(), batch_size=64)  # (N, F)
    label = np.array([re.search(REWARDS[trait][0], text) is not None for _, text in texts])
    areas = auroc(scores.numpy(), label)
    best = np.argsort(-areas)[: world.recipe.concept_features]
    return [int(index) for index in best], [float(areas[index]) for index in best]


# --- runs --------------------------------------------------------------------------------------------------------------------------


def concept(world: World, features: Sequence[int], trait: str = "dialogue", **shaping: Any) -> list[Any]:
    """The concept of a trait, with an action and a method."""
    from shapedpo import Concept, SAEFeatures

    return [Concept(trait, SAEFeatures(str(world.sae), list(features)), **shaping)]


def train(world: World, concepts: list[Any]) -> tuple[Any, list[dict[str, float]]]:
    """Trains a fresh copy of the model; returns it and the log. Without concepts the trainer is TRL's own."""
    from datasets import Dataset

    recipe = world.recipe
    model, tokenizer = load()
    settings = {
        "num_train_epochs": recipe.epochs,
        "per_device_train_batch_size": recipe.batch,
        "learning_rate": recipe.learning_rate,
        "beta": recipe.beta,
    }
    trainer = training.train(model, tokenizer, Dataset.from_list(world.pairs), settings, concepts, recipe.seed)
    return trainer.model, trainer.state.log_history


def heldout_rates(world: World, model: Any) -> dict[str, float]:
    """Trait rates of a model's rollouts on the held-out prompts."""
    return rates(heldout_rollouts(world, model))


def heldout_rollouts(world: World, model: Any) -> list[str]:
    """A model's continuations of the held-out prompts, all of the first prompt first."""
    _, tokenizer = load()
    return sample(model, tokenizer, repeated(world), world.recipe.tokens, seed=1234)


def repeated(world: World) -> list[str]:
    """The prompt of each held-out rollout."""
    return [prompt for prompt in world.heldout for _ in range(world.recipe.rollouts)]


def cached_world(recipe: Recipe) -> World:
    """[`World.build`] in the cache folder, which git leaves alone."""
    CACHE.mkdir(parents=True, exist_ok=True)
    (CACHE / ".gitignore").write_text("*\n")
    key = hashlib.sha256(json.dumps(asdict(recipe), sort_keys=True).encode()).hexdigest()[:12]
    return World.build(recipe, CACHE / f"stories-{key}")
