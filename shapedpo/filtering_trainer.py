"""DPOTrainer that leaves rows out of the data before training, with method `filter`. The wiring only; what leaves is in `filtering.py`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger

from .calibration import FILE_NAME as CALIBRATION
from .calibration import calibrate, read_sample
from .filtering import FILE_NAME, filtering, leaving_rows, load_record, save_record, without_rows
from .openings import restored
from .reading_trainer import MAX_CACHED_SCORES, ReadingTrainer
from .readouts.base import fingerprint as hashed
from .shapers import ConceptSignal


logger = get_logger(__name__)


class FilteringTrainer(ReadingTrainer):
    """Reads all rows before training and leaves out those that a concept of method `filter` asks to leave.

    Attributes:
        _filtered: The record of the rows that left, once they have.
    """

    _filtered: dict[str, Any] | None = None

    def _before_training(self, checkpoint: Any) -> None:
        """Leave rows out of the training data, once, before it is counted.

        Args:
            checkpoint: The folder that the run resumes from, if it does.
        """
        super()._before_training(checkpoint)
        dataset: Any = self.train_dataset
        if not filtering(self.concepts) or self._filtered is not None:
            return
        filters = [self.concepts[index].to_dict() for index in filtering(self.concepts)]
        fingerprint = hashed(self._reader.fingerprint, filters)
        record = None
        if isinstance(checkpoint, str | os.PathLike):
            record = load_record(checkpoint, len(dataset), fingerprint)
        if record is None:
            record = leaving_rows(self.concepts, self._read_all_rows(), dataset, fingerprint)
        self._filtered = record
        self.train_dataset = without_rows(dataset, record)
        if self.args.should_save:
            save_record(str(self.args.output_dir), record)
        for name, rows in record["concepts"].items():
            logger.warning(
                f"Concept {name!r}: method 'filter' leaves {len(rows)} of {record['rows']} pairs out; their rows are in {FILE_NAME}."
            )
        resumed = isinstance(checkpoint, str | os.PathLike) and (Path(checkpoint) / CALIBRATION).is_file()
        if self.precompute_ref_logps and not resumed:
            self._calibration = None  # it was of all rows
            self._calibrate()

    def _read_all_rows(self) -> list[ConceptSignal]:
        """The concepts' scores on all of the training data, standardised over it. All processes together."""
        reader, dataset = self._reader, self.train_dataset
        if reader.n_columns > MAX_CACHED_SCORES:
            raise ValueError(
                f"Method 'filter' keeps every concept's scores of every completion, and {reader.n_columns} are more than "
                f"{MAX_CACHED_SCORES}. Read fewer features."
            )
        if self.precompute_ref_logps:
            table = self._cached_table()
        else:
            if self.ref_model is None and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
                raise ValueError(
                    "Method 'filter' reads the reference before training, when DeepSpeed or FSDP have not placed the model whose adapter is "
                    "turned off for it. Set `precompute_ref_log_probs=True`, which has a pass of its own, or give `ref_model`."
                )
            self._set_signature_columns_if_needed()
            rows: Any = dataset
            keep: Any = self._signature_columns if self.args.remove_unused_columns else rows.column_names
            rows = rows.select_columns([name for name in rows.column_names if name in keep])
            with restored(reader, "monitored"):
                reader.monitored = None  # they belong to no concept
                table = read_sample(
                    rows,
                    self.args.per_device_train_batch_size,
                    super()._read_rows,
                    self.accelerator,
                    "Reading all pairs",
                )
        raw, valid, gates = self._columns(table)
        calibration, warnings = calibrate(reader, raw, valid, gates)
        for warning in warnings:
            logger.warning(warning)
        return reader.signals(raw, calibration.statistics, valid, gates)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As [`~transformers.Trainer.save_model`], with the record of the rows that left beside the model."""
        super().save_model(output_dir, _internal_call)
        if self._filtered is not None and self.args.should_save:
            save_record(output_dir if output_dir is not None else str(self.args.output_dir), self._filtered)
