"""Harvests of made-up pairs with known structure, written to the real store."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import sparse

from shapedpo.audit.harvesting.shards import SPANS, Active, write_manifest, write_shard
from shapedpo.audit.harvesting.store import Harvest


TOKENS = 40
GROUP = 12  # features that fire together


@dataclass(frozen=True)
class Planted:
    """In a share of a topic's rows (or of all) the chosen completion shows a group of features and the rejected one does not."""

    group: int
    topic: int | None = None
    rate: float = 1.0
    chosen: bool = True


@dataclass(frozen=True)
class World:
    """`n` pairs on `topics`, each with features of its own in prompt and completions; beside them `groups` of response
    features, each of which a completion shows with probability `base`, whichever its side."""

    n: int
    topics: int = 8
    groups: int = 12
    base: float = 0.15
    loners: int = 60  # features that fire at random
    lessons: tuple[Planted, ...] = ()
    seed: int = 0

    @property
    def d_sae(self) -> int:
        return 2 * self.topics * GROUP + self.groups * GROUP + self.loners

    def topic_of_rows(self) -> np.ndarray:
        return np.random.default_rng([self.seed, 1]).integers(self.topics, size=self.n)

    def prompt_features(self, topic: int) -> np.ndarray:
        return np.arange(topic * GROUP, (topic + 1) * GROUP)

    def group_features(self, group: int) -> np.ndarray:
        return self.prompt_features(2 * self.topics + group)

    def planted_rows(self, lesson: Planted) -> np.ndarray:
        draw = np.random.default_rng([self.seed, 2, lesson.group])
        rows = draw.random(self.n) < lesson.rate
        return np.flatnonzero(rows if lesson.topic is None else rows & (self.topic_of_rows() == lesson.topic))

    def counts(self) -> dict[str, np.ndarray]:
        """`(n, d_sae)` of each span: on how many of its tokens each feature is active."""
        draw = np.random.default_rng([self.seed, 3])
        topic = self.topic_of_rows()
        shown = {span: np.zeros((self.n, 2 * self.topics + self.groups), bool) for span in SPANS}
        shown["prompt"][np.arange(self.n), topic] = True
        for side in ("chosen", "rejected"):
            shown[side][np.arange(self.n), self.topics + topic] = True
            shown[side][:, 2 * self.topics :] = draw.random((self.n, self.groups)) < self.base
        for lesson in self.lessons:
            rows, column = self.planted_rows(lesson), 2 * self.topics + lesson.group
            shown["chosen"][rows, column], shown["rejected"][rows, column] = lesson.chosen, not lesson.chosen
        result = {}
        for span, groups in shown.items():
            chance = np.full((self.n, self.d_sae), 0.01)
            chance[:, : groups.shape[1] * GROUP] += np.repeat(groups, GROUP, axis=1) * 0.75
            if span != "prompt":
                chance[:, -self.loners :] = 0.3
            fires = draw.random(chance.shape) < chance
            result[span] = np.where(fires, np.minimum(1 + draw.poisson(3, chance.shape), TOKENS), 0)
        return result

    def harvest(self, folder: Path, shard_rows: int = 512) -> Harvest:
        return write_harvest(folder, self.counts(), shard_rows)


def write_harvest(folder: Path, counts: dict[str, np.ndarray], shard_rows: int = 512) -> Harvest:
    """Writes counts of active tokens, `(n, d_sae)` of each span, as a harvest of spans of 40 tokens."""
    n, d_sae = counts["prompt"].shape
    write_manifest(folder, d_sae=d_sae, n_rows=n, shard_rows=shard_rows, settings={})
    for index, start in enumerate(range(0, n, shard_rows)):
        rows = np.arange(start, min(n, start + shard_rows))
        spans = {}
        for span in SPANS:
            part = sparse.csr_matrix(counts[span][rows].astype(np.int32))
            spans[span] = Active(
                part.indptr,
                part.indices,
                part.data,
                part.data.astype(np.float32),
                np.zeros(part.nnz, np.int32),
                np.full(len(rows), TOKENS, np.int32),
            )
        texts = {span: [f"{span} {row}" for row in rows] for span in SPANS}
        write_shard(folder, index, rows, spans, {span: [[]] * len(rows) for span in SPANS}, texts)
    return Harvest.open(folder)
