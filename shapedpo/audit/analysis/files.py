"""The files of an analysis: JSON, and tables with lines of several things, each one's together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...files import replacing


def numbered(parts: Sequence[NDArray[Any]]) -> NDArray[np.int32]:
    lengths = [len(part) for part in parts]
    return np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)


def parts(path: Path, n: int) -> list[list[NDArray[Any]]]:
    """The other columns of a table whose first numbers its parts, of each of `n` parts."""
    import pyarrow.parquet as pq

    of, *columns = (column.to_numpy() for column in pq.ParquetFile(path).read().columns)
    ends = np.searchsorted(of, np.arange(n + 1))
    return [[column[start:end] for column in columns] for start, end in pairwise(ends)]


def joined(parts: Sequence[NDArray[Any]], dtype: Any) -> NDArray[Any]:
    return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)


def write_json(path: Path, data: Any) -> None:
    with replacing(path) as partial:
        partial.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def write_table(path: Path, columns: dict[str, Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with replacing(path) as partial:
        pq.write_table(pa.table(columns), partial, compression="zstd")
