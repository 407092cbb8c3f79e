"""What the monitor needs of the trainer: the data, the models and the reading, under one roof."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from torch import Tensor
from torch.utils.data import get_worker_info
from trl import DPOTrainer
from trl.models.utils import unwrap_model_for_generation

from ..capture import CapturePass
from ..collator import GATES, ROW, split_batch
from ..openings import restored
from ..reading import reading_masks
from ..readouts import ActivationReader
from .probe.rollouts import Reading, Readings, Rows, context_length
from .recent import SPANS, RecentRows


if TYPE_CHECKING:
    from ..trainer import ShapedDPOTrainer


class Source(NamedTuple):
    """What the training data was before it was prepared.

    Attributes:
        rows: Number of rows, `None` for a stream.
        fingerprint: Of the content, as `datasets` has it; `None` for a stream.
    """

    rows: int | None
    fingerprint: str | None


def numbered(dataset: Any, process: int = 0, processes: int = 1) -> tuple[Any, Source]:
    """Number the rows of the training data in a column that survives preparation, which may drop rows.

    A stream of as many shards as there are processes, or more, is dealt out to them by shards, and each counts its own rows; so is what a
    process has of it to its workers (`dataloader_num_workers`).
    """
    if isinstance(dataset, Dataset):
        source = Source(len(dataset), dataset._fingerprint)
        if ROW in dataset.column_names:  # data that another trainer prepared
            dataset = dataset.remove_columns(ROW)
        return dataset.add_column(ROW, np.arange(len(dataset))), source
    if isinstance(dataset, IterableDataset):
        step, first = (processes, process) if dataset.num_shards >= processes else (1, 0)
        shards = -(-dataset.num_shards // step)  # a process's

        def number(row: Any, index: int) -> dict[str, int]:
            worker = get_worker_info()
            if worker is not None:
                index = min(worker.num_workers, shards) * index + worker.id
            return {ROW: step * index + first}

        return dataset.map(number, with_indices=True), Source(None, None)
    return dataset, Source(None, None)


class TrainerAccess:
    """The trainer as the monitor sees it.

    Args:
        trainer: The trainer, constructed.
        source: Of the training data.
        recent: The rows of a stream.
    """

    def __init__(self, trainer: ShapedDPOTrainer, source: Source, recent: RecentRows | None = None) -> None:
        self._trainer = trainer
        self.source = source
        self._recent = recent
        self._fetched: dict[int, Mapping[str, Any]] = {}
        self.args: Any = trainer.args
        self.concepts = trainer.concepts
        self.accelerator = trainer.accelerator
        self.tokenizer = trainer._tokenizer
        self.reader = trainer._reader
        self.beta: float = trainer.beta

    @property
    def reference(self) -> Any:
        """The reference model, or the policy whose adapter is turned off for it."""
        return self._trainer._reference()

    def policy(self) -> AbstractContextManager[Any]:
        """A context with the policy unwrapped and whole, for sampling."""
        return unwrap_model_for_generation(
            self._trainer.model_wrapped,
            self.accelerator,
            gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,  # with which it is turned on again
        )

    @property
    def calibration(self) -> Any:
        """What scores mean."""
        return self._trainer._calibration

    def calibrate(self) -> None:
        """Make sure that there is a calibration; all processes together."""
        self._trainer._make_ready()

    @property
    def step_pairs(self) -> int:
        """Pairs of an optimiser step, over all processes. `auto_find_batch_size` makes batches smaller than the arguments say."""
        return self._trainer._train_batch_size * self.args.gradient_accumulation_steps * self.accelerator.num_processes

    @property
    def context_length(self) -> int:
        """Most tokens of a prompt and its completion: of the run's `max_length` and the model's positions, the smaller."""
        positions = context_length(self.accelerator.unwrap_model(self.reference))
        return min(self.args.max_length or positions, positions)

    @property
    def has_images(self) -> bool:
        """Whether it is a vision data set, which TRL prepares in the collator only."""
        return bool(self._trainer._is_vision_dataset)

    @property
    def prompts(self) -> Any:
        """Prepared data to take prompts from: the evaluation data where there is some, else the training data."""
        dataset: Any = self._trainer.eval_dataset
        if isinstance(dataset, dict):
            dataset = next(iter(dataset.values()))
        return self._trainer.train_dataset if dataset is None else dataset

    def fetch(self, rows: Sequence[int]) -> None:
        """Bring together what the processes still have of these rows of a stream, for `texts`. All processes together."""
        if self._recent is not None and self.accelerator.num_processes > 1:
            mine = {row: ids for row in rows if (ids := self._recent.get(row))}
            self._fetched = {row: ids for part in gather_object([mine]) for row, ids in part.items()}

    def texts(self, row: int) -> dict[str, str | None]:
        """A row's `prompt`, `chosen` and `rejected` as the tokenizer gives them back; `None` each of a stream's row that is too long ago."""
        ids = self._ids(row)
        return {
            name: self.tokenizer.decode(ids[name], skip_special_tokens=True) if name in ids else None for name in SPANS
        }

    def _ids(self, row: int) -> Mapping[str, Any]:
        dataset: Any = self._trainer.train_dataset
        if not isinstance(dataset, Dataset):
            return self._fetched.get(row) or (self._recent.get(row) if self._recent is not None else {})
        if len(dataset) != self.source.rows:  # preparation has dropped rows
            if not hasattr(self, "_rows"):
                self._rows = np.asarray(dataset[ROW][:])
            row = int(np.searchsorted(self._rows, row))
        example = dataset[row]
        return {
            name: example[f"{name}_ids"] for name in SPANS if f"{name}_ids" in example
        }  # a vision data set has none

    def read(self, policy: Any, rows: Rows) -> Reading:
        """Read pairs of completions: concepts and monitored features with the reference, log-probabilities with both models.

        Args:
            policy: The policy, unwrapped and whole.
            rows: B pairs.
        """
        extras, inputs = self._collated(rows)
        trainer = self._trainer
        with restored(trainer, "ld_alpha"):
            trainer.ld_alpha = None  # a sequence's log-probability, not what a loss makes of it
            reference, raw = trainer._reference_pass(self.reference, inputs, extras)
        scores = self.reader.standardised(raw.completion, self.calibration.statistics)
        # Without the columns nothing says which prompts they would let in.
        columns = extras.get(GATES, scores.new_full((len(rows), len(self.reader.gate_columns)), torch.nan))
        gates = self.reader.gates(raw, self.calibration.statistics, columns).repeat(2, 1)
        return Reading(scores, raw.features, torch.cat(reference).float(), self._logps(policy, inputs), gates)

    def logps(self, policy: Any, rows: Rows) -> Tensor:
        """Log-probabilities of pairs of completions under the policy, `(2B,)`, nats."""
        return self._logps(policy, self._collated(rows)[1])

    def _logps(self, policy: Any, inputs: dict[str, Any]) -> Tensor:
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad(), self.accelerator.autocast():
            outputs = policy(**given, labels=labels, use_cache=False, fused_lm_head=True)
        return outputs.log_probs.float().sum(dim=1)  # 0 outside completions

    def read_tokens(self, rows: Rows, readers: Sequence[ActivationReader]) -> tuple[Tensor, Tensor]:
        """The same, while other readers of the completions' tokens look on.

        Returns:
            The scores `(2B, C)`, and the mask of completion tokens `(2B, T)`.
        """
        extras, inputs = self._collated(rows)
        completion, _ = reading_masks(inputs, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        model = self.accelerator.unwrap_model(self.reference)
        with CapturePass(model, readers, [completion] * len(readers)):
            _, raw = self._trainer._reference_pass(self.reference, inputs, extras)
        return self.reader.standardised(raw.completion, self.calibration.statistics), inputs["completion_mask"]

    def _collated(self, rows: Rows) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return split_batch(self._trainer._prepare_inputs(self._trainer.data_collator(rows)))

    def correct(self, now: Readings, before: Readings) -> None:
        """Tell the controller of held concepts what rollouts show. All processes alike."""
        assert now.gates is not None  # by `read`
        ours, theirs = (readings.scores.transpose(0, 1).flatten(1, 2) for readings in (now, before))  # (N, 2D, C)
        self._trainer._shaping.correct(ours, theirs, now.gates[0, :, 0])

    def log(self, scalars: dict[str, float]) -> None:
        """Log scalars by themselves: past TRL's `log`, which would average and clear the step's metrics."""
        control = self._trainer.control
        asked = control.should_log
        super(DPOTrainer, self._trainer).log(scalars)
        control.should_log = asked  # logging withdraws it, and the step's own log is still to come
