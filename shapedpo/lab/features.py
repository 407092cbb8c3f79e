"""The SAE features that tell an answer with a trait from one without, and the table of how well: `python -m
shapedpo.lab.features`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..readouts.responses import read_responses
from ..readouts.sae_reader import SAEReader
from ..sae.check import auroc, check_sae
from ..sae.find import MAX_FEATURES, balanced_weights, best_sets, concept_score, hard_auroc, worthwhile
from .text import Question, Split, dialogues
from .traits import ASSETS, TRAITS


if TYPE_CHECKING:
    from sae_lens import SAE


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


def hardest(scores: np.ndarray, labels: Mapping[str, np.ndarray], trait: str) -> tuple[float, str]:
    """How well a score tells a trait from the other trait that it takes for it most.

    Returns:
        The smallest AUROC, over the other traits, of answers with `trait` against those that show the other one and not it; and which.
    """
    shown = labels[trait]
    hard = {other: labelled & ~shown for other, labelled in labels.items() if other != trait}
    hard = {other: rows for other, rows in hard.items() if rows.any()}
    return min(zip(hard_auroc(scores, shown, list(hard.values())), hard, strict=True))


def find_features(
    pooled: np.ndarray, labels: Mapping[str, np.ndarray], trait: str, max_features: int = MAX_FEATURES
) -> list[int]:
    """Chooses a small set of features that tells answers with a trait from all others, those with another trait above all.

    Args:
        pooled: (N, d_sae).
        labels: each trait's (N,) bool.
        trait: the trait to find.
    """
    shown = labels[trait]
    hard = [labelled & ~shown for other, labelled in labels.items() if other != trait]
    return worthwhile(best_sets(pooled, shown, balanced_weights(shown, hard), max_features))


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
        the last two as [`hardest`] has them.
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
        hard, other = hardest(scores, labels, name)
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
