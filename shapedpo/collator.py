"""The collator around TRL's: it carries what shaping needs of a row, and scores texts, off the training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset, Value
from torch import Tensor

from .concept import Concept, Gate
from .inoculation import KEYS as INOCULATED
from .marks import MATCHED, WORDS
from .openings import REF_COLUMNS
from .prompts import ROW, TURN
from .readouts import Readout, TextReader


WEIGHT = "pair_weight"
GATES = "concept_gates"
TEXT = "concept_text"
PROMPT_TEXT = "concept_prompt_text"
CACHED = "concept_cached"
KEYS = (WEIGHT, GATES, TEXT, PROMPT_TEXT, CACHED)
"""What the collator may add to a batch, beside integers."""
INTEGERS = (ROW, MATCHED, WORDS, TURN)
"""What it may add as integers, beside inoculated sequences."""


class ConceptCollator:
    """Collates pairs as the collator it wraps, and adds their weights, gates, text scores and cached scores.

    The added tensors are float32 handed over as int32, since a trainer under DeepSpeed casts floating inputs to bf16 and that would
    round the scores: see [`unpack`].

    Args:
        inner: The collator to wrap. Gets rows as TRL makes them.
        tokenizer: Decodes completions for text readouts.
        text_readouts: The readouts to score; completions are scored as the batch holds them, truncated.
        prompt_text: Whether to score the prompts' texts too, for gates.
        weight_column: Column of pair weights, if any.
        gate_columns: Columns that gate concepts.
        further: What else is added to a batch: each gives tensors by key, from the rows and the batch so far.
    """

    def __init__(
        self,
        inner: Callable[[list[dict[str, Any]]], dict[str, Any]],
        tokenizer: Any,
        text_readouts: Sequence[Readout] = (),
        prompt_text: bool = False,
        weight_column: str | None = None,
        gate_columns: Sequence[str] = (),
        further: Sequence[Callable[[list[dict[str, Any]], dict[str, Any]], Mapping[str, Tensor]]] = (),
    ) -> None:
        self.inner = inner
        self.tokenizer = tokenizer
        self.text_readouts = list(text_readouts)
        self.prompt_text = prompt_text
        self.weight_column = weight_column
        self.gate_columns = list(gate_columns)
        self.further = list(further)
        self._readers: list[TextReader] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Readers may hold what cannot be pickled; a worker process loads its own.
        return {**self.__dict__, "_readers": None}

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        rows, cached = split_cached(examples)
        batch = self.inner([dict(row) for row in rows])  # it may take from them, as TRL's of images does
        # Evaluation data may lack the columns: it is neither weighted nor gated.
        if self.weight_column is not None and self.weight_column in examples[0]:
            batch[WEIGHT] = pack([[check_weight(example, self.weight_column)] for example in examples])
        if self.gate_columns and all(column in examples[0] for column in self.gate_columns):
            batch[GATES] = pack([[_gate(example, column) for column in self.gate_columns] for example in examples])
        if ROW in examples[0]:
            batch[ROW] = torch.tensor([example[ROW] for example in examples])
        for add in self.further:
            batch.update(add(examples, batch))
        if cached is not None:
            batch[CACHED] = cached
        elif self.text_readouts:
            completion = batch["completion_mask"].bool()
            batch[TEXT] = self._score(batch["input_ids"], completion)
            if self.prompt_text:
                pairs = len(examples)
                prompt = batch["attention_mask"].bool() & ~completion
                batch[PROMPT_TEXT] = self._score(batch["input_ids"][:pairs], prompt[:pairs])
        return batch

    def _score(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        if self._readers is None:
            self._readers = [
                reader for readout in self.text_readouts if isinstance(reader := readout.load(), TextReader)
            ]
        ids = [row[keep].tolist() for row, keep in zip(input_ids, mask, strict=True)]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return torch.stack([reader.score(texts) for reader in self._readers], dim=1).view(torch.int32)


def pack(rows: list[list[float]]) -> Tensor:
    """`(B, n)` float32, handed over as int32."""
    return torch.tensor(rows, dtype=torch.float32).view(torch.int32)


def unpack(packed: Tensor) -> Tensor:
    """Back to float32."""
    return packed.view(torch.float32)


def split_cached(examples: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], Tensor | None]:
    """Take cached scores out of precomputed rows.

    With `precompute_ref_log_probs`, TRL's column of a reference log-probability holds a list: that number, and behind it the row's
    scores.

    Returns:
        The rows with the bare log-probabilities, and the whole lists `(2B, 1 + n)` float32 as int32, or `None` if there are none.
    """
    if not isinstance(examples[0].get(REF_COLUMNS[0]), Sequence):
        return examples, None
    cached = [example[column] for column in REF_COLUMNS for example in examples]
    rows = [{**example, **{column: example[column][0] for column in REF_COLUMNS}} for example in examples]
    return rows, pack(cached)


def split_batch(inputs: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What the collator added to a batch, unpacked, and what TRL knows of it."""
    extras = {key: unpack(inputs[key]) for key in KEYS if key in inputs}
    extras |= {key: value for key, value in inputs.items() if key in INTEGERS or key.startswith(INOCULATED)}
    return extras, {key: value for key, value in inputs.items() if key not in extras}


def check_columns(concepts: Sequence[Concept], weight_column: str | None, dataset: Any) -> str | None:
    """Check the columns that weights and gates are taken from.

    Args:
        concepts: The concepts.
        weight_column: Column of pair weights. `"weight"`, the default, may be missing.
        dataset: The training data.

    Returns:
        The weight column, if the data has it.

    Raises:
        ValueError: If there are no rows, a column is missing, or holds what it cannot.
    """
    row = next(iter(dataset), None)
    if row is None:
        raise ValueError("`train_dataset` has no rows. Is it the right split, and did a filter leave anything?")
    for concept in concepts:
        column = concept.gate.column if isinstance(concept.gate, Gate) else None
        if column is not None:
            if column not in row:
                raise ValueError(
                    f"Concept {concept.name!r}: the dataset has no gate column {column!r}. Its columns are "
                    f"{', '.join(row)}."
                )
            try:
                for gate in _values(dataset, row, column):
                    check_gate({column: gate}, column)
            except ValueError as error:
                raise ValueError(f"Concept {concept.name!r}: {error}") from error
    if weight_column is None or (weight_column == "weight" and weight_column not in row):
        return None
    if weight_column not in row:
        raise ValueError(f"The dataset has no weight column {weight_column!r}. Its columns are {', '.join(row)}.")
    for weight in _values(dataset, row, weight_column):
        check_weight({weight_column: weight}, weight_column)
    return weight_column


def check_weight(example: dict[str, Any], column: str) -> float:
    """A pair's weight. Raises `ValueError` unless it is finite and not negative."""
    weight = _number(example[column])
    if not 0 <= weight < float("inf"):
        raise ValueError(
            f"Column {column!r}: a pair's weight must be finite and not negative, got {example[column]!r:.80}."
        )
    return weight


def check_gate(example: dict[str, Any], column: str) -> float:
    """A row's gate. Raises `ValueError` unless it is boolean or between 0 and 1."""
    gate = _number(example[column])
    if not 0 <= gate <= 1:
        raise ValueError(f"Column {column!r}: a gate must be boolean or between 0 and 1, got {example[column]!r:.80}.")
    return gate


def _gate(example: dict[str, Any], column: str) -> float:
    """A row's gate; nan where evaluation data leaves it open, which says nothing."""
    return float("nan") if example[column] is None and ROW not in example else check_gate(example, column)


def _number(value: Any) -> float:
    """What a column holds as a number; nan where it is none."""
    try:
        return float("nan") if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        return float("nan")


def _values(dataset: Any, row: dict[str, Any], column: str) -> list[Any]:
    """A column's distinct values; of a stream, and where a value is no single one, the first row's."""
    single = isinstance(dataset, Dataset) and isinstance(dataset.features[column], Value)
    return dataset.unique(column) if single else [row[column]]
