"""The harvest on disk: per pair and span, each SAE feature's maximum and frequency. Sparse, columnar, streamed.

A harvest is a folder. `harvest.json` says what was harvested; `shard-00000.parquet`, ... hold `shard_rows` consecutive pairs of the
(sampled) dataset each, the last one what is left. A shard appears under its name only when it is whole. Its columns:

| column | type | meaning |
| --- | --- | --- |
| `row` | int64 | row number in the source dataset; ascending through the whole harvest |
| `{span}_tokens` | int32 | tokens read in the span; BOS and a sequence's first token are not |
| `{span}_features` | list of int32 | the features that are active on at least one of them, ascending |
| `{span}_counts` | list of int32 | on how many tokens each is active |
| `{span}_max` | list of float32 | each one's largest activation |
| `{span}_peak` | list of int32 | the token where that is, as a place in `{span}_ids` |
| `{span}_ids` | list of int32 | the tokens read |
| `{span}_text` | string | the span as text |

for each `span` of `prompt`, `chosen` and `rejected`. Within a shard the lists are delta-coded (features) or split by bytes (counts, max, peak),
and compressed: about 6 bytes an active feature, of which 3.3 are the maximum's. Their entries are declared as never null, which spares a
third of the time of reading them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ...files import replacing


COMPLETIONS = ("chosen", "rejected")
SPANS = ("prompt", *COMPLETIONS)

MANIFEST = "harvest.json"
FORMAT = 1


def n_shards(n_rows: int, shard_rows: int) -> int:
    """Number of shards that hold `n_rows` pairs."""
    return -(-n_rows // shard_rows)


def shard_path(folder: str | os.PathLike[str], index: int) -> Path:
    """A shard's file."""
    return Path(folder) / f"shard-{index:05d}.parquet"


def missing_shards(folder: str | os.PathLike[str], count: int) -> list[int]:
    """The numbers of those of `count` shards that are not there yet."""
    return [index for index in range(count) if not shard_path(folder, index).is_file()]


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What `harvest.json` of a folder says, whether the harvest is finished or not.

    Raises:
        FileNotFoundError: If the folder holds no harvest.
        ValueError: If it is damaged, or another version of shapedpo wrote it in another format.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no harvest in '{folder}': it has no {MANIFEST}. `shapedpo audit` makes one, in the folder of its --out."
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{path}' is damaged: {error}. Delete '{folder}', and harvest anew.") from error
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"The harvest in '{folder}' has format {manifest.get('format')!r}; this version of shapedpo reads {FORMAT}. Harvest anew."
        )
    return manifest


class Active(NamedTuple):
    """The active features of n spans, as they are written: row after row, features ascending within a row.

    Attributes:
        indptr: `(n + 1,)` int32, where each row's entries begin.
        features: `(E,)` int32.
        counts: `(E,)` int32, tokens on which each is active, 1 or more.
        max: `(E,)` float32.
        peak: `(E,)` int32, counted from 0.
        tokens: `(n,)` int32.
    """

    indptr: np.ndarray
    features: np.ndarray
    counts: np.ndarray
    max: np.ndarray
    peak: np.ndarray
    tokens: np.ndarray


def write_manifest(
    folder: str | os.PathLike[str],
    *,
    d_sae: int,
    n_rows: int,
    shard_rows: int,
    settings: Mapping[str, Any],
    **more: Any,
) -> None:
    """Say what a harvest is going to be, before its first shard.

    Args:
        folder: Its folder; made if it is not there.
        d_sae: Number of features of the SAE.
        n_rows: Number of pairs.
        shard_rows: Number of pairs in a shard.
        settings: What it is made with, as plain data.
        **more: Anything else to keep, as plain data.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    manifest = {
        "format": FORMAT,
        "d_sae": d_sae,
        "n_rows": n_rows,
        "shard_rows": shard_rows,
        "settings": settings,
        **more,
    }
    with replacing(folder / MANIFEST) as temporary:
        temporary.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def write_shard(
    folder: str | os.PathLike[str],
    index: int,
    rows: np.ndarray,
    spans: Mapping[str, Active],
    ids: Mapping[str, Sequence[Sequence[int]]],
    texts: Mapping[str, Sequence[str]],
) -> None:
    """Write a shard, whole or not at all.

    Args:
        folder: The harvest's folder.
        index: The shard's number.
        rows: `(n,)` row numbers in the source dataset, ascending.
        spans: The active features of each span.
        ids: The tokens that were read of each span.
        texts: The text of each span.
    """
    columns: dict[str, Any] = {"row": pa.array(rows, pa.int64())}
    encodings = {}
    for name in SPANS:
        span = spans[name]
        columns[f"{name}_tokens"] = pa.array(span.tokens, pa.int32())
        offsets = pa.array(span.indptr, pa.int32())
        for part, kind, encoding in (
            ("features", pa.int32(), "DELTA_BINARY_PACKED"),
            ("counts", pa.int32(), "BYTE_STREAM_SPLIT"),
            ("max", pa.float32(), "BYTE_STREAM_SPLIT"),
            ("peak", pa.int32(), "BYTE_STREAM_SPLIT"),
        ):
            values = pa.array(getattr(span, part), kind)
            lists = pa.list_(pa.field("element", kind, nullable=False))
            columns[f"{name}_{part}"] = pa.ListArray.from_arrays(offsets, values, type=lists)
            encodings[f"{name}_{part}.list.element"] = encoding
        columns[f"{name}_ids"] = pa.array(ids[name], pa.list_(pa.int32()))
        columns[f"{name}_text"] = pa.array(texts[name], pa.string())
    table = pa.Table.from_arrays(
        list(columns.values()), schema=pa.schema([pa.field(n, c.type, nullable=False) for n, c in columns.items()])
    )
    with replacing(shard_path(folder, index)) as temporary:
        pq.write_table(table, temporary, compression="zstd", use_dictionary=False, column_encoding=encodings)
