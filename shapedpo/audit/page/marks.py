"""Rows to be shown: their texts, and where in them a cluster's features are at their largest.

The harvest keeps, of each feature that is active in a span, the one token where it is largest. So what is marked is where features of a
cluster *peak*, and how many of them do; where else they are active is not known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from ...decoding import TokenTexts
from ...pages import clean
from ..store import SPANS, Harvest


Cluster = tuple[str, int]
"""Kind (`feature`, `prompt` or `response`, as in `Analysis.clusters`) and number."""

Marks = dict[str, list[list[int]]]
"""Of each span, `[start, end, features]`: a range of its text, and how many features peak there. Places count UTF-16 units, as browsers do."""

_READ = {"prompt": ("prompt",), "feature": ("chosen", "rejected"), "response": ("chosen", "rejected")}


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
    of_feature = {kind: _of_feature(groups, harvest.d_sae) for kind, groups in clusters.items()}
    rows = harvest.rows
    split = None if tokenizer is None else TokenTexts(tokenizer)
    asked = np.isin(rows, np.fromiter(wanted, np.int64, len(wanted)))
    with tqdm(total=int(len(rows) if every_row else asked.sum()), desc="Rows", unit=" pairs", disable=not progress) as bar:
        for index in range(harvest.n_shards):
            part = slice(index * harvest.shard_rows, (index + 1) * harvest.shard_rows)
            numbers = rows[part] if every_row else rows[part][asked[part]]
            if not len(numbers):
                continue
            marks = {}
            if split is not None and asked[part].any():
                marks = _shard_marks(harvest, index, rows[part], wanted, of_feature, split)
            for number, texts in zip(numbers.tolist(), harvest.texts(numbers), strict=True):
                shown = {span: clean(texts[span]) for span in SPANS}
                found = {
                    cluster: {span: _placed(shown[span], *ranges) for span, ranges in spans.items()}
                    for cluster, spans in marks.get(number, {}).items()
                }
                yield Row(number, shown, found)
            bar.update(len(numbers))


def _of_feature(groups: list[list[int]], d_sae: int) -> NDArray[np.int32]:
    cluster = np.full(d_sae, -1, np.int32)
    for number, features in enumerate(groups):
        cluster[features] = number
    return cluster


def _shard_marks(
    harvest: Harvest,
    index: int,
    rows: NDArray[np.int64],
    wanted: Mapping[int, set[Cluster]],
    of_feature: Mapping[str, NDArray[np.int32]],
    split: TokenTexts,
) -> dict[int, dict[Cluster, dict[str, tuple[list[str], dict[int, int]]]]]:
    """Of each wanted row and cluster, by span: the texts of its tokens, and how many features peak at which."""
    here = [(place, number) for place, number in enumerate(rows.tolist()) if wanted.get(number)]
    (shard,) = harvest.shards(("peak",), indices=[index])
    ids = harvest.ids([number for _, number in here])
    found: dict[int, dict[Cluster, dict[str, tuple[list[str], dict[int, int]]]]] = {}
    for (place, number), tokens in zip(here, ids, strict=True):
        pieces: dict[str, list[str]] = {}
        for span in SPANS:
            peak = getattr(shard, span).peak
            entries = slice(peak.indptr[place], peak.indptr[place + 1])
            features, peaks = peak.indices[entries], peak.data[entries].astype(np.int64) - 1
            for kind, cluster in sorted(wanted[number]):
                if span not in _READ[kind]:
                    continue
                at, count = np.unique(peaks[of_feature[kind][features] == cluster], return_counts=True)
                at, count = at[at < len(tokens[span])], count[at < len(tokens[span])]
                if not len(at):
                    continue
                if span not in pieces:
                    pieces[span] = split(tokens[span])
                spans = found.setdefault(number, {}).setdefault((kind, cluster), {})
                spans[span] = (pieces[span], dict(zip(at.tolist(), count.tolist(), strict=True)))
    return found


def _placed(text: str, pieces: list[str], peaks: Mapping[int, int]) -> list[list[int]]:
    """Ranges of a text, from tokens. The tokens that were not read lie before or after those that were; nothing if they lie elsewhere."""
    begin = text.find(clean("".join(pieces)))
    if begin < 0:
        return []
    ends = begin + np.cumsum([len(piece) for piece in pieces])
    units = None
    if text and max(text) > "\uffff":
        units = np.concatenate([[0], np.cumsum([1 + (sign > "\uffff") for sign in text])])
    ranges = []
    for place, count in peaks.items():
        piece = pieces[place]
        start, end = int(ends[place]) - len(piece.lstrip() or piece), int(ends[place])  # without the space before a word
        if end > start:
            ranges.append([int(at if units is None else units[at]) for at in (start, end)] + [count])
    return ranges
