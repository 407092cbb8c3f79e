"""A dataset without some rows, with less weight on them, or with a flag: a new one, the source is never touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset, Value
from numpy.typing import NDArray

from ...files import replacing
from ..harvesting.layout import separate
from ..harvesting.pairs import Pairs
from ..harvesting.shards import SPANS
from ..harvesting.store import Harvest


HOW = ("drop", "weight", "flag")
WRITERS = {".parquet": "to_parquet", ".jsonl": "to_json"}

COMPARED = 64
"""Rows that are compared with what the audit read."""


def changed(
    dataset: Dataset | IterableDataset, rows: Mapping[str, NDArray[np.int64]], how: str, weight: float = 0.1
) -> Dataset:
    """A dataset with something done about some rows.

    Args:
        dataset: The data that was audited.
        rows: Row numbers of each finding, by a name.
        how: `drop` leaves the rows out; `weight` gives each row a `weight`, which scales its pair's loss in training (what is there already
            is multiplied); `flag` adds a column of booleans for each finding, by its name.
        weight: That of the rows, for `weight`; the others have 1.

    Raises:
        ValueError: If a row is not there, none would be left, a flag's column is there already, or `how`, `weight` or the weights that are
            there do not fit.
    """
    if how not in HOW:
        raise ValueError(f"Unknown way {how!r} to fix rows. Choose one of {', '.join(HOW)}.")
    if isinstance(dataset, IterableDataset):
        dataset = Dataset.from_list(list(dataset), features=dataset.features)
    n = len(dataset)
    marks = {name: _marks(numbers, n) for name, numbers in rows.items()}
    any_of = np.any(list(marks.values()), axis=0)
    if how == "drop":
        if any_of.all():
            raise ValueError(
                f"All {n} rows would be dropped. Give them a weight, or shape what they teach with a recipe."
            )
        return dataset.select(np.flatnonzero(~any_of))
    if how == "flag":
        if there := [name for name in marks if name in dataset.column_names]:
            raise ValueError(f"The dataset has a column {there[0]!r} already.")
        for name, mark in marks.items():
            dataset = dataset.add_column(name, mark.tolist(), feature=Value("bool"))
        return dataset
    if not weight >= 0:
        raise ValueError(f"`weight` must be 0 or more, got {weight!r}.")
    weights = np.where(any_of, weight, 1.0)
    if "weight" in dataset.column_names:
        weights = weights * np.asarray(dataset["weight"], np.float64)
        if not np.isfinite(weights).all():
            place = int(np.flatnonzero(~np.isfinite(weights))[0])
            raise ValueError(
                f"Row {place} of the dataset has the `weight` {dataset[place]['weight']}. Expected a number."
            )
        dataset = dataset.remove_columns("weight")
    return dataset.add_column("weight", weights.tolist(), feature=Value("float64"))


def _marks(rows: NDArray[np.int64], n: int) -> NDArray[np.bool_]:
    if len(rows) and (rows.min() < 0 or rows.max() >= n):
        raise ValueError(
            f"The audit names row {rows.max()}, but the dataset has {n} rows. It is not the one that was audited."
        )
    marks = np.zeros(n, bool)
    marks[rows] = True
    return marks


def check_audited(dataset: Dataset, harvest: Harvest, rows: NDArray[np.int64], tokenizer: Any) -> None:
    """Compare some rows of a dataset with what the audit read, token by token: in a file that has changed, numbers stand for other rows.

    Args:
        dataset: The data as they are now.
        harvest: The audit's.
        rows: Row numbers of the findings, at most [`COMPARED`] of which are looked at.
        tokenizer: The model's.

    Raises:
        ValueError: If a row is another one now.
    """
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, min(COMPARED, len(rows))).astype(int))]
    lengths = {name: harvest.settings[name] for name in ("max_length", "truncation_mode")}
    pairs = Pairs(dataset.select(rows), tokenizer, **lengths)
    _, slot, ids, _ = separate(pairs.collated(range(len(pairs))), None, pairs.tokens)
    now = {
        int(row): {span: ids[slot == 3 * pair + number].tolist() for number, span in enumerate(SPANS)}
        for pair, row in enumerate(rows[pairs.rows])
    }
    for row, then in zip(rows.tolist(), harvest.ids(rows), strict=True):
        if now.get(row) != then:
            raise ValueError(
                f"Row {row} of the dataset is not the one that was audited: the data have changed since. Audit them again, or bring back "
                "what was audited."
            )


def check_target(path: str | Path, suffixes: Sequence[str] = tuple(WRITERS)) -> Path:
    """A file to be written: its suffix is known and it is not there yet.

    Raises:
        ValueError: If it is, or the suffix is not.
    """
    path = Path(path)
    if path.suffix not in suffixes:
        raise ValueError(f"'{path}' must end in {' or '.join(suffixes)}.")
    if path.exists():
        raise ValueError(f"'{path}' is there already, and is not overwritten. Choose another name.")
    return path


def write(dataset: Dataset, path: str | Path) -> None:
    """Write a dataset as `.parquet` or `.jsonl`, whole or not at all.

    Raises:
        ValueError: If the file is there already, or ends otherwise.
    """
    path = check_target(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        save: Any = getattr(dataset, WRITERS[path.suffix])
        save(partial)
