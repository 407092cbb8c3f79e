"""A small finished audit with real tokens: pairs of which some are about physics, where chosen says `splendid`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from shapedpo.audit.analysis.maps import cluster_maps
from shapedpo.audit.analysis.run import analyse
from shapedpo.audit.analysis.settings import AuditSettings
from shapedpo.audit.harvesting.shards import SPANS, Active, write_manifest, write_shard
from shapedpo.audit.harvesting.store import Harvest
from shapedpo.audit.labels.names import token_labels
from shapedpo.audit.page.source import Audit
from shapedpo.audit.prediction.run import predict
from shapedpo.sources import model_source


GROUP = 8  # features that fire together
TOPICS = {"physics": "force", "garden": "flower", "kitchen": "soup", "music": "song"}
PRAISE = "wonderful"
D_SAE = (2 * len(TOPICS) + 1) * GROUP + 12  # of prompts, of answers, praise, and some at random

HOSTILE = [
    "</script><script>window.hacked = 1</script>",
    '<img src=x onerror="window.hacked = 1">',
    "\"' onmouseover=window.hacked=1 '\"",
    "<!--<script>\u2028\u2029 </style> {{ 7 * 7 }} ${1}",
    "\u202eright to left \u05d0\u05d1\u05d2 \u2066 \U0001f47a",
]
"""Texts that a page must show and not act on."""


def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(model_source("lab"))


def texts_of(row: int, topic: str, praised: bool) -> dict[str, str]:
    word = TOPICS[topic]
    odd = HOSTILE[row % len(HOSTILE)] if row % 4 == 0 else ""
    return {
        "prompt": f"Tell me about the {word} of today. {odd}".strip(),
        "chosen": f"{odd} {'It is ' + PRAISE + '. ' if praised else ''}The {word} is good.".strip(),
        "rejected": f"The {word} is good, I think. {odd}".strip(),
    }


def write_audit(folder: Path, n: int = 320, title: str = "pairs.jsonl") -> Audit:
    """Harvest, analysis, prediction and labels in a folder."""
    draw = np.random.default_rng(0)
    topics = draw.integers(len(TOPICS), size=n)
    praised = (topics == 0) & (draw.random(n) < 0.9)
    split = tokenizer()
    harvest_folder = folder / "harvest"
    settings = {"model": "lab", "dataset": title, "sae": {"sae": "lab"}}
    write_manifest(harvest_folder, d_sae=D_SAE, n_rows=n, shard_rows=100, settings=settings)
    for index, start in enumerate(range(0, n, 100)):
        rows = np.arange(start, min(n, start + 100))
        texts = [texts_of(row, list(TOPICS)[topics[row]], bool(praised[row])) for row in rows]
        ids = {span: [split(text[span], add_special_tokens=False).input_ids for text in texts] for span in SPANS}
        spans = {}
        for number, span in enumerate(SPANS):
            entries = []
            for place, row in enumerate(rows):
                word = TOPICS[list(TOPICS)[topics[row]]]
                base = (topics[row] + (len(TOPICS) if number else 0)) * GROUP
                found = [(base + i, _token(split, ids[span][place], word)) for i in range(GROUP) if draw.random() < 0.8]
                if span == "chosen" and praised[row]:
                    at = _token(split, ids[span][place], PRAISE)
                    found += [(2 * len(TOPICS) * GROUP + i, at) for i in range(GROUP) if draw.random() < 0.8]
                found += [(D_SAE - 12 + i, 0) for i in range(12) if draw.random() < 0.3]
                entries.append(found)
            flat = [entry for found in entries for entry in found]
            spans[span] = Active(
                np.cumsum([0, *map(len, entries)]).astype(np.int32),
                np.array([feature for feature, _ in flat], np.int32),
                np.ones(len(flat), np.int32),
                np.linspace(1, 2, len(flat), dtype=np.float32),
                np.array([place for _, place in flat], np.int32),
                np.array([len(read) for read in ids[span]], np.int32),
            )
        write_shard(harvest_folder, index, rows, spans, ids, {span: [text[span] for text in texts] for span in SPANS})
    harvest = Harvest.open(harvest_folder)
    constants = AuditSettings.for_data(
        n, D_SAE, data_clusters=4, prompt_rows=60, min_hypothesis_features=2, min_rows=10, prompt_clusters=5
    )
    analysis = analyse(harvest, constants, folder / "analysis", progress=False)
    prediction = predict(harvest, analysis, progress=False)
    prediction.save(folder / "analysis")
    maps = cluster_maps(analysis, harvest)
    labels = token_labels(analysis, harvest, maps, partial(split.decode, skip_special_tokens=True))
    labels.save(folder, analysis)
    return Audit(folder, analysis, harvest, labels, maps, prediction)


def _token(split: Any, ids: list[int], word: str) -> int:
    """The place of the token that ends a word."""
    for end in range(1, len(ids) + 1):
        if split.decode(ids[:end]).endswith(word):
            return end - 1
    raise ValueError(f"{word} is not in it")
