"""What the report keeps of a run's records as they come: the latest tables, and histories thinned to a bounded size."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


Record = Mapping[str, Any]

HISTORY = 300
"""Steps kept of a history."""

PROBES = 60
"""Probes whose rates are kept."""

SAMPLED = 5
"""Probes whose rollouts and features are kept: the first, the last, and some between."""


def number(value: Any) -> float | None:
    """A finite number, or `None` for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def numbers(value: Any, count: int) -> tuple[float | None, ...]:
    """`count` numbers of a list such as `[value, se]`; `None` for each that is missing."""
    values = list(value[:count]) if isinstance(value, list | tuple) else [value]
    return tuple(number(item) for item in values + [None] * (count - len(values)))


def mapping(value: Any) -> Mapping[str, Any]:
    """`value` where it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def items(value: Any) -> list[Mapping[str, Any]]:
    """The mappings of a list; none where it is not a list."""
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list | tuple) else []


def thin(steps: Sequence[int], limit: int) -> list[int]:
    """At most `limit` of these ascending steps, spread evenly over their range, the first and the last among them."""
    if len(steps) <= limit:
        return list(steps)
    first, last, kept = steps[0], steps[-1], set()
    for index in range(limit):
        target = first + (last - first) * index / (limit - 1)
        right = min(bisect_left(steps, target), len(steps) - 1)
        left = max(right - 1, 0)
        kept.add(steps[left] if target - steps[left] < steps[right] - target else steps[right])
    return sorted(kept)


class History:
    """Items by step, of which about `limit` stay however many come.

    An item of a step that is not later than the last one takes the place of that and of everything after it: the run was
    resumed from before that point.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._items: dict[int, Any] = {}

    def add(self, step: int, item: Any) -> None:
        """Append `item`, after what it takes the place of has gone."""
        while self._items and next(reversed(self._items)) >= step:
            self._items.popitem()
        self._items[step] = item
        if len(self._items) > 2 * self.limit:
            self._items = self.thinned()

    def thinned(self) -> dict[int, Any]:
        """At most `limit` items, in the order of their steps."""
        return {step: self._items[step] for step in thin(list(self._items), self.limit)}

    @property
    def last(self) -> tuple[int, Any] | None:
        """The latest step and its item."""
        return next(reversed(self._items.items()), None)


class Digest:
    """What the page needs of all records so far; its size does not grow with the length of the run.

    Attributes:
        run: The `run` record.
        steps: `step` records.
        probes: `probe` records without features and samples.
        sampled: Their features and samples.
        features: The latest `features` record.
        pairs: The latest `pairs` record.
        finished: Whether the run has ended.
        step: The last step that a record speaks of.
    """

    def __init__(self, records: Iterable[Any] = ()) -> None:
        self.run: Record = {}
        self.steps = History(HISTORY)
        self.probes = History(PROBES)
        self.sampled = History(SAMPLED)
        self.features: Record = {}
        self.pairs: Record = {}
        self.finished = False
        self.step = 0
        self.add(records)

    def add(self, records: Iterable[Any]) -> None:
        """Take in further records. What is no record, and types that this version does not know, are passed over."""
        for record in records:
            if isinstance(record, Mapping):
                self._add(record)

    def _add(self, record: Record) -> None:
        kind, step = record.get("type"), int(number(record.get("step")) or 0)
        if kind == "run":
            self.run = record
        elif kind == "step":
            self.steps.add(step, record)
        elif kind == "features":
            self.features = record
        elif kind == "pairs":
            self.pairs = record
        elif kind == "probe":
            self.probes.add(step, {key: value for key, value in record.items() if key not in ("features", "samples")})
            self.sampled.add(step, _slim(record))
        elif kind != "end":
            return
        self.finished = kind == "end"
        self.step = step if kind != "run" else self.step


def _slim(record: Record) -> dict[str, Any]:
    """A probe's features and samples, with only those activations that are not zero."""
    return {
        "estimator": record.get("estimator"),
        "predictor": record.get("predictor"),
        "r2": number(record.get("r2")),
        "features": items(record.get("features")),
        "samples": [
            {**sample, "activations": {n: _sparse(values) for n, values in mapping(sample.get("activations")).items()}}
            for sample in items(record.get("samples"))
        ],
    }


def _sparse(values: Any) -> list[float]:
    """`[index, value, index, value, ...]` of the positive ones, to a tenth of a standard deviation."""
    flat: list[float] = []
    for index, value in enumerate(values if isinstance(values, list | tuple) else ()):
        value = number(value)
        if value is not None and value >= 0.05:
            flat += (index, round(value, 1))
    return flat
