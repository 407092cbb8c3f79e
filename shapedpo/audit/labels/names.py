"""What features and clusters are called: `labels.json` of an audit's folder, which page, summary and command line read.

```json
{
  "format": 1,
  "analysis": "0f3c...",
  "by": "",
  "features": {"412": "goblin, goblins, cave"},
  "clusters": {
    "feature": {"3": {"tokens": ["goblin", "cave"], "title": "", "description": "", "keywords": []}},
    "data": {}, "prompt": {}, "response": {}, "single": {}
  },
  "hypotheses": {"prompt:12:7": {"tokens": [], "title": "Praises pseudo-physics", "description": "...", "keywords": ["aura"]}}
}
```

Features are named by the tokens that excite them most and clusters by `tokens`, always; `title`, `description` and `keywords` are there
where `shapedpo label` asked a language model, whose name is in `by`. Kinds of clusters are those of `Analysis.clusters`, and `data` for the
data clusters; a hypothesis is `view:condition:response`. `analysis` is a hash of what the numbers stand for: labels of another analysis are
not used.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...files import replacing
from ..analysis.hypotheses import Analysis, Hypothesis
from ..analysis.maps import ClusterMap
from ..harvesting.shards import SPANS
from ..harvesting.store import Harvest


FILE_NAME = "labels.json"
FORMAT = 1
KINDS = ("feature", "data", "prompt", "response", "single")

_TEXTS = 100  # random rows that a cluster's words are compared with
_MOST = 6


@dataclass(frozen=True)
class Label:
    """What a cluster or a hypothesis is called.

    Attributes:
        tokens: A cluster's most telling words or tokens, from the data.
        title: A few words of a language model's; empty where none was asked.
        description: A sentence or two of its.
        keywords: Some words of its.
    """

    tokens: list[str] = field(default_factory=list)
    title: str = ""
    description: str = ""
    keywords: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The title, or the tokens."""
        return self.title or ", ".join(self.tokens)


@dataclass(frozen=True)
class Labels:
    """The labels of an audit. See the module for the file.

    Attributes:
        features: By number.
        clusters: By kind and number.
        hypotheses: By [`hypothesis_key`].
        by: The language model that wrote the titles, if any.
    """

    features: dict[int, str] = field(default_factory=dict)
    clusters: dict[str, dict[int, Label]] = field(default_factory=lambda: {kind: {} for kind in KINDS})
    hypotheses: dict[str, Label] = field(default_factory=dict)
    by: str = ""

    def cluster(self, kind: str, number: int) -> Label:
        """A cluster's label; an empty one where there is none."""
        return self.clusters.get(kind, {}).get(number, Label())

    def save(self, folder: str | os.PathLike[str], analysis: Analysis) -> Path:
        """Write `labels.json`."""
        path = Path(folder) / FILE_NAME
        content = {
            "format": FORMAT,
            "analysis": analysis_hash(analysis),
            "by": self.by,
            "features": self.features,
            "clusters": {
                kind: {number: asdict(label) for number, label in sorted(of.items())}
                for kind, of in self.clusters.items()
            },
            "hypotheses": {key: asdict(label) for key, label in self.hypotheses.items()},
        }
        with replacing(path) as partial:
            partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, folder: str | os.PathLike[str], analysis: Analysis) -> Labels | None:
        """Read `labels.json`; `None` where there is none, or one of another analysis.

        Raises:
            ValueError: If the file is not such a one.
        """
        path = Path(folder) / FILE_NAME
        if not path.is_file():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["format"] != FORMAT or found["analysis"] != analysis_hash(analysis):
                return None
            return cls(
                features={int(number): name for number, name in found["features"].items()},
                clusters={
                    kind: {int(number): Label(**label) for number, label in of.items()}
                    for kind, of in found["clusters"].items()
                },
                hypotheses={key: Label(**label) for key, label in found["hypotheses"].items()},
                by=found["by"],
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"'{path}' is no file of labels ({type(error).__name__}: {error}). Delete it; `shapedpo audit` writes it anew."
            ) from error


def cluster_name(cluster: tuple[str, int], analysis: Analysis, labels: Labels) -> str:
    """What a cluster is called, by its kind and number: its label, or else its features."""
    from ..summary import feature_names

    kind, number = cluster
    features = analysis.clusters.get(kind, [])
    named = feature_names(features[number], labels.features) if features else f"{kind} cluster {number}"
    return labels.cluster(kind, number).name or named


def hypothesis_key(hypothesis: Hypothesis) -> str:
    """What a hypothesis is found by in `labels.json`."""
    return f"{hypothesis.view}:{hypothesis.condition}:{hypothesis.response}"


def analysis_hash(analysis: Analysis) -> str:
    """Hash of what clusters and rows an analysis' numbers stand for."""
    digest = hashlib.sha256(json.dumps(analysis.clusters).encode())
    digest.update(np.ascontiguousarray(analysis.rows).tobytes())
    digest.update(np.ascontiguousarray(analysis.data_clusters).tobytes())
    return digest.hexdigest()[:16]


def token_labels(
    analysis: Analysis, harvest: Harvest, maps: Mapping[str, ClusterMap], decode: Callable[[list[int]], str]
) -> Labels:
    """Labels made of tokens and words, without a language model.

    A cluster's tokens are the words that the rows which show it best have more than others; where there are none, the tokens that its
    features have and those of other clusters have less.

    Args:
        analysis: The analysis.
        harvest: What it was made of.
        maps: Of [`cluster_maps`]: the rows that show each cluster.
        decode: Makes text of token ids: the tokenizer's `decode`.
    """
    from ..summary import Words

    every = {feature for groups in analysis.clusters.values() for group in groups for feature in group}
    names = exciting_tokens(harvest, every, decode)
    draw = np.random.default_rng(analysis.settings.seed)
    some = np.sort(draw.choice(analysis.rows, min(_TEXTS, len(analysis.rows)), replace=False))
    shown = {int(row) for of in maps.values() for rows in of.exemplars for row in rows} | set(some.tolist())
    rows = np.array(sorted(shown), np.int64)
    texts = harvest.texts(rows)
    words_of = {
        spans: Words([" ".join(text[span] for span in spans) for text in texts]) for spans in (_PROMPT, _ANSWERS)
    }
    clusters: dict[str, dict[int, Label]] = {}
    for kind, of in maps.items():
        tokens = cluster_tokens(analysis.clusters.get(kind, []), names)
        clusters[kind] = {}
        for number, exemplars in enumerate(of.exemplars):
            words: list[str] = []
            for spans in _WORDS[kind]:
                here, others = np.searchsorted(rows, exemplars), np.searchsorted(rows, some)
                words = words or words_of[spans].distinctive(here, others, most=_MOST)
            clusters[kind][number] = Label(words or (tokens[number] if tokens else []))
    return Labels(names, clusters)


_PROMPT, _ANSWERS = ("prompt",), ("chosen", "rejected")
_WORDS = {
    "prompt": (_PROMPT,),
    "data": (_PROMPT, _ANSWERS),
    "feature": (_ANSWERS,),
    "response": (_ANSWERS,),
    "single": (_ANSWERS,),
}
"""The spans that words of each kind of cluster are taken from: the second where the first has none."""


def cluster_tokens(groups: Sequence[Sequence[int]], names: Mapping[int, str], most: int = _MOST) -> list[list[str]]:
    """The tokens that tell each group of features from the others: named often in it, and in few others.

    Args:
        groups: The features of each.
        names: Of features, tokens with commas between.
        most: Number of tokens.
    """
    counts: list[Counter[str]] = []
    written: dict[str, str] = {}
    for features in groups:
        count: Counter[str] = Counter()
        for feature in features:
            for token in dict.fromkeys(names[feature].split(", ") if feature in names else ()):
                count[token.lower()] += 1
                written.setdefault(token.lower(), token)
        counts.append(count)
    having = Counter(token for count in counts for token in count)

    def telling(count: Counter[str], token: str) -> float:  # least first
        return -count[token] * math.log(1 + len(groups) / having[token])

    return [[written[token] for token in sorted(count, key=partial(telling, count))[:most]] for count in counts]


def exciting_tokens(
    harvest: Harvest,
    features: Collection[int],
    decode: Callable[[list[int]], str],
    *,
    completions: int = 8,
    tokens: int = 3,
    shards: int = 16,
) -> dict[int, str]:
    """Names features by the tokens on which they are largest.

    Args:
        harvest: The harvest.
        features: Which features.
        decode: Makes text of token ids: the tokenizer's `decode`.
        completions: Of how many spans the tokens are taken, those with the largest activations.
        tokens: How many distinct tokens make a name.
        shards: How many shards, evenly spread, are looked at.

    Returns:
        Names of those features that fire in these shards.
    """
    wanted = np.zeros(harvest.d_sae, bool)
    wanted[np.fromiter(features, np.int64, len(features))] = True
    indices = np.unique(np.linspace(0, harvest.n_shards - 1, min(shards, harvest.n_shards)).astype(int))
    best = np.zeros(0, _PEAK)
    least = np.zeros(harvest.d_sae, np.float32)  # of each feature's `completions` largest so far
    for shard in harvest.shards(("max", "peak"), indices=[int(index) for index in indices]):
        for number, span in enumerate(SPANS):
            largest, peak = getattr(shard, span).max, getattr(shard, span).peak
            more = np.flatnonzero(wanted[largest.indices] & (largest.data > least[largest.indices]))
            new = np.zeros(len(more), _PEAK)
            new["feature"], new["value"] = largest.indices[more], largest.data[more]
            new["row"] = shard.rows[np.searchsorted(largest.indptr, more, side="right") - 1]
            new["span"], new["place"] = number, peak.data[more] - 1
            best, least = _largest(np.concatenate([best, new]), completions, least)
    rows = np.unique(best["row"])
    ids = dict(zip(rows.tolist(), harvest.ids(rows), strict=True)) if len(rows) else {}
    text_of = cache(lambda token: decode([token]).strip())
    found: dict[int, list[str]] = {}
    for feature, row, number, place in best[["feature", "row", "span", "place"]].tolist():
        read = ids[row][SPANS[number]]
        text = text_of(read[place]) if place < len(read) else ""
        if text and text not in found.setdefault(feature, []):
            found[feature].append(text)
    return {feature: ", ".join(texts[:tokens]) for feature, texts in found.items() if texts}


_PEAK = np.dtype([("feature", "i4"), ("value", "f4"), ("row", "i8"), ("span", "i1"), ("place", "i4")])


def _largest(
    peaks: NDArray[np.void], most: int, least: NDArray[np.float32]
) -> tuple[NDArray[np.void], NDArray[np.float32]]:
    """The largest few of each feature in order, and the values that the next ones must be above."""
    peaks = peaks[np.lexsort((peaks["span"], peaks["row"], -peaks["value"], peaks["feature"]))]
    rank = np.arange(len(peaks)) - np.searchsorted(peaks["feature"], peaks["feature"])
    full = peaks[rank == most - 1]
    least[full["feature"]] = full["value"]
    return peaks[rank < most], least
