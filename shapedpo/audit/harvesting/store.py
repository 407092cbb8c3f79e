"""A harvest, read from its files ([`shards`]): sparse matrices of one shard at a time, texts and tokens of some rows."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.sparse import csr_matrix

from .shards import SPANS, missing_shards, n_shards, read_manifest, shard_path


VALUES = ("max", "freq", "peak")
"""What can be read of a span: `peak` is the place of the maximum among the span's tokens."""


class Span(NamedTuple):
    """One span of n rows. What was not asked for is `None`.

    The matrices are scipy CSR, `(n, d_sae)` float32, with the same sparsity: they share `indices` and `indptr`, and
    may be read-only: do not change them in place. Indices are sorted. A feature is stored where it is active on at least one token.

    Attributes:
        max: Largest activation.
        freq: Fraction of the span's tokens with activation > 0.
        tokens: `(n,)` int32, tokens in the span; 0 where it is empty.
        peak: The token of the largest activation, counted from 1 within the span, so that 0 stays "nowhere".
    """

    max: Any
    freq: Any
    tokens: np.ndarray
    peak: Any = None


class Shard(NamedTuple):
    """Some consecutive rows of the (sampled) dataset.

    Attributes:
        rows: `(n,)` int64, row numbers in the source dataset.
    """

    rows: np.ndarray
    prompt: Span
    chosen: Span
    rejected: Span


class Harvest:
    """A finished harvest, opened for reading. See [`Harvest.open`].

    Attributes:
        folder: Where it is.
        settings: What it was made with: model, SAE, dataset and the rest, as plain data.
        d_sae: Number of features of the SAE.
        n_rows: Number of pairs.
        shard_rows: Number of pairs in a shard; the last one may have fewer.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder = folder
        self.settings: dict[str, Any] = manifest["settings"]
        self.d_sae: int = manifest["d_sae"]
        self.n_rows: int = manifest["n_rows"]
        self.shard_rows: int = manifest["shard_rows"]
        self._rows: np.ndarray | None = None

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Harvest:
        """Open a finished harvest.

        Raises:
            FileNotFoundError: If the folder holds none, or one that is not finished.
            ValueError: If another version of shapedpo wrote it in another format.
        """
        folder = Path(folder)
        harvest = cls(folder, read_manifest(folder))
        if missing := missing_shards(folder, harvest.n_shards):
            raise FileNotFoundError(
                f"The harvest in '{folder}' is not finished: {len(missing)} of {harvest.n_shards} shards are missing, the first "
                f"is {shard_path(folder, missing[0]).name}. Run the same audit again: it goes on where it was."
            )
        return harvest

    @property
    def n_shards(self) -> int:
        return n_shards(self.n_rows, self.shard_rows)

    @property
    def rows(self) -> np.ndarray:
        """`(n_rows,)` int64, the source's row number of each pair, ascending."""
        if self._rows is None:
            parts = [_read(self.folder, index, ["row"])["row"].to_numpy() for index in range(self.n_shards)]
            self._rows = np.concatenate(parts) if parts else np.zeros(0, np.int64)
        return self._rows

    def shards(
        self,
        columns: Collection[str] | None = None,
        spans: Collection[str] = SPANS,
        indices: Sequence[int] | None = None,
    ) -> Iterator[Shard]:
        """The shards, one after the other; only one is in memory.

        Args:
            columns: Which of `max`, `freq` and `peak` to read (`max` and `freq` by default). The number of tokens is always there.
            spans: Which spans to read the matrices of; those of the others are `None`.
            indices: Which shards, by number; all by default.

        Raises:
            ValueError: If a column or span is unknown.
        """
        columns = ("max", "freq") if columns is None else columns
        _check_known("column", columns, VALUES)
        _check_known("span", spans, SPANS)
        stored = {"max": "max", "freq": "counts", "peak": "peak"}
        names = ["row", *(f"{span}_tokens" for span in SPANS)]
        if columns:
            names += [f"{span}_{part}" for span in spans for part in ("features", *(stored[name] for name in columns))]
        for index in range(self.n_shards) if indices is None else indices:
            table = _read(self.folder, index, names)
            parts = {span: self._span(table, span, columns if span in spans else ()) for span in SPANS}
            yield Shard(table["row"].to_numpy(), **parts)

    def texts(self, rows: Sequence[int] | np.ndarray) -> list[dict[str, str]]:
        """The texts of some rows: `prompt`, `chosen` and `rejected` of each.

        Args:
            rows: Row numbers in the source dataset, in any order.

        Raises:
            KeyError: If a row is not in the harvest.
        """
        return [{span: row[f"{span}_text"] for span in SPANS} for row in self._fetch(rows, "text")]

    def ids(self, rows: Sequence[int] | np.ndarray) -> list[dict[str, list[int]]]:
        """The tokens that were read in some rows: see [`Harvest.texts`]."""
        return [{span: row[f"{span}_ids"] for span in SPANS} for row in self._fetch(rows, "ids")]

    def _fetch(self, rows: Sequence[int] | np.ndarray, part: str) -> list[dict[str, Any]]:
        wanted = np.asarray(rows, dtype=np.int64)
        places = np.searchsorted(self.rows, wanted)
        found = places < self.n_rows
        found[found] = self.rows[places[found]] == wanted[found]
        if not found.all():
            raise KeyError(f"Row {wanted[~found][0]} of the dataset is not in the harvest in '{self.folder}'.")
        names = [f"{span}_{part}" for span in SPANS]
        result: list[dict[str, Any]] = [{}] * len(wanted)
        shards, within = np.divmod(places, self.shard_rows)
        for index in np.unique(shards):
            chosen = np.flatnonzero(shards == index)
            table = _read(self.folder, int(index), names).take(within[chosen])
            for place, row in zip(chosen, table.to_pylist(), strict=True):
                result[place] = row
        return result

    def _span(self, table: pa.Table, span: str, columns: Collection[str]) -> Span:
        tokens = table[f"{span}_tokens"].to_numpy()
        if not columns:
            return Span(None, None, tokens)
        indptr, indices = _lists(table[f"{span}_features"])
        shape = (len(tokens), self.d_sae)

        def matrix(values: np.ndarray) -> Any:
            result = csr_matrix((values, indices, indptr), shape=shape, copy=False)
            result.has_sorted_indices = result.has_canonical_format = True
            return result

        largest = freq = peak = None
        if "max" in columns:
            largest = matrix(_lists(table[f"{span}_max"])[1])
        if "freq" in columns:
            lengths = np.repeat(tokens.astype(np.float32), np.diff(indptr))
            freq = matrix(_lists(table[f"{span}_counts"])[1].astype(np.float32) / lengths)
        if "peak" in columns:
            peak = matrix(_lists(table[f"{span}_peak"])[1].astype(np.float32) + 1)
        return Span(largest, freq, tokens, peak)


def _read(folder: Path, index: int, columns: list[str]) -> pa.Table:
    path = shard_path(folder, index)
    try:  # one file, not a dataset: pyarrow would look for a schema in the names of the folders above
        return pq.ParquetFile(path).read(columns=columns).combine_chunks()
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(
            f"'{path}' is damaged: {error}. Delete it, and run the same audit again: it reads these pairs anew."
        ) from error


def _lists(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and values of a column of lists."""
    if column.num_chunks == 0:
        return np.zeros(1, np.int32), np.zeros(0, np.int32)
    (chunk,) = column.chunks
    return chunk.offsets.to_numpy(), chunk.values.to_numpy()


def _check_known(what: str, names: Collection[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"Unknown {what} {name!r}. Choose from {', '.join(known)}.")
