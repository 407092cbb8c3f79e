"""Made-up harvests of realistic size and sparsity, for measuring what is done with a harvest without making one.

What is realistic, and why:

* **65,536 features of which 128 are active on a token**, the SAE of Bergen et al. (arXiv 2606.12360).
* **A feature that is active in a span of T tokens is so on 0.43 sqrt(T) of them** on average, so that a span shows about 300 sqrt(T) features
  (3,300 at 120 tokens). On the harvest of 1,941 real pairs (HH, harmless) with a 512-feature SAE it was 1.5 tokens in spans of 14, 2.5 in
  56 and 6.2 in 220; this rule gives 1.6, 3.2 and 6.4. A larger SAE has rarer features, a larger model burstier ones.
* **Densities of features are log-normal**, with a standard deviation of 1.77 in nats, which is what that harvest has.
* **Lengths are log-normal**: completions around 120 tokens, prompts around 80. HH's completions have a median of 59 and a mean of 83, those
  of newer datasets are longer.
* **Six features in ten fire in groups** of 16, each group in the texts of some topics more than in others, so that there are clusters to
  find; the rest fire by themselves. A row's chosen and rejected completions share half of what they draw.
* **Lessons are planted**: on the rows of a topic, most chosen completions show a group that the rejected ones do not.
* **Texts** are random tokens of the lab's tokenizer, as many as were read.

Only the first 8,192 rows are drawn afresh, which is slow. The rest repeat them, each time without another 15 % of their entries.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from shapedpo import lab
from shapedpo.audit.harvesting.shards import (
    MANIFEST,
    SPANS,
    Active,
    missing_shards,
    n_shards,
    read_manifest,
    write_manifest,
    write_shard,
)
from shapedpo.audit.harvesting.store import VALUES, Harvest


ACTIVE, BURST = 128, 0.43  # features active on a token; tokens of an active feature over the square root of the span's
GROUP, GROUPED = 16, 0.6  # features of a group, share of all features that are in one
FRESH, KEPT = 8192, 0.85  # rows drawn afresh; what a repetition keeps
LENGTHS = {
    "prompt": (80, 0.7),
    "chosen": (120, 0.6),
    "rejected": (120, 0.6),
}  # median, standard deviation of the logarithm


@dataclass(frozen=True)
class Synthetic:
    """A made-up harvest.

    Args:
        n_rows: Number of pairs.
        d_sae: Number of features.
        topics: Number of topics, by Zipf's law.
        lessons: Number of planted lessons, each on the rows of one topic.
        shard_rows: Pairs in a file.
        seed: Of everything.
    """

    n_rows: int
    d_sae: int = 65_536
    topics: int = 400
    lessons: int = 10
    shard_rows: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        draw = np.random.default_rng(self.seed)
        shuffled = draw.permutation(self.d_sae)
        n_groups = int(self.d_sae * GROUPED) // GROUP
        set_ = object.__setattr__
        set_(self, "groups", shuffled[: n_groups * GROUP].reshape(n_groups, GROUP))
        set_(self, "loners", shuffled[n_groups * GROUP :])
        set_(self, "loner_chance", _cumulative(draw.lognormal(0, 1.77, len(self.loners))))
        set_(self, "group_chance", _cumulative(draw.lognormal(0, 1.77, n_groups)))
        set_(self, "topic_groups", draw.integers(n_groups, size=(self.topics, 60)))
        set_(self, "topic_chance", _cumulative(1 / np.arange(3, self.topics + 3)))
        set_(self, "lesson_topics", draw.choice(self.topics, self.lessons, replace=False))
        set_(self, "lesson_groups", draw.choice(n_groups, self.lessons, replace=False))

    def write(self, folder: Path) -> Harvest:
        """Write the shards that are not there yet."""
        settings = {"synthetic": {name: getattr(self, name) for name in ("topics", "lessons", "seed")}}
        if not (folder / MANIFEST).exists():
            write_manifest(folder, d_sae=self.d_sae, n_rows=self.n_rows, shard_rows=self.shard_rows, settings=settings)
        for index in missing_shards(folder, n_shards(self.n_rows, self.shard_rows)):
            fresh = FRESH // self.shard_rows
            spans = self._fresh(index) if index < fresh else self._thinned(folder, index, index % fresh)
            rows = self._rows(index)
            ids = {span: self._ids(index, number, spans[span].tokens) for number, span in enumerate(SPANS)}
            write_shard(folder, index, rows, spans, ids, {span: _split().batch_decode(ids[span]) for span in SPANS})
        return Harvest.open(folder)

    def _rows(self, index: int) -> np.ndarray:
        return np.arange(index * self.shard_rows, min(self.n_rows, (index + 1) * self.shard_rows))

    def _ids(self, index: int, span: int, tokens: np.ndarray) -> list[list[int]]:
        draw = np.random.default_rng([self.seed, index, span])
        ids = draw.choice(_whole_tokens(), tokens.sum())
        return [part.tolist() for part in np.split(ids, tokens.cumsum()[:-1])]

    def _thinned(self, folder: Path, index: int, source: int) -> dict[str, Active]:
        draw, n = np.random.default_rng([self.seed, index]), len(self._rows(index))
        (shard,) = Harvest(folder, read_manifest(folder)).shards(VALUES, indices=[source])
        spans = {}
        for span in SPANS:
            part = getattr(shard, span)
            indptr = part.max.indptr[: n + 1]
            kept = np.flatnonzero(draw.random(indptr[-1], dtype=np.float32) < KEPT)
            counts = part.freq.data * np.repeat(part.tokens, np.diff(part.max.indptr))
            spans[span] = Active(
                indptr=np.searchsorted(kept, indptr).astype(np.int32),
                features=part.max.indices[kept],
                counts=np.rint(counts[kept]).astype(np.int32),
                max=part.max.data[kept],
                peak=part.peak.data[kept].astype(np.int32) - 1,
                tokens=part.tokens[:n],
            )
        return spans

    def _fresh(self, index: int) -> dict[str, Active]:
        draw, rows = np.random.default_rng([self.seed, index]), self._rows(index)
        n = len(rows)
        topic = np.searchsorted(self.topic_chance, draw.random(n))
        lesson = np.full(self.topics, -1)
        lesson[self.lesson_topics] = np.arange(self.lessons)
        seeds = draw.integers(2**32, size=2)  # the second makes what the two completions share
        typical = np.full(n, LENGTHS["chosen"][0])
        spans = {}
        for number, span in enumerate(SPANS):
            median, spread = LENGTHS[span]
            tokens = np.clip(draw.lognormal(np.log(median), spread, n), 3, 1000).astype(np.int32)
            own = np.random.default_rng([int(seeds[0]), number])
            common = np.random.default_rng([int(seeds[1]), min(number, 1)])
            keys = [self._drawn(own, topic, tokens, 0.5), self._drawn(common, topic, typical, 0.5)]
            taught = np.flatnonzero((lesson[topic] >= 0) & (own.random(n) < 0.8))
            if span == "chosen" and len(taught):
                groups = self.groups[self.lesson_groups[lesson[topic[taught]]]]
                keys.append((taught[:, None] * self.d_sae + groups).ravel())
            spans[span] = self._active(draw, np.concatenate(keys), tokens)
        return spans

    def _drawn(self, draw: np.random.Generator, topic: np.ndarray, tokens: np.ndarray, share: float) -> np.ndarray:
        """`row x d_sae + feature` of what is active, with repetitions: a share of what a span of that many tokens shows."""
        wanted = share * ACTIVE / BURST * np.sqrt(tokens)
        loners = np.repeat(
            np.arange(len(tokens)), draw.poisson((1 - GROUPED) * wanted * 1.25)
        )  # a quarter are repetitions
        feature = self.loners[np.searchsorted(self.loner_chance, draw.random(len(loners)))]
        # A row's groups: half are its topic's.
        row = np.repeat(np.arange(len(tokens)), draw.poisson(GROUPED * wanted * 1.4 / (0.7 * GROUP)))
        group = np.searchsorted(self.group_chance, draw.random(len(row)))
        of_topic = draw.random(len(row)) < 0.5
        place = draw.integers(60, size=len(row))
        group = np.where(of_topic, self.topic_groups[topic[row], place], group)
        shown = draw.random((len(row), GROUP), dtype=np.float32) < 0.7
        grouped = (row[:, None] * self.d_sae + self.groups[group])[shown]
        return np.concatenate([loners * self.d_sae + feature, grouped])

    def _active(self, draw: np.random.Generator, keys: np.ndarray, tokens: np.ndarray) -> Active:
        keys = np.sort(keys)  # `np.unique` hashes, which takes six times as long here
        keys = keys[np.flatnonzero(np.diff(keys, prepend=-1))]
        row, feature = np.divmod(keys, self.d_sae)
        length = tokens[row]
        counts = np.minimum(draw.geometric(1 / np.maximum(BURST * np.sqrt(length), 1)), length)
        return Active(
            indptr=np.searchsorted(row, np.arange(len(tokens) + 1)).astype(np.int32),
            features=feature.astype(np.int32),
            counts=counts.astype(np.int32),
            max=draw.gamma(2, 1.5, len(keys)).astype(np.float32),
            peak=(draw.random(len(keys)) * length).astype(np.int32),
            tokens=tokens,
        )


@functools.cache
def _split() -> Any:
    return AutoTokenizer.from_pretrained(lab.model_path())


@functools.cache
def _whole_tokens() -> list[int]:
    """The tokens that are whole characters."""
    every = range(max(_split().all_special_ids) + 1, len(_split()))
    return [token for token in every if "\N{REPLACEMENT CHARACTER}" not in _split().decode([token])]


def _cumulative(weights: np.ndarray) -> np.ndarray:
    total = weights.cumsum()
    return total / total[-1]
