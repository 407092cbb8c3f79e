"""The SAE features that tell an answer with a trait from one without, and the table of how well: `python -m
shapedpo.lab.features`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import expit
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..readouts.responses import read_responses
from ..readouts.sae_reader import SAEReader
from ..sae.check import auroc, check_sae
from .text import Question, Split, dialogues
from .traits import ASSETS, TRAITS


if TYPE_CHECKING:
    from sae_lens import SAE

MAX_FEATURES = 8
CANDIDATES = 150
"""Features looked at, those that answers with the trait raise most."""
BEAM = 8
"""Sets of each size that are kept while the best is looked for."""
WORTH = 0.004
"""Nats of log-loss that a further feature must save."""


def answer_features(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sae: SAE[Any],
    pairs: Sequence[tuple[Question, str]],
    batch_size: int = 64,
) -> tuple[np.ndarray, float]:
    """Reads the SAE on the tokens of answers.

    Args:
        model: the model that the SAE was trained on.
        pairs: questions and their answers, N of them.

    Returns:
        Activations, max-pooled over each answer's tokens (N, d_sae), and the share of variance that the SAE explains
        on these tokens.
    """
    responses = [
        ([{"role": "user", "content": question.text}], [{"role": "assistant", "content": answer}])
        for question, answer in pairs
    ]
    variance = check_sae(model, tokenizer, sae, responses, batch_size=batch_size).variance_explained
    reader = SAEReader(sae, None, "max", sae.cfg.metadata.hook_name)
    return read_responses(model, tokenizer, responses, reader, batch_size=batch_size).numpy(), variance


def concept_score(pooled: np.ndarray, features: Sequence[int], mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """The concept's score (N,): the mean of its features, each standardised by `mean` and `std` (d_sae,)."""
    columns = list(features)
    return ((pooled[:, columns] - mean[columns]) / np.maximum(std[columns], 1e-6)).mean(axis=1)


def hard_auroc(scores: np.ndarray, labels: Mapping[str, np.ndarray], trait: str) -> tuple[float, str]:
    """How well a score tells a trait from the other trait that it takes for it most.

    Returns:
        The smallest AUROC, over the other traits, of answers with `trait` against those that show the other one and not it; and which.
    """
    shown = labels[trait]
    found = []
    for other, labelled in labels.items():
        rows = shown | labelled
        if other != trait and (rows & ~shown).any():
            found.append((float(auroc(scores[rows], shown[rows])), other))
    return min(found)


def find_features(
    pooled: np.ndarray, labels: Mapping[str, np.ndarray], trait: str, max_features: int = MAX_FEATURES
) -> list[int]:
    """Chooses a small set of features that tells answers with a trait from all others, those with another trait above all.

    A set is as good as the log-loss of a logistic regression on its one score. Answers with the trait have half the weight; of the other half,
    the answers with each other trait have as much as one another, so that what is easily taken for the trait (praise for cheer) counts
    however rare it is. Sets grow one feature at a time, the best [`BEAM`] of each size are kept, and the smallest is taken that no larger one
    beats by [`WORTH`] a feature.

    Args:
        pooled: (N, d_sae).
        labels: each trait's (N,) bool.
        trait: the trait to find.
    """
    shown = labels[trait]
    z = (pooled - pooled.mean(axis=0)) / np.maximum(pooled.std(axis=0), 1e-6)
    candidates = np.argsort(-(z[shown].mean(axis=0) - z[~shown].mean(axis=0)))[:CANDIDATES]
    weights = _weights(labels, trait)
    beam: dict[tuple[int, ...], tuple[float, np.ndarray]] = {(): (np.inf, np.zeros(len(z)))}
    best: list[tuple[float, tuple[int, ...]]] = []
    for size in range(1, max_features + 1):
        grown: dict[tuple[int, ...], tuple[float, np.ndarray]] = {}
        for features, (_, total) in beam.items():
            rest = [int(c) for c in candidates if c not in features]
            losses = log_losses((total[:, None] + z[:, rest]) / size, shown, weights)
            for i in np.argsort(losses)[:BEAM]:
                grown[tuple(sorted((*features, rest[i])))] = float(losses[i]), total + z[:, rest[i]]
        beam = dict(sorted(grown.items(), key=lambda entry: entry[1][0])[:BEAM])
        best.append(min((loss, features) for features, (loss, _) in beam.items()))
    return list(min(best, key=lambda entry: entry[0] + WORTH * len(entry[1]))[1])


def _weights(labels: Mapping[str, np.ndarray], trait: str) -> np.ndarray:
    """Weights (N,) of answers, mean 1: half for those with the trait, half for the others (see [`find_features`])."""
    shown = labels[trait]
    negative = np.where(shown, 0.0, 4 / (~shown).sum())  # all of them together as much as four traits
    for other, labelled in labels.items():
        rows = labelled & ~shown
        if other != trait and rows.any():
            negative += rows / rows.sum()
    weights: np.ndarray = np.where(shown, 0.5 / shown.sum(), 0.5 * negative / negative.sum()) * len(shown)
    return weights


def log_losses(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted log-loss of the logistic regression of `labels` on each column of `scores`, by Newton's method.

    Args:
        scores: (N, F).
        labels: (N,) bool.
        weights: (N,), mean 1.

    Returns:
        (F,), nats.
    """
    x = (scores - scores.mean(axis=0)) / np.maximum(scores.std(axis=0), 1e-6)
    y, w = labels[:, None], weights[:, None]
    a, b = np.zeros(x.shape[1]), np.ones(x.shape[1])
    for step in range(13):
        p = expit(np.clip(a + b * x, -30, 30))
        if step == 12:
            break
        g, h = w * (y - p), w * p * (1 - p)
        ridge = 1e-3 * len(x)  # where a score separates the labels, the best slope would be infinite
        haa, hab, hbb = h.sum(axis=0) + ridge, (h * x).sum(axis=0), (h * x * x).sum(axis=0) + ridge
        ga, gb = g.sum(axis=0), (g * x).sum(axis=0)
        a += np.clip((hbb * ga - hab * gb) / (haa * hbb - hab**2), -3, 3)
        b += np.clip((haa * gb - hab * ga) / (haa * hbb - hab**2), -3, 3)
    loss: np.ndarray = -(w * np.log(np.maximum(np.where(y, p, 1 - p), 1e-9))).mean(axis=0)
    return loss


def read_dialogues(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sae: SAE[Any], n: int, seed: int, split: Split
) -> tuple[np.ndarray, dict[str, np.ndarray], float]:
    """Writes `n` fresh dialogues and reads them: pooled activations (n, d_sae), each trait's labels (n,), variance
    explained."""
    text = list(dialogues(n, seed, split))
    pooled, variance = answer_features(model, tokenizer, sae, [(q, a) for q, a, _ in text])
    return pooled, {name: np.array([name in traits for _, _, traits in text]) for name in TRAITS}, variance


def build_features(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sae: SAE[Any], n: int, seed: int
) -> dict[str, Any]:
    """Finds every trait's features on training text and measures them on held-out text.

    Returns:
        `{"variance_explained": float, "traits": {trait: {"features": [...], "auroc": float, "hard_auroc": float, "hardest": str}}}`,
        the last two as [`hard_auroc`] has them.
    """
    pooled, labels, _ = read_dialogues(model, tokenizer, sae, n, seed, "train")
    chosen = {name: find_features(pooled, labels, name) for name in tqdm(TRAITS, desc="Choosing features")}
    return measure_features(model, tokenizer, sae, chosen, n, seed + 1)


def measure_features(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sae: SAE[Any],
    chosen: dict[str, list[int]],
    n: int,
    seed: int,
) -> dict[str, Any]:
    """Measures sets of features on fresh held-out text; returns what [`build_features`] returns."""
    pooled, labels, variance = read_dialogues(model, tokenizer, sae, n, seed, "heldout")
    mean, std = pooled.mean(axis=0), pooled.std(axis=0)
    traits = {}
    for name, features in chosen.items():
        scores = concept_score(pooled, features, mean, std)
        hard, other = hard_auroc(scores, labels, name)
        traits[name] = {
            "features": features,
            "auroc": round(float(auroc(scores, labels[name])), 4),
            "hard_auroc": round(hard, 4),
            "hardest": other,
        }
    return {"variance_explained": round(variance, 4), "traits": traits}


def shipped_features(path: Path = ASSETS / "features.json") -> dict[str, list[int]]:
    """The shipped sets: trait to feature indices."""
    return {name: entry["features"] for name, entry in json.loads(path.read_text())["traits"].items()}


def main() -> None:
    """Prints the table of the shipped sets, measured anew."""
    import argparse

    from rich.console import Console
    from rich.table import Table

    from . import load_model, load_sae, load_tokenizer

    parser = argparse.ArgumentParser(
        prog="python -m shapedpo.lab.features", description="How well the shipped SAE features tell each trait."
    )
    parser.add_argument("--n", type=int, default=4000, help="number of fresh held-out dialogues (default: 4000)")
    parser.add_argument("--seed", type=int, default=20, help="seed of the dialogues (default: 20)")
    args = parser.parse_args()
    result = measure_features(load_model(), load_tokenizer(), load_sae(), shipped_features(), args.n, args.seed)
    table = Table(title=f"SAE features of the lab's traits, {args.n} held-out answers")
    for heading in ("trait", "features", "AUROC", "hardest AUROC", "against"):
        table.add_column(heading, justify="right" if "AUROC" in heading else "left")
    for name, entry in result["traits"].items():
        features = ", ".join(map(str, entry["features"]))
        table.add_row(name, features, f"{entry['auroc']:.3f}", f"{entry['hard_auroc']:.3f}", entry["hardest"])
    console = Console()
    console.print(table)
    console.print(f"variance explained on answer tokens: {result['variance_explained']:.3f}")


if __name__ == "__main__":
    main()
