"""From a finding to a fix: what to read to shape it, in which rows, and the recipe that does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..analysis.attribution import Shown
from ..analysis.hypotheses import Analysis
from ..analysis.lessons import Lesson, lessons
from ..harvesting.store import Harvest, Shard


MOST = 8
"""Features of a concept at most."""

_AS_GOOD = 0.75  # of the best feature's figure, what another must reach


@dataclass(frozen=True)
class Condition:
    """Prompt features whose mean standardised score tells a finding's prompts.

    Attributes:
        features: Their numbers.
        threshold: Score, as a gate has it, that best tells the finding's rows from the others.
        inside, outside: Share of the finding's rows, and of the other rows, that are above.
    """

    features: list[int]
    threshold: float
    inside: float
    outside: float


@dataclass(frozen=True)
class Target:
    """What a fix is about.

    Attributes:
        name: Of the concept.
        lesson: The finding.
        features: Response features that its rows teach most clearly.
        more: Whether chosen completions have more of them.
        condition: Which prompts, if it is taught under a condition.
    """

    name: str
    lesson: Lesson
    features: list[int]
    more: bool
    condition: Condition | None

    @property
    def rows(self) -> NDArray[np.int64]:
        """The responsible rows."""
        return self.lesson.evidence


def finding(analysis: Analysis, number: int) -> Lesson:
    """A finding by the number that the audit's summary gives it.

    Raises:
        ValueError: If there is none.
    """
    found = lessons(analysis)
    if not 1 <= number <= len(found):
        there = f"The audit has findings 1 to {len(found)}." if found else "The audit found nothing."
        raise ValueError(f"There is no finding {number}. {there}")
    return found[number - 1]


def hypothesis(analysis: Analysis, number: int) -> Lesson:
    """A single hypothesis, by its place in `analysis.hypotheses`, as a lesson of its own.

    Raises:
        ValueError: If there is none.
    """
    if not 0 <= number < len(analysis.hypotheses):
        n = len(analysis.hypotheses)
        there = f"The audit has hypotheses 0 to {n - 1}." if n else "The audit found nothing."
        raise ValueError(f"There is no hypothesis {number}. {there}")
    one = analysis.hypotheses[number]
    return Lesson([one], one.evidence, np.abs(one.contributions[: len(one.evidence)]))


def target(harvest: Harvest, analysis: Analysis, lesson: Lesson, name: str) -> Target:
    """Find what to read to shape a finding.

    The features are those that more of the finding's rows than other rows differ in, all in one direction. Where no row stands out, they
    are the response cluster's. Takes one or two passes over the harvest.

    Args:
        harvest: The harvest.
        analysis: Its analysis.
        lesson: The finding, by [`finding`] or [`hypothesis`].
        name: What the concept will be called.
    """
    d, tau = harvest.d_sae, analysis.settings.tau
    net, noise = np.zeros(d), np.zeros(d)
    prompts = _Moments(d)
    n_in, n_out = len(lesson.evidence), max(1, harvest.n_rows - len(lesson.evidence))
    for shard in harvest.shards(("max", "freq")):
        inside = np.isin(shard.rows, lesson.evidence)
        own, other = (Shown.of(shard, tau, which) for which in (inside, ~inside))
        for shown, sums, sign in ((own, net, -1), (other, noise, 1)):
            sums += np.bincount(shown.more.indices, minlength=d) + sign * np.bincount(shown.less.indices, minlength=d)
        prompts.add(shard, inside)
    net, noise = net / max(1, n_in), noise / n_out
    clear = np.abs(net) - noise
    best = int(clear.argmax())
    if len(lesson.rows) and clear[best] > 0:
        more = bool(net[best] > 0)
        features = _best(np.where((net > 0) == more, clear, -np.inf))
    else:
        more, features = lesson.first.delta > 0, analysis.response_features(lesson.first)
    condition = _condition(harvest, prompts, lesson) if lesson.conditional else None
    return Target(name, lesson, features, more, condition)


class _Moments:
    """Sums of the prompts' maxima, over all rows and over a finding's."""

    def __init__(self, d: int) -> None:
        self.n = np.zeros(2)
        self.total, self.square = np.zeros((2, d)), np.zeros(d)

    def add(self, shard: Shard, inside: NDArray[np.bool_]) -> None:
        largest = shard.prompt.max
        self.n += len(inside), inside.sum()
        for place, part in enumerate((largest, largest[inside])):
            self.total[place] += np.bincount(part.indices, part.data, len(self.square))
        self.square += np.bincount(largest.indices, np.square(largest.data, dtype=np.float64), len(self.square))

    def standard(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and standard deviation of each feature, as training's calibration has them."""
        mean = self.total[0] / self.n[0]
        variance = np.maximum(self.square / self.n[0] - mean**2, 0) * self.n[0] / max(1, self.n[0] - 1)
        return mean, np.sqrt(variance)


def _best(figure: NDArray[np.float64]) -> list[int]:
    order = np.argsort(-figure, kind="stable")[:MOST]
    return sorted(int(feature) for feature in order if figure[feature] >= _AS_GOOD * figure[order[0]])


def _condition(harvest: Harvest, prompts: _Moments, lesson: Lesson) -> Condition | None:
    mean, sd = prompts.standard()
    own = prompts.total[1] / max(1, prompts.n[1])
    rest = (prompts.total[0] - prompts.total[1]) / max(1, prompts.n[0] - prompts.n[1])
    apart = np.where(sd > 0, (own - rest) / np.where(sd > 0, sd, 1), 0)
    if apart.max(initial=0) <= 0:
        return None
    features = _best(apart)
    scores, inside = [], []
    for shard in harvest.shards(("max",), ("prompt",)):
        scores.append(((shard.prompt.max[:, features].toarray() - mean[features]) / sd[features]).mean(axis=1))
        inside.append(np.isin(shard.rows, lesson.evidence))
    return _divided(features, np.concatenate(scores), np.concatenate(inside))


def _divided(features: list[int], scores: NDArray[np.float64], inside: NDArray[np.bool_]) -> Condition:
    """The threshold of highest share inside less share outside (Youden, 1950), half-way between neighbouring scores."""
    order = np.argsort(-scores, kind="stable")
    ranked, own = scores[order], inside[order]
    above = np.cumsum(own) / max(1, own.sum()), np.cumsum(~own) / max(1, (~own).sum())
    ends = np.append(ranked[:-1] > ranked[1:], True)  # equal scores are on one side
    place = int(np.where(ends, above[0] - above[1], -np.inf).argmax())
    below = ranked[place + 1] if place + 1 < len(ranked) else ranked[place] - 1.0
    threshold = round(float((ranked[place] + below) / 2), 4)
    return Condition(features, threshold, float(above[0][place]), float(above[1][place]))


def concepts(
    harvest: Harvest,
    targets: Sequence[Target],
    *,
    action: str = "hold",
    strength: float | None = None,
    columns: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """The concepts of a recipe that shapes some findings, as plain data.

    Args:
        harvest: The harvest, whose SAE they read.
        targets: The findings.
        action: What is done about each.
        strength: How strongly, for an action that needs it.
        columns: Columns of the dataset that gate targets, by the targets' names; the others are gated by a concept on the prompt if they have
            a condition.
    """
    found: list[dict[str, Any]] = []
    for one in targets:
        concept: dict[str, Any] = {"name": one.name, "readout": _readout(harvest, one.features), "action": action}
        if strength is not None:
            concept["strength"] = strength
        if columns and one.name in columns and action != "watch":
            concept["gate"] = {"column": columns[one.name]}
        elif one.condition is not None and action != "watch":
            where = f"{one.name} prompts"
            concept["gate"] = {"concept": where, "threshold": one.condition.threshold}
            found.append({"name": where, "readout": _readout(harvest, one.condition.features), "action": "watch"})
        found.append(concept)
    return found


def _readout(harvest: Harvest, features: Sequence[int]) -> dict[str, Any]:
    return {**harvest.settings["sae"], "features": list(features)}


EVALUATION = ("eval_strategy", "load_best_model_at_end", "metric_for_best_model", "greater_is_better")
"""Keys of a recipe that need a test split."""


def recipe(
    harvest: Harvest,
    shaped: Sequence[Mapping[str, Any]],
    base: Mapping[str, Any] | None = None,
    dataset: str | None = None,
) -> dict[str, Any]:
    """A recipe for `shapedpo train`, with the audit's model and data.

    Args:
        harvest: The harvest, whose settings say what was audited.
        shaped: The concepts: see [`concepts`].
        base: A recipe to start from, whose other keys stay; its concepts too. What it says of data is left out where the audit says it.
        dataset: Another dataset than the audited one, a file. It is the training split alone, so that the run is not evaluated.
    """
    settings = harvest.settings
    # what was audited from Python may have no name: the base recipe has to give it
    named = {"model_name_or_path": settings["model"], "dataset_name": dataset or settings["dataset"]}
    found: dict[str, Any] = {key: name for key, name in named.items() if name}
    if dataset is None:
        if settings.get("config"):
            found["dataset_config"] = settings["config"]
        if settings.get("split", "train") != "train":
            found["dataset_train_split"] = settings["split"]
    found |= {"max_length": settings["max_length"], "truncation_mode": settings["truncation_mode"]}
    values = dict(base or {"output_dir": "runs/fixed"})
    if "dataset_name" in found:
        for key in ("datasets", "dataset_config", "dataset_train_split"):  # a mixture would be trained on in its place
            values.pop(key, None)
    if dataset:
        for key in EVALUATION:
            values.pop(key, None)
    there = values.pop("concepts", None) or []
    return {**found, **{k: v for k, v in values.items() if k not in found}, "concepts": [*there, *shaped]}
