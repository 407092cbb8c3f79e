"""Rows to be shown: their texts, and where in them a cluster's features are at their largest.

The harvest keeps, of each feature that is active in a span, the one token where it is largest. So what is marked is where features of a
cluster *peak*, and how many of them do; where else they are active is not known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...decoding import TokenTexts
from ...pages import clean
from ...progress import progress_bar
from ..analysis.views import numbered
from ..harvesting.shards import SPANS
from ..harvesting.store import Harvest


Cluster = tuple[str, int]
"""Kind (`feature`, `prompt`, `response` or `single`, as in `Analysis.clusters`) and number."""

Marks = dict[str, list[list[int]]]
"""Of each span, `[start, end, features]`: a range of its text, and how many features peak there. Places count UTF-16 units, as browsers do."""

_ANSWERS = ("feature", "response", "single")
_KINDS = {"prompt": ("prompt",), "chosen": _ANSWERS, "rejected": _ANSWERS}
"""The kinds of clusters that each span is read for."""


@dataclass(frozen=True)
class Row:
    """A pair to be shown.

    Attributes:
        row: Its number in the source dataset.
        texts: Of each span.
        marks: Of each cluster that was asked for.
    """

    row: int
    texts: dict[str, str]
    marks: dict[Cluster, Marks] = field(default_factory=dict)


def marked_rows(
    harvest: Harvest,
    wanted: Mapping[int, set[Cluster]],
    clusters: Mapping[str, list[list[int]]],
    tokenizer: Any | None,
    *,
    every_row: bool = False,
    progress: bool = False,
) -> Iterator[Row]:
    """The rows that are wanted, in the order of the data. One shard is in memory at a time.

    Args:
        harvest: The harvest.
        wanted: By row number, the clusters that are marked in it.
        clusters: Features of each cluster, by kind.
        tokenizer: Of the model; without it nothing is marked.
        every_row: Whether to give all rows of the harvest, those that are not wanted with no marks.
        progress: Whether to show a bar.
    """
    of_feature = {kind: numbered(groups, harvest.d_sae) for kind, groups in clusters.items()}
    rows = harvest.rows
    split = None if tokenizer is None else TokenTexts(tokenizer)
    asked = np.isin(rows, np.fromiter(wanted, np.int64, len(wanted)))
    with progress_bar(
        total=int(len(rows) if every_row else asked.sum()), desc="Rows", unit=" pairs", show=progress
    ) as bar:
        for index in range(harvest.n_shards):
            part = slice(index * harvest.shard_rows, (index + 1) * harvest.shard_rows)
            numbers = rows[part] if every_row else rows[part][asked[part]]
            if not len(numbers):
                continue
            texts = {
                row: {span: clean(of[span]) for span in SPANS}
                for row, of in zip(numbers.tolist(), harvest.texts(numbers), strict=True)
            }
            marks: dict[int, dict[Cluster, Marks]] = {}
            if split is not None and asked[part].any():
                marks = _shard_marks(harvest, index, rows[part], wanted, of_feature, split, texts)
            for row, of in texts.items():
                yield Row(row, of, marks.get(row, {}))
            bar.update(len(numbers))


def _shard_marks(
    harvest: Harvest,
    index: int,
    rows: NDArray[np.int64],
    wanted: Mapping[int, set[Cluster]],
    of_feature: Mapping[str, NDArray[np.int32]],
    split: TokenTexts,
    texts: Mapping[int, Mapping[str, str]],
) -> dict[int, dict[Cluster, Marks]]:
    """The marks of a shard's wanted rows."""
    here = [(place, row) for place, row in enumerate(rows.tolist()) if wanted.get(row)]
    (shard,) = harvest.shards(("peak",), indices=[index])
    found: dict[int, dict[Cluster, Marks]] = {row: {} for _, row in here}
    for (place, row), tokens in zip(here, harvest.ids([row for _, row in here]), strict=True):
        for span in SPANS:
            ranges = _ranges(texts[row][span], split(tokens[span]))
            if not ranges:
                continue
            peak = getattr(shard, span).peak
            entries = slice(peak.indptr[place], peak.indptr[place + 1])
            features, peaks = peak.indices[entries], peak.data[entries].astype(np.int64) - 1
            for kind in filter(of_feature.__contains__, _KINDS[span]):  # an older analysis has no single features
                of = of_feature[kind][features].astype(np.int64)
                asked = [number for of_kind, number in wanted[row] if of_kind == kind]
                inside = np.isin(of, asked) & (peaks < len(ranges))
                keys, counts = np.unique(of[inside] * len(ranges) + peaks[inside], return_counts=True)
                for key, count in zip(keys.tolist(), counts.tolist(), strict=True):
                    number, token = divmod(key, len(ranges))
                    start, end = ranges[token]
                    if end > start:
                        found[row].setdefault((kind, number), {}).setdefault(span, []).append([start, end, count])
    return found


def _ranges(text: str, pieces: list[str]) -> list[tuple[int, int]]:
    """Where each token is in a text, without the space before a word.

    The tokens that were not read lie before or after those that were; nothing if they lie elsewhere.
    """
    begin = text.find(clean("".join(pieces)))
    if begin < 0:
        return []
    wide = text and max(text) > "\uffff"
    units = list(accumulate((1 + (sign > "\uffff") for sign in text), initial=0)) if wide else None
    ranges = []
    for piece in pieces:
        end = begin + len(piece)
        start = end - len(piece.lstrip() or piece)
        ranges.append((start, end) if units is None else (units[start], units[end]))
        begin = end
    return ranges
