"""Which rows leave the data set before training, with method `filter`, and the record of it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset, Value
from torch import Tensor
from trl.data_utils import extract_prompt

from .collator import ROW
from .concept import Concept
from .files import replacing
from .shapers import ConceptSignal, Filter


if TYPE_CHECKING:
    import pandas as pd

FILE_NAME = "filtered.json"
"""Name of the record in the output folder and in checkpoints."""


def filtering(concepts: Sequence[Concept]) -> list[int]:
    """The indices of the concepts with method `filter`."""
    return [index for index, concept in enumerate(concepts) if concept.shapes and isinstance(concept.shaper, Filter)]


def leaving_rows(
    concepts: Sequence[Concept], signals: Sequence[ConceptSignal], dataset: Dataset, fingerprint: str
) -> dict[str, Any]:
    """Find the rows that leave.

    Args:
        concepts: All concepts.
        signals: Their scores on all rows.
        dataset: The prepared training data, with row numbers.
        fingerprint: Of the readers and the filters.

    Returns:
        The record: `rows` before, `left` out, the `fingerprint`, and by name of the `concepts` the numbers of the rows that each
        asked to leave, as they were counted when the data was given to the trainer.

    Raises:
        ValueError: If an expression cannot be evaluated, or no row would stay.
    """
    numbers = np.asarray(dataset[ROW][:])
    gone = torch.zeros(len(dataset), dtype=torch.bool)
    rows = {}
    for index in filtering(concepts):
        found = _leaves(concepts[index], signals[index], _columns(concepts[index], dataset))
        rows[concepts[index].name] = numbers[found.numpy()].tolist()
        gone |= found
    if gone.all():
        raise ValueError(f"Method 'filter' would leave none of the {len(dataset)} pairs. Filter less.")
    return {"rows": len(dataset), "left": int(gone.sum()), "fingerprint": fingerprint, "concepts": rows}


def without_rows(dataset: Dataset, record: Mapping[str, Any]) -> Dataset:
    """The data set without the rows of a record."""
    gone = sorted({row for rows in record["concepts"].values() for row in rows})
    return dataset.select(np.flatnonzero(~np.isin(np.asarray(dataset[ROW][:]), gone)))


def check_filters(concepts: Sequence[Concept], dataset: Any) -> None:
    """Check that there are rows to filter, and that expressions can be evaluated on them.

    Args:
        concepts: All concepts.
        dataset: The training data as it was given, with row numbers.

    Raises:
        ValueError: If the data is a stream, or an expression fails on its first rows; the text names the concept.
    """
    for index in filtering(concepts):
        shaper = concepts[index].shaper
        assert isinstance(shaper, Filter)  # by filtering()
        if isinstance(dataset, IterableDataset):
            raise ValueError(
                f"Concept {concepts[index].name!r}: method 'filter' reads all rows before training, and a stream (IterableDataset) has no end. Use method 'mask', which leaves pairs "
                "out as they come, or a Dataset."
            )
        if shaper.expression is None or not isinstance(dataset, Dataset):  # of what is no data TRL says so
            continue
        head = dataset.select(range(min(2, len(dataset))))
        head = head if "prompt" in head.column_names else head.map(extract_prompt)  # as the trainer will
        nothing = ConceptSignal(torch.zeros(2 * len(head)), torch.zeros(len(head)), torch.ones(len(head)))
        _leaves(concepts[index], nothing, _columns(concepts[index], head))


def save_record(folder: str | os.PathLike[str], record: Mapping[str, Any]) -> None:
    """Write a record into a folder, whole or not at all."""
    path = Path(folder) / FILE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def load_record(folder: str | os.PathLike[str], rows: int, fingerprint: str) -> dict[str, Any] | None:
    """A checkpoint's record, or `None` if it has none or one of other data, readers or filters."""
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        return None
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record if (record["rows"], record["fingerprint"]) == (rows, fingerprint) else None


def _leaves(concept: Concept, signal: ConceptSignal, columns: pd.DataFrame) -> Tensor:
    assert isinstance(concept.shaper, Filter)  # by filtering()
    try:
        return concept.shaper.leaves(signal, concept.signed_strength, columns)
    except Exception as error:  # whatever pandas makes of an expression
        raise ValueError(
            f"Concept {concept.name!r}: method 'filter' cannot evaluate {concept.shaper.expression!r} on the data "
            f"({type(error).__name__}: {error}). It may name score_chosen, score_rejected, delta, gate and columns of the data set."
        ) from error


def _columns(concept: Concept, dataset: Dataset) -> pd.DataFrame:
    """The data set's plain columns that a concept's expression names."""
    assert isinstance(concept.shaper, Filter)  # by filtering()
    words = set(re.findall(r"\w+", concept.shaper.expression or ""))
    plain = [name for name, kind in dataset.features.items() if isinstance(kind, Value)]
    named = [name for name in plain if name in words or f"`{name}`" in (concept.shaper.expression or "")]
    return dataset.select_columns([ROW, *named]).with_format(None).to_pandas()
