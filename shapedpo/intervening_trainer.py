"""DPOTrainer that changes what the policy's forward pass is about, on what the reference has read. The wiring only, as in `trainer.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .batch import Batch
from .openings import REF_COLUMNS, Computed, without
from .reading import reading_masks
from .reading_trainer import ReadingTrainer
from .tokens import TokenFilter


class InterveningTrainer(ReadingTrainer):
    """Carries out the methods for which the reference is read before the policy.

    A subclass calls `_prepare_interventions` before `DPOTrainer.__init__`.

    Attributes:
        _reads_first: Whether there is such a method. Without one, nothing here is run.
        _tokens: Says which tokens leave the loss.
    """

    _reads_first: bool
    _tokens: TokenFilter

    def _prepare_interventions(self, args: Any) -> None:
        """Check the methods against their readouts.

        Raises:
            ValueError: If one does not fit; the text names the concept.
        """
        reader = self._reader
        self._reads_first = any(concept.shapes and concept.shaper.reads_first for concept in self.concepts)
        self._tokens = TokenFilter(self.concepts, reader.readers, reader.columns, args.precompute_ref_log_probs)

    def _additions(self) -> list[Any]:
        marks = self._tokens.marks(self._tokenizer)
        return super()._additions() + ([marks] if marks is not None else [])

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
