"""DPOTrainer that changes what the policy's forward pass is about, on what the reference has read. The wiring only, as in `trainer.py`."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from trl.trainer.utils import global_then_local_main_first

from .batch import Batch
from .openings import REF_COLUMNS, Computed, without
from .prompts import TURN, TURN_COLUMN, TurnStart, turn_tokens
from .reading import reading_masks
from .reading_trainer import ReadingTrainer
from .shapers.steering import ForwardEdit
from .steering import Steering, check_steering
from .tokens import TokenFilter


class InterveningTrainer(ReadingTrainer):
    """Carries out the methods for which the reference is read before the policy.

    A subclass calls `_prepare_interventions` before `DPOTrainer.__init__`.

    Attributes:
        _reads_first: Whether there is such a method. Without one, nothing here is run.
        _tokens: Says which tokens leave the loss.
        _steering: Changes the policy's hidden states; the subclass enters it around a training step.
    """

    _reads_first: bool
    _tokens: TokenFilter
    _steering: Steering

    def _prepare_interventions(self, args: Any) -> None:
        """Check the methods against their readouts.

        Raises:
            ValueError: If one does not fit; the text names the concept.
        """
        reader = self._reader
        self._reads_first = any(concept.shapes and concept.shaper.reads_first for concept in self.concepts)
        self._tokens = TokenFilter(self.concepts, reader.readers, reader.columns, args.precompute_ref_log_probs)
        check_steering(self.concepts, reader.readers)
        self._needs_turns = any(concept.shapes and isinstance(concept.shaper, ForwardEdit) for concept in self.concepts)

    # ------------------------------------------------------------------- data

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, dataset_name: str
    ) -> Dataset | IterableDataset:
        dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if not self._needs_turns or dataset_name != "train":  # evaluation is plain DPO's
            return dataset
        with global_then_local_main_first():
            return dataset.map(
                _add_turn_tokens,
                fn_kwargs={"processing_class": processing_class},
                **({"desc": "Finding the final user turns"} if isinstance(dataset, Dataset) else {}),
            )

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        if self._needs_turns and TURN_COLUMN not in columns:
            columns.append(TURN_COLUMN)

    def _additions(self) -> list[Any]:
        marks = self._tokens.marks(self._tokenizer)
        turns = TurnStart() if self._needs_turns else None
        if turns is not None and self._is_vision_dataset:
            raise ValueError(
                "Methods 'steer' and 'ablate' find the final user turn in the tokens of a text; of a vision data set TRL makes these in "
                "the collator. Use another method."
            )
        return [*super()._additions(), *(adds for adds in (marks, turns) if adds is not None)]

    def _reference_pass(self, model: Any, inputs: dict[str, Any], extras: dict[str, Tensor]) -> Any:
        if not self._tokens:
            return super()._reference_pass(model, inputs, extras)
        completion, _ = reading_masks(inputs, self._tokenizer.bos_token_id, self._tokenizer.eos_token_id)
        with self._tokens.reading(self.accelerator.unwrap_model(model), completion):
            return super()._reference_pass(model, inputs, extras)

    def _read_rows(self, examples: list[Any], fresh: Tensor) -> Tensor:
        table = super()._read_rows(examples, fresh)
        self._tokens.sample(fresh)
        return table

    def _calibrate(self) -> None:
        super()._calibrate()
        assert self._calibration is not None
        if self._tokens and self._calibration.tokens is None:
            found = self._tokens.thresholds(
                self._calibration.statistics,
                self.accelerator,
                self.args.per_device_train_batch_size,
                self._tokenizer,
                lambda rows: super(InterveningTrainer, self)._read_rows(rows, torch.ones(len(rows), dtype=torch.bool)),
            )
            self._calibration = self._calibration._replace(tokens=found.to(self.accelerator.device))

    # -------------------------------------------------------------- the batch

    def _intervene(self, batch: Batch) -> None:
        """Change what the policy's forward pass and the loss are about, once the reference has read the batch."""
        self._leave_tokens(batch)
        self._steer(batch)

    def _steer(self, batch: Batch) -> None:
        """Aim at the tokens from the final user turn on, of the sequences that each concept is to change."""
        if not self._steering:
            return
        assert self._calibration is not None  # by _compute_loss
        amounts = {}
        for index, concept in enumerate(self.concepts):
            if concept.shapes and isinstance(concept.shaper, ForwardEdit):
                sample = self._calibration.signal(index)
                amounts[index] = concept.shaper.amount(batch.signals[index], concept.signed_strength, sample)
                changed = (amounts[index] != 0).float()
                name = f"concepts/{concept.name}/{concept.shaper.name}"
                batch.shares[name] = (changed.sum(), torch.ones_like(changed).sum())
        completion, prompt = reading_masks(batch.inputs, self._tokenizer.bos_token_id, self._tokenizer.eos_token_id)
        places = torch.arange(completion.shape[1], device=completion.device)
        self._steering.aim(amounts, (completion | prompt) & (places >= batch.extras[TURN][:, None]))

    def _leave_tokens(self, batch: Batch) -> None:
        """Take tokens out of the loss: out of the completions, as TRL sees them, and of the reference's log-probabilities."""
        if not self._tokens:
            return
        calibration = self._calibration
        assert calibration is not None  # by _compute_loss
        assert calibration.tokens is not None  # by _calibrate
        completion = batch.mask.bool()
        leaving = self._tokens.leaving(
            batch.signals, calibration.statistics, calibration.tokens, batch.extras, completion
        )
        batch.leaving = torch.stack(list(leaving.values())).any(dim=0)  # (2B, T)
        for index, left in leaving.items():
            batch.shares[f"concepts/{self.concepts[index].name}/tokens"] = (left.sum(), completion.sum())
        inputs = {**batch.inputs, "completion_mask": batch.mask.masked_fill(batch.leaving, 0)}
        kept = without(self._tokens.log_probs, batch.leaving)
        inputs.update(zip(REF_COLUMNS, super().compute_ref_log_probs(Computed(kept), inputs), strict=True))
        batch.inputs = inputs


def _add_turn_tokens(example: dict[str, Any], processing_class: Any) -> dict[str, int]:
    return {TURN_COLUMN: turn_tokens(example, processing_class)}
