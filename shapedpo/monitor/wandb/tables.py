"""The state of a run as its records tell it, and the rows of the tables that Weights & Biases shows. No wandb in here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


Record = Mapping[str, Any]
Columns = dict[str, type]
"""A table's columns: name and type of the cells, each of which may also be empty."""
Key = tuple[str, str | int]
"""Of a named concept or an SAE feature, whose labels need not be unique: its kind, and its name or number."""

Z = 1.96
"""Half-width of a 95 % interval, in standard errors."""
CELL = 500
"""Characters of a text cell."""
RANKED, PAIRS, ROLLOUTS, SCORED = 100, 250, 100, 12
"""Most rows of `concepts/amplified` (and `suppressed`), `concepts/pairs`, `probe/rollouts`; most concepts with columns there."""
EXAMPLES = 3
"""Example rows quoted in one cell."""
HISTORY = 240
"""Steps kept for the heat map: above this many, every other one is dropped."""

RANKED_COLUMNS: Columns = {
    "step": int,
    "rank": int,
    "label": str,
    "kind": str,
    "amplification": float,
    "low": float,
    "high": float,
    "pressure": float,
    "delta": float,
    "example rows": str,
    "activates on": str,
    "promotes": str,
    "feature": int,
}
PAIR_COLUMNS: Columns = {
    "step": int,
    "label": str,
    "kind": str,
    "row": int,
    "contribution": float,
    "delta": float,
    "margin": float,
    "prompt": str,
    "chosen": str,
    "rejected": str,
}
CONCEPT, FEATURE = "concept", "SAE feature"


@dataclass(frozen=True)
class Item:
    """A named concept or an SAE feature, with its latest figures.

    Args:
        label: What people read.
        kind: `"concept"` or `"SAE feature"`.
        record: Its entry in the latest record: `amplification`, `pressure` and `delta`, each `[value, standard error]`.
        rows: The pairs responsible, largest contribution first.
    """

    label: str
    kind: str
    record: Record
    rows: Sequence[Record] = ()

    @property
    def value(self) -> float | None:
        """Amplification, sd of the score."""
        return number(self.record.get("amplification"))

    @property
    def error(self) -> float | None:
        """Its standard error."""
        return number(self.record.get("amplification"), 1)

    def order(self) -> tuple[bool, float]:
        """Sorts what stands clear of zero first (its 95 % interval leaves zero out), then the largest."""
        value, error = self.value or 0.0, self.error
        return (error is None or abs(value) <= Z * error, -abs(value))


@dataclass
class Latest:
    """What the records of a run have said so far: the latest of each kind, the first probe, and a thinned history."""

    run: Record = field(default_factory=dict)
    step: int = 0
    concepts: Record = field(default_factory=dict)
    features: Record = field(default_factory=dict)
    pairs: Record = field(default_factory=dict)
    before: Record = field(default_factory=dict)
    probe: Record = field(default_factory=dict)
    history: dict[int, dict[Key, float]] = field(default_factory=dict)
    labels: dict[Key, str] = field(default_factory=dict)

    def update(self, record: Record) -> set[str]:
        """Take a record in.

        Returns:
            What it changed: of `run`, `concepts`, `pairs`, `probe` and `end`. Empty for a type unknown here.
        """
        kind, step = record.get("type"), int(record.get("step") or 0)
        self.step = step  # also backwards: a run that resumes does its last steps again
        if kind == "run":
            self.run = record
            return {"run"}
        if kind == "step":
            self.concepts = record.get("concepts") or {}
            self._remember(step, {(CONCEPT, name): (self.label(name), entry) for name, entry in self.concepts.items()})
            return {"concepts"}
        if kind == "features":
            self.features = record
            entries = list(self._feature_entries())
            self._remember(
                step, {(FEATURE, entry.get("feature", -1)): (feature_label(entry), entry) for entry in entries}
            )
            return {"concepts"}
        if kind == "pairs":
            self.pairs = record.get("concepts") or {}
            return {"concepts", "pairs"}
        if kind == "probe":
            self.before = record if step == 0 or not self.before else self.before
            self.probe = record
            return {"probe"}
        return {"end"} if kind == "end" else set()

    def label(self, name: str) -> str:
        """A named concept's label."""
        for concept in self.run.get("concepts") or ():
            if concept.get("name") == name:
                return str(concept.get("label") or name)
        return name

    def items(self) -> list[Item]:
        """All concepts and features of the latest records."""
        named = [
            Item(self.label(name), CONCEPT, entry, self.pairs.get(name) or ()) for name, entry in self.concepts.items()
        ]
        features = [
            Item(feature_label(entry), FEATURE, entry, entry.get("rows") or ()) for entry in self._feature_entries()
        ]
        return named + features

    def ranked(self) -> tuple[list[Item], list[Item]]:
        """What the run amplifies and what it suppresses, best first. A value of zero, or none, is in neither."""
        items = sorted(self.items(), key=Item.order)
        amplified = [item for item in items if (item.value or 0.0) > 0]
        suppressed = [item for item in items if (item.value or 0.0) < 0]
        return amplified[:RANKED], suppressed[:RANKED]

    def _feature_entries(self) -> Iterator[Record]:
        for side in ("amplified", "suppressed"):
            yield from self.features.get(side) or ()

    def _remember(self, step: int, entries: Mapping[Key, tuple[str, Record]]) -> None:
        for later in [known for known in self.history if known > step]:
            del self.history[later]
        column = self.history.setdefault(step, {})
        for key, (label, entry) in entries.items():
            value = number(entry.get("amplification"))
            if value is not None:
                column[key] = value
                self.labels[key] = label
        if len(self.history) > HISTORY:
            for dropped in list(self.history)[1:-1:2]:
                del self.history[dropped]


def ranked_rows(items: Iterable[Item], step: int) -> list[list[Any]]:
    """Rows of `concepts/amplified` or `concepts/suppressed`, under `RANKED_COLUMNS`."""
    rows = []
    for rank, item in enumerate(items, 1):
        value, error = item.value, item.error
        half = None if value is None or error is None else Z * error
        rows.append(
            [
                step,
                rank,
                clip(item.label),
                item.kind,
                value,
                None if half is None or value is None else value - half,
                None if half is None or value is None else value + half,
                number(item.record.get("pressure")),
                number(item.record.get("delta")),
                _examples(item.rows),
                clip(" ".join(str(token) for token in item.record.get("tokens") or ())) or None,
                clip(" ".join(str(token) for token in item.record.get("promotes") or ())) or None,
                item.record.get("feature"),
            ]
        )
    return rows


def pair_rows(latest: Latest) -> list[list[Any]]:
    """Rows of `concepts/pairs`, under `PAIR_COLUMNS`, by concept. Where not all fit, each gives up its least contributing ones."""
    items = latest.items()
    ranks = max((len(item.rows) for item in items), default=0)
    turns = [(index, rank) for rank in range(ranks) for index, item in enumerate(items) if rank < len(item.rows)]
    rows = []
    for index, rank in sorted(turns[:PAIRS]):
        item, pair = items[index], items[index].rows[rank]
        numbers = [number([pair.get(name)]) for name in ("contribution", "delta", "margin")]
        texts = [clip(pair.get(name)) for name in ("prompt", "chosen", "rejected")]
        rows.append([latest.step, clip(item.label), item.kind, pair.get("row"), *numbers, *texts])
    return rows


def rollouts(latest: Latest) -> tuple[Columns, list[list[Any]]]:
    """Columns and rows of `probe/rollouts`: each held-out prompt with its completion before training and now, and their scores."""
    before = latest.before.get("samples") or ()
    now = latest.probe.get("samples") or ()
    names = list(latest.probe.get("concepts") or {})[:SCORED]
    columns: Columns = {"step": int, "prompt": str, "before": str, "now": str}
    for name in names:
        columns |= {f"{latest.label(name)} before": float, f"{latest.label(name)} now": float}
    rows = []
    for index, sample in enumerate(now[:ROLLOUTS]):
        first = before[index] if index < len(before) and before[index].get("prompt") == sample.get("prompt") else {}
        row = [
            latest.probe.get("step"),
            clip(sample.get("prompt")),
            clip(first.get("completion")),
            clip(sample.get("completion")),
        ]
        for name in names:
            row += [number([(entry.get("scores") or {}).get(name)]) for entry in (first, sample)]
        rows.append(row)
    return columns, rows


def number(pair: Any, index: int = 0) -> float | None:
    """A value of `[value, standard error]`, or `None` where it is unknown or not finite."""
    if not isinstance(pair, Sequence) or index >= len(pair) or not isinstance(pair[index], int | float):
        return None
    value = float(pair[index])
    return value if math.isfinite(value) else None


def clip(text: Any, limit: int = CELL) -> str | None:
    """A text cell of bounded length, which ends in an ellipsis where something was cut."""
    if text is None:
        return None
    text = str(text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def feature_label(entry: Record) -> str:
    """A feature's label, or its number where there is none."""
    return str(entry.get("label") or f"feature {entry.get('feature')}")


def _examples(rows: Sequence[Record]) -> str | None:
    """The first pairs in one cell: row number, delta, and how the texts begin."""
    quoted = []
    for pair in rows[:EXAMPLES]:
        delta = number([pair.get("delta")])
        parts = [f"row {pair.get('row')}" + ("" if delta is None else f", delta {delta:+.2f}")]
        for name in ("prompt", "chosen", "rejected"):
            if pair.get(name):
                parts.append(f"{name}: {clip(pair[name], CELL // EXAMPLES // 4)}")
        quoted.append(" | ".join(parts))
    return clip("\n".join(quoted)) or None
