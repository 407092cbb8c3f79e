"""What the page's script draws: the numbers of its charts, and the rollouts with their marks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...pages import clean
from .digest import Digest, Record, mapping, number, numbers


TEXT = 4000
"""Characters of a text that the page holds."""

FEATURES = 200
"""Rows of each table of features, and points of a scatter plot times a half."""


def drawn(digest: Digest, names: list[str], concepts: Sequence[Record]) -> dict[str, Any]:
    """What the page's script gets, as JSON.

    Args:
        digest: Of the records.
        names: The concepts, by which the records have them.
        concepts: The same as the page shows them, in the same order: from here on they go by their places.
    """
    history = digest.steps.thinned()
    return {
        "run": [clean(digest.run.get("run_name")), clean(mapping(digest.run.get("data")).get("fingerprint"))],
        "finished": digest.finished,
        "steps": list(history),
        "concepts": [
            {
                "name": name,
                "label": concept["label"],
                "verdict": concept["verdict"],
                "amplification": _column(history, name, "amplification"),
                "pressure": _column(history, name, "pressure"),
                "strength": [
                    _short(number(mapping(mapping(r.get("concepts")).get(name)).get("strength")))
                    for r in history.values()
                ],
            }
            for name, concept in zip(names, concepts, strict=True)
        ],
        "probes": [
            {
                "step": step,
                "concepts": [_probed(mapping(mapping(probe.get("concepts")).get(name))) for name in names],
            }
            for step, probe in digest.probes.thinned().items()
        ],
        "sampled": [
            {
                "step": step,
                "estimator": clean(probe["estimator"], 200),
                "predictor": clean(probe["predictor"], 200),
                "r2": _short(probe["r2"]),
                "features": [
                    [clean(f.get("label") or f.get("feature"), 120), *_two(f, "predicted"), *_two(f, "change")]
                    for f in probe["features"][: 2 * FEATURES]
                ],
                "samples": [_sample(sample, names) for sample in probe["samples"]],
            }
            for step, probe in digest.sampled.thinned().items()
        ],
    }


def _column(history: Mapping[int, Record], name: str, key: str) -> list[list[float | None]]:
    return [_two(mapping(mapping(record.get("concepts")).get(name)), key) for record in history.values()]


def _two(record: Record, key: str) -> list[float | None]:
    """Value and standard error, short."""
    return [_short(value) for value in numbers(record.get(key), 2)]


def _short(value: float | None) -> float | None:
    """Four significant digits: charts need no more, and the page stays small."""
    return None if value is None else float(f"{value:.4g}")


def _probed(probe: Record) -> dict[str, Any]:
    rate = [_short(value) for value in numbers(probe.get("rate"), 3)]
    return {"rate": rate, **{key: _two(probe, key) for key in ("change", "predicted")}}


def _sample(sample: Record, names: list[str]) -> dict[str, Any]:
    scores, activations = mapping(sample.get("scores")), mapping(sample.get("activations"))
    tokens = sample.get("tokens")
    texts = [clean(token) for token in tokens] if isinstance(tokens, list | tuple) else []
    if not texts:
        texts = [clean(sample.get("completion"))]
    return {
        "prompt": clean(sample.get("prompt"), TEXT),
        "tokens": _cut(texts),
        "scores": [_short(number(scores.get(name))) for name in names],
        "activations": [activations.get(name, []) for name in names],
    }


def _cut(tokens: list[str]) -> list[str]:
    """The tokens that fit into a text's length, and a last one that says how much is missing."""
    room = TEXT
    for index, token in enumerate(tokens):
        if len(token) > room:
            left = sum(map(len, tokens[index:])) - room
            return [*tokens[:index], token[:room], f" … ({left:,} more characters, not in this page)"]
        room -= len(token)
    return tokens
