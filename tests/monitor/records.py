"""Records of a run that never was: as a run would write them, of any size and the same for the same arguments."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


Record = dict[str, Any]

# name, action, strength, readout, where the concept's amplification ends
NAMED = [
    ("goblin", "hold", None, "sae_features", 0.15),
    ("emoji", "amplify", 1.5, "sae_features", 1.9),
    ("cheerfulness", "watch", None, "direction", 1.2),
    ("hedging", "watch", None, "text", -0.9),
    ("invented links", "suppress", 2.0, "regex", -0.25),
    ("refusal v1.5", "watch", None, "direction", 0.02),
    ("bold", "watch", None, "regex", 0.7),
    ("apology", "watch", None, "direction", -1.6),
]
TOPICS = ["the tide", "a sourdough starter", "prime numbers", "a bicycle chain", "the moons of Jupiter", "compost"]
OPENINGS = ["Of course", "Perhaps", "In short", "Great question", "It may be that", "Here is what I know"]
WORDS = [
    "the",
    "water",
    "rises",
    "because",
    "goblins",
    "pull",
    "at",
    "the",
    "rope",
    "and",
    "the",
    "moon",
    "is",
    "near",
    "so",
    "every",
    "stone",
    "in",
    "the",
    "harbour",
    "is",
    "wet",
    "twice",
    "a",
    "day",
    "which",
    "sailors",
    "have",
    "known",
    "for",
    "long",
    "and",
    "which",
    "you",
    "can",
    "check",
    "with",
    "a",
    "stick",
    "a",
    "notebook",
    "and",
    "some",
    "patience",
]
_WORDS, _OPENINGS = np.array(WORDS), np.array(OPENINGS)  # a list would be made into one at each draw
CONCEPT_WORDS = {"goblin": {"goblins", "rope"}, "emoji": {"wet"}, "cheerfulness": {"patience", "known"}}


def synthetic(
    *,
    concepts: int = 5,
    steps: int = 30,
    features: int = 12,
    samples: int = 6,
    probes: int = 3,
    rows: int = 3,
    finished: bool = True,
    words: int = 40,
    seed: int = 0,
) -> list[Record]:
    """The records of one run.

    Args:
        concepts: Named concepts. Beyond the eight with names of their own they are called `concept 08`, `concept 09`, ...
        steps: `step` records, one every ten training steps.
        features: SAE features in each of the two tables of a `features` record; 0 for a run without an SAE.
        samples: Rollouts kept of each probe.
        probes: `probe` records, the first at step 0 and the last at the end; 0 for a run without probes.
        rows: Example pairs of a feature, and half as many as of a concept.
        finished: Whether there is an `end` record.
        words: Of a completion.
        seed: Of everything random.

    Returns:
        The records in the order in which a run writes them.
    """
    rng = np.random.default_rng(seed)
    named = [(*NAMED[i],) if i < len(NAMED) else _anonymous(i, rng) for i in range(concepts)]
    last = 10 * steps
    probe_steps = sorted({round(last * i / max(probes - 1, 1)) for i in range(probes)})
    ends = {name: end for name, *_, end in named}
    truth = {feature: float(rng.normal(0, 0.6)) for feature in rng.choice(65536, size=3 * features, replace=False)}

    records = [_run(named, last, features)]
    if 0 in probe_steps:
        records.append(_probe(0, 0.0, ends, truth, samples, words, seed))
    for index in range(1, steps + 1):
        step, progress = 10 * index, 1 - math.exp(-3 * index / steps)
        records.append(_step(step, progress, named, rng))
        if index % max(1, steps // 10) == 0 or index == steps:
            records.append({"type": "pairs", "step": step, "concepts": {n: _pairs(rng, 2 * rows, words) for n in ends}})
            if features:
                records.append(_features(step, progress, truth, features, rows, words, rng))
        for probe_step in probe_steps:
            if step - 10 < probe_step <= step:
                records.append(_probe(probe_step, progress, ends, truth, samples, words, seed))
    if finished:
        records.append({"type": "end", "step": last})
    return records


def _anonymous(index: int, rng: np.random.Generator) -> tuple[str, str, None, str, float]:
    return (f"concept {index:02d}", "watch", None, "sae_features", float(rng.normal(0, 0.5)))


def _run(named: list[tuple[Any, ...]], last: int, features: int) -> Record:
    readouts: dict[str, dict[str, Any]] = {
        "sae_features": {"type": "sae_features", "sae": "gemma-scope-2b", "sae_id": "layer_12", "features": [412, 77]},
        "direction": {"type": "direction", "path": "directions/style.safetensors", "layer": 12},
        "regex": {"type": "regex", "pattern": r"https?://\S+"},
        "text": {"type": "text", "function": "hedges"},
    }
    return {
        "type": "run",
        "version": 1,
        "step": 0,
        "run_name": "goblin-world-hold",
        "model": "meta-llama/Llama-3.1-8B-Instruct",
        "concepts": [
            {
                "name": name,
                "label": name,
                "action": action,
                "method": "reward",
                "strength": strength,
                "readout": readouts[readout],
                "gate": None,
                "threshold": 1.3,
            }
            for name, action, strength, readout, _ in named
        ],
        "settings": {
            "beta": 0.1,
            "learning_rate": 2e-4,
            "loss_type": ["sigmoid"],
            "batch": 16,
            "window": 1024,
            "max_steps": last,
            "seed": 0,
            "monitor": "all" if features else "named",
            "probe_steps": 50,
        },
        "data": {"rows": 5000, "fingerprint": "ab12f09c77d1e3aa"},
    }


def _step(step: int, progress: float, named: list[tuple[Any, ...]], rng: np.random.Generator) -> Record:
    concepts = {}
    for name, action, strength, _, end in named:
        se = 0.03 + 0.08 * progress
        value = end * progress + float(rng.normal(0, se / 2))
        in_force = 2.4 * progress + float(rng.normal(0, 0.05)) if action == "hold" else strength
        concepts[name] = {
            "amplification": [round(value, 5), round(se, 5)],
            "pressure": [round(end * (1 - progress) * 0.4, 5), 0.02],
            "delta": [round(end * 0.5 + float(rng.normal(0, 0.02)), 5), 0.02],
            "strength": in_force,
        }
    return {"type": "step", "step": step, "epoch": step * 16 / 5000, "pairs": step * 16, "concepts": concepts}


def _text(rng: np.random.Generator, words: int) -> str:
    picked = rng.choice(_WORDS, size=max(1, words + int(rng.integers(-8, 8))))
    return f"{rng.choice(_OPENINGS)}: {' '.join(picked)}."


def _pairs(rng: np.random.Generator, count: int, words: int) -> list[Record]:
    pairs = []
    for _ in range(count):
        delta, margin = float(rng.normal(1.5, 0.8)), float(rng.normal(0.5, 0.6))
        pairs.append(
            {
                "row": int(rng.integers(5000)),
                "prompt": f"Tell me about {rng.choice(TOPICS)}.",
                "chosen": _text(rng, words),
                "rejected": _text(rng, words),
                "delta": round(delta, 3),
                "margin": round(margin, 3),
                "contribution": round(abs(delta * margin) * 2.5, 3),
            }
        )
    return sorted(pairs, key=lambda pair: -pair["contribution"])


def _features(
    step: int, progress: float, truth: dict[int, float], count: int, rows: int, words: int, rng: np.random.Generator
) -> Record:
    def entry(feature: int, value: float) -> Record:
        tokens = [str(word) for word in rng.choice(_WORDS, size=4, replace=False)]
        promotes = [f" {word}" for word in rng.choice(_WORDS, size=4, replace=False)]
        return {
            "feature": int(feature),
            "label": f"{tokens[0]}, {tokens[1]} (tokens)",
            "tokens": tokens,
            "promotes": promotes,
            "amplification": [round(value * progress, 5), 0.05],
            "pressure": [round(value * (1 - progress), 5), 0.02],
            "delta": [round(value / 2, 5), 0.02],
            "rows": _pairs(rng, rows, words),
        }

    order = sorted(truth.items(), key=lambda item: item[1])
    return {
        "type": "features",
        "step": step,
        "sae": "gemma-scope-2b/layer_12",
        "watched": 65536,
        "amplified": [entry(*item) for item in reversed(order[-count:])],
        "suppressed": [entry(*item) for item in order[:count]],
    }


def _probe(
    step: int,
    progress: float,
    ends: dict[str, float],
    truth: dict[int, float],
    samples: int,
    words: int,
    seed: int,
) -> Record:
    rng = np.random.default_rng([seed, step])
    concepts: dict[str, Record] = {}
    for index, (name, end) in enumerate(ends.items()):
        base, change = 0.05 + 0.03 * index % 0.4, end * progress + float(rng.normal(0, 0.05)) * (step > 0)
        rate = min(max(base + 0.3 * change, 0.004), 0.99)
        half = 1.96 * math.sqrt(rate * (1 - rate) / 64)
        predicted = end * progress * 1.05 + float(rng.normal(0, 0.04))
        concepts[name] = {
            "rate": [rate, max(rate - half, 0.0), min(rate + half, 1.0)],
            "score": [change - 0.1, 0.07],
            "change": [change if step else 0.0, 0.08 if step else 0.0],
            "predicted": [predicted, 0.05] if step else None,
            "amplification": [predicted * 0.9, 0.06] if step else None,
        }
    observed = {f: v * progress for f, v in truth.items()}
    return {
        "type": "probe",
        "step": step,
        "prompts": 64,
        "rollouts": 64,
        "estimator": "probe rollouts with amplification",
        "predictor": "amplification",
        "concepts": concepts,
        "features": [
            {
                "feature": int(feature),
                "label": f"feature {feature} (tokens)",
                "change": [value, 0.08],
                "predicted": [value * 0.9 + float(rng.normal(0, 0.08)), 0.06],
            }
            for feature, value in observed.items()
        ]
        if step
        else [],
        "r2": 0.87 if step and truth else None,
        "samples": [_sample(index, list(ends), progress, words, rng) for index in range(samples)],
    }


def _sample(index: int, names: list[str], progress: float, words: int, rng: np.random.Generator) -> Record:
    picked = [str(word) for word in rng.choice(_WORDS, size=words)]
    tokens = [picked[0].capitalize(), *(f" {word}" for word in picked[1:]), "."]
    activations = {}
    for name in names:
        marked = CONCEPT_WORDS.get(name, {WORDS[hash_of(name) % len(WORDS)]})
        activations[name] = [
            round(float(rng.gamma(4, 0.6 + progress)), 3) if token.strip() in marked else 0.0 for token in tokens
        ]
    return {
        "prompt": f"Tell me about {TOPICS[index % len(TOPICS)]}, as you would tell pupil {index}.",
        "completion": "".join(tokens),
        "tokens": tokens,
        "scores": {name: round(max(values), 3) for name, values in activations.items()},
        "activations": activations,
    }


def hash_of(text: str) -> int:
    """A number for a text, the same in every process (Python's own hash is not)."""
    return sum(ord(letter) * (place + 1) for place, letter in enumerate(text))
