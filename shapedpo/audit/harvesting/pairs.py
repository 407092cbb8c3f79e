"""Preference pairs as training would read them: a sample of a dataset, tokenised and truncated by TRL."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from accelerate import PartialState
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from torch import Tensor
from trl import DatasetMixtureConfig, ScriptArguments
from trl.trainer.dpo_trainer import DataCollatorForPreference

from ...collator import ROW
from ...errors import UserError
from ...openings import tokenised
from ...sources import load_preferences
from .layout import Tokens, row_length


_PARTS = ("prompt_ids", "chosen_ids", "rejected_ids")
_READ_BY_TRL = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs")


def processes() -> PartialState:
    """The processes that share the work. On a machine without an accelerator `accelerate` must be told so, or each takes itself for the
    only one."""
    state = PartialState(cpu=not torch.accelerator.is_available())
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if state.num_processes != started:
        raise RuntimeError(
            f"{started} processes were started, but accelerate's state knows {state.num_processes}: it was made before the audit. Call "
            "`shapedpo.audit.harvest` first, or make it with `PartialState(cpu=True)`."
        )
    return state


class Pairs:
    """Tokenised pairs.

    Args:
        dataset: Preference pairs in any form that TRL takes.
        tokenizer: The model's. Gets a padding token if it has none, as TRL gives it one.
        max_length: Longest prompt and completion together, in tokens; `None` for no truncation.
        truncation_mode: `keep_start` or `keep_end`.
        limit: Take the first rows only; of a stream no more are fetched.
        sample: Take that many of those at random.
        seed: Of the sample.

    Attributes:
        rows: `(n,)` int64, row numbers in the source, ascending.
        lengths: `(n,)` int64, tokens of each pair with its prompt once.
        longest: Place of the pair with the longest sequence.
        fingerprint: Hash of row numbers and tokens.
        dropped: How many rows TRL leaves out, since their prompt fills `max_length`.
        repeated: How many pairs say what an earlier one does, token by token.
        same: How many have the same completion twice.

    Raises:
        ValueError: If the dataset has not the columns of preference pairs, or no row is left.
    """

    def __init__(
        self,
        dataset: Dataset | IterableDataset,
        tokenizer: Any,
        *,
        max_length: int | None,
        truncation_mode: str,
        limit: int | None = None,
        sample: int | None = None,
        seed: int = 0,
    ) -> None:
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.tokenizer = tokenizer
        self.tokens = Tokens(tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        taken = _taken(dataset, limit, sample, seed)
        args = SimpleNamespace(max_length=max_length, truncation_mode=truncation_mode, dataset_num_proc=None)
        self._data = tokenised(taken, tokenizer, args, "audit").select_columns([ROW, *_PARTS])
        self.dropped = len(taken) - len(self._data)
        if len(self._data) == 0:
            raise ValueError(
                f"None of the {len(taken)} pairs is left: each prompt alone fills max_length={max_length}. Raise it."
            )
        self._measure(max_length, truncation_mode)

    def _measure(self, max_length: int | None, truncation_mode: str) -> None:
        """Take stock of the tokens in `_data`."""
        self._collate = DataCollatorForPreference(
            pad_token_id=self.tokenizer.pad_token_id, max_length=max_length, truncation_mode=truncation_mode
        )
        digest = hashlib.sha256(repr(self.tokens).encode())
        rows, lengths, longest = [], [], []
        seen: set[int] = set()
        self.same = 0
        for batch in self._data.with_format("arrow").iter(4096):
            rows.append(batch[ROW].to_numpy())
            parts = [_integers(pa.chunked_array(batch[name]).combine_chunks()) for name in _PARTS]
            prompt, chosen, rejected = (part.value_lengths().to_numpy().astype(np.int64) for part in parts)
            lengths.append(row_length(prompt, chosen, rejected, max_length, truncation_mode == "keep_end"))
            longest.append(prompt + np.maximum(chosen, rejected))
            for array in (rows[-1], prompt, chosen, rejected, *(part.flatten().to_numpy() for part in parts)):
                digest.update(np.ascontiguousarray(array).data)
            for said in zip(*(map(bytes, _split(part)) for part in parts), strict=True):
                seen.add(hash(said))
                self.same += said[1] == said[2]
        self.rows = np.concatenate(rows)
        self.lengths = np.concatenate(lengths)
        self.longest = int(np.concatenate(longest).argmax())
        self.fingerprint = digest.hexdigest()
        self.repeated = len(self.rows) - len(seen)

    def __len__(self) -> int:
        return len(self._data)

    def batches(self, places: np.ndarray, batch_tokens: int) -> Iterator[np.ndarray]:
        """Cut places into batches of like length, the longest first, so that what does not fit into memory fails at once.

        Args:
            places: Places of pairs, `(n,)`.
            batch_tokens: Tokens of a batch at most, padding included; a longer pair is a batch of its own.
        """
        order = places[np.argsort(-self.lengths[places], kind="stable")]
        while len(order):
            n = max(1, batch_tokens // max(1, int(self.lengths[order[0]])))
            yield order[:n]
            order = order[n:]

    def collated(self, places: Any) -> dict[str, Tensor]:
        """A batch as the trainer makes it, `(2B, T)` each: truncated, chosen completions first."""
        examples = self._data[list(map(int, places))]
        return self._collate(
            [dict(zip(examples, values, strict=True)) for values in zip(*examples.values(), strict=True)]
        )


def load_pairs(name: str, split: str = "train", config: str | None = None, streaming: bool = False) -> Any:
    """Load preference pairs by name.

    Args:
        name: What `shapedpo train` takes as `dataset_name`: a data file, a folder, a name on the hub, or `lab:WORLD`.
        split: Which split.
        config: Which configuration, where the hub has several.
        streaming: Fetch rows only when they are needed.

    Raises:
        UserError: If nothing can be loaded, or there is no such split.
    """
    script = ScriptArguments(dataset_name=name, dataset_config=config, dataset_streaming=streaming)
    splits = load_preferences(script, DatasetMixtureConfig())
    if split not in splits:
        raise UserError(f"The dataset {name!r} has no split {split!r}; it has {', '.join(map(str, splits))}.")
    return splits[split]


def _integers(lists: pa.ListArray) -> pa.ListArray:
    """Lists of tokens; where all are empty, `datasets` does not know of what."""
    return lists.cast(pa.list_(pa.int64())) if pa.types.is_null(lists.type.value_type) else lists


def _split(lists: pa.ListArray) -> list[np.ndarray]:
    """The tokens of each list."""
    lengths = lists.value_lengths().to_numpy()
    return np.split(lists.flatten().to_numpy(), np.cumsum(lengths)[:-1])


def _taken(dataset: Any, limit: int | None, sample: int | None, seed: int) -> Dataset:
    """The rows to read, numbered as in the source."""
    if isinstance(dataset, DatasetDict | IterableDatasetDict):
        raise ValueError(f"The dataset has several splits ({', '.join(dataset)}): pass one, `dataset['train']`.")
    if not isinstance(dataset, Dataset | IterableDataset):
        raise TypeError(f"The dataset must be one of the library `datasets`, got {type(dataset).__name__}.")
    if isinstance(dataset, IterableDataset):
        dataset = _on_disk(dataset if limit is None else dataset.take(limit))
    n = len(dataset) if limit is None else min(limit, len(dataset))
    rows = np.arange(n)
    if sample is not None and sample < n:
        rows = np.sort(np.random.default_rng(seed).choice(n, sample, replace=False))
    columns = dataset.column_names
    _check_columns(columns)
    if n == 0:
        raise ValueError("The dataset has no rows.")
    dataset = dataset.select_columns([name for name in _READ_BY_TRL if name in columns])
    if len(rows) < len(dataset):
        dataset = dataset.select(rows)
    dataset = dataset.add_column(ROW, rows)
    _check_complete(dataset)
    return dataset


def _check_complete(dataset: Dataset) -> None:
    for batch in dataset.with_format("arrow").iter(4096):
        for name in ("prompt", "chosen", "rejected"):
            if name in batch.column_names and batch[name].null_count:
                place = batch[name].is_null().index(True).as_py()
                raise ValueError(
                    f"Row {batch[ROW][place]} of the dataset has no `{name}`: it is null. Leave such rows out first, or write an empty text."
                )
            if name in batch.column_names and pa.types.is_list(batch[name].type):
                none = pc.equal(pc.list_value_length(batch[name]), 0)
                if (place := pc.index(none, True).as_py()) >= 0:
                    raise ValueError(
                        f"Row {batch[ROW][place]} of the dataset has no message in `{name}`. Leave such rows out first."
                    )


def _on_disk(stream: IterableDataset) -> Dataset:
    """A stream, fetched once into the cache of `datasets`: lengths must be known before the first batch is made."""
    with processes().main_process_first():
        return Dataset.from_generator(_rows, gen_kwargs={"stream": stream}, features=stream.features)


def _rows(stream: IterableDataset) -> Any:
    yield from stream


def _check_columns(columns: list[str]) -> None:
    found = f"It has the columns {', '.join(columns)}."
    if not {"chosen", "rejected"} <= set(columns):
        raise ValueError(
            f"The dataset must have the columns `chosen` and `rejected` (and `prompt`, unless they hold it). {found}"
        )
    if {"image", "images"} & set(columns):
        raise ValueError(f"The audit reads text only, and the dataset has images. {found} Remove that column.")
