"""What to call features: the tokens of the harvested texts that excite them most."""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np

from .store import SPANS, Harvest


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
    wanted = np.unique(np.fromiter(features, np.int64))
    indices = np.unique(np.linspace(0, harvest.n_shards - 1, min(shards, harvest.n_shards)).astype(int))
    best: dict[int, list[tuple[float, int, str, int]]] = {int(feature): [] for feature in wanted}
    for shard in harvest.shards(("max", "peak"), indices=[int(index) for index in indices]):
        for span in SPANS:
            largest, peak = (getattr(getattr(shard, span), part)[:, wanted].tocsc() for part in ("max", "peak"))
            for column, feature in enumerate(wanted):
                part = slice(largest.indptr[column], largest.indptr[column + 1])
                top = np.argsort(-largest.data[part], kind="stable")[:completions]
                found = best[int(feature)]
                rows = shard.rows[largest.indices[part][top]]
                found += [
                    (-float(value), int(row), span, int(place) - 1)
                    for value, row, place in zip(largest.data[part][top], rows, peak.data[part][top], strict=True)
                ]
                best[int(feature)] = sorted(found)[:completions]
    rows = sorted({row for found in best.values() for _, row, _, _ in found})
    ids = dict(zip(rows, harvest.ids(rows), strict=True)) if rows else {}
    names = {}
    for feature, found in best.items():
        texts = (decode([ids[row][span][place]]).strip() for _, row, span, place in found)
        if name := ", ".join(list(dict.fromkeys(text for text in texts if text))[:tokens]):
            names[feature] = name
    return names
