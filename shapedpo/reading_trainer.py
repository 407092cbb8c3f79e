"""DPOTrainer whose reference pass reads concepts. What is done with what was read is the subclass's, in `trainer.py`."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from datasets import IterableDataset
from torch import Tensor

from . import collator as keys
from .calibration import FILE_NAME as CALIBRATION
from .calibration import Calibration, calibrate, load_calibration, read_sample, save_calibration
from .checkpoints import ResumableTrainer
from .collator import ConceptCollator, split_batch
from .concept import Concept
from .monitor import ExcitingReader, RunMonitor
from .openings import REF_COLUMNS, restored
from .reading import ConceptReader, RawScores, reading_masks


logger = get_logger(__name__)

MAX_CACHED_SCORES = 4096
"""With precomputed reference log-probabilities every completion's scores are cached; a whole SAE's are too many."""


class ReadingTrainer(ResumableTrainer):
    """Reads concepts and monitored features in the pass of the reference that DPO makes anyway, and calibrates their scores.

    With precomputed reference log-probabilities the scores are cached beside them. A subclass sets the attributes before it
    calls `DPOTrainer.__init__`.

    Attributes:
        concepts: What is read.
        _reader: Reads it.
        _reads: Whether there is anything to read.
        _monitor: Watches the run, once the trainer is built.
        _calibration: What scores mean, once that is known.
        _weight_column: Column of pair weights in use, if any.
        _reading_ready: Whether the collator has been wrapped.
        _precomputing: Whether TRL is precomputing the reference's log-probabilities.
        _n_residuals: How many numbers of each completion further passes of the reference give.
    """

    concepts: list[Concept]
    _reader: ConceptReader
    _reads: bool
    _monitor: RunMonitor | None
    _calibration: Calibration | None
    _weight_column: str | None
    _reading_ready: bool
    _precomputing: bool
    _n_residuals: int = 0
    _last_unwrapped: tuple[Callable[[], Any], Callable[[], Any]] = (lambda: None, lambda: None)

    def _take_over(self, calibration: Calibration) -> None:
        """Make a calibration the run's."""
        self._calibration = calibration.to(self.accelerator.device)

    def _hand_over(self) -> Calibration:
        """The run's calibration, as it is to be saved."""
        assert self._calibration is not None
        return self._calibration

    # ------------------------------------------------------------------ data

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        extra = [*self._reader.gate_columns, *([self._weight_column] if self._weight_column else [])]
        extra += [keys.ROW] if self._reads else []
        columns: Any = self._signature_columns
        columns += [column for column in extra if column not in columns]

    def _prepare_reading(self) -> None:
        """Check the concepts against the model and wrap the collator, once; before the first batch is made."""
        if self._reading_ready:
            return
        self._reading_ready = True
        reader = self._reader
        if self._reads or self._weight_column:
            self.data_collator = ConceptCollator(
                self.data_collator,
                self._tokenizer,
                reader.text_readouts,
                prompt_text=bool(reader.prompt_index),
                weight_column=self._weight_column,
                gate_columns=reader.gate_columns,
                further=self._additions(),
            )
        if not self._reads:
            return
        model = self._unwrapped(self._reference())
        for warning in reader.check_model(model, model.config.get_text_config()):
            logger.warning(warning)
        known = getattr(model.get_input_embeddings(), "num_embeddings", None)
        if known is not None and known < len(self._tokenizer):
            logger.warning(
                f"The tokenizer has {len(self._tokenizer)} tokens, and {type(model).__name__} has embeddings for {known}. A row with one of the "
                "others ends the run, on a GPU with an error that says nothing of it. Is it the model's own tokenizer? If tokens were added, "
                "call `model.resize_token_embeddings(len(tokenizer))`."
            )

    def _additions(self) -> list[Any]:
        """What else the collator is to add to a batch (see [`ConceptCollator`])."""
        return []

    # --------------------------------------------------- the reference reads

    def _reference(self) -> Any:
        return self.ref_model if self.ref_model is not None else self.model

    def _unwrapped(self, model: Any) -> Any:
        """A model without its wrappers; looked for once, as accelerate reads the metadata of packages for it: milliseconds a step."""
        wrapped, unwrapped = (found() for found in self._last_unwrapped)
        if wrapped is not model or unwrapped is None:
            unwrapped = self.accelerator.unwrap_model(model)
            self._last_unwrapped = (
                weakref.ref(model),
                weakref.ref(unwrapped),
            )  # a reference may be dropped once it has been read
        return unwrapped

    def _read_tokens(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """`(2B, T)` bool each: the tokens that are read of the completions, and of the prompts."""
        return reading_masks(inputs, self._tokenizer.bos_token_id, self._tokenizer.eos_token_id)

    def _reference_pass(
        self, model: Any, inputs: dict[str, Any], extras: dict[str, Tensor]
    ) -> tuple[tuple[Tensor, Tensor], RawScores]:
        """The one pass of the reference: its log-probabilities, `(B,)` each, and the concepts' raw scores."""
        completion, prompt = self._read_tokens(inputs)
        with self._reader.capture(self._unwrapped(model), completion, prompt) as capture:
            logps = super().compute_ref_log_probs(model, inputs)
        return logps, self._reader.assemble(capture.scores, extras.get(keys.TEXT), extras.get(keys.PROMPT_TEXT))

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        """TRL's, for a batch that may carry our keys.

        While precomputing, a completion's scores ride behind its log-probability, so that TRL's own code gathers and
        caches them beside it.
        """
        extras, inputs = split_batch(inputs)
        if not self._precomputing:
            return super().compute_ref_log_probs(model, inputs)
        logps, raw = self._reference_pass(model, inputs, extras)
        valid = valid_pairs(inputs["completion_mask"]).float()
        sides = zip(logps, raw.completion.chunk(2), self._residuals(model, inputs, extras, logps).chunk(2), strict=True)
        return tuple(
            torch.cat([logp[:, None].float(), valid[:, None], scores, raw.prompt, residuals], dim=1)
            for logp, scores, residuals in sides
        )

    def _ref_logps(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """TRL's own pass of the reference, or its reduction of one that was made."""
        logps: tuple[Tensor, Tensor] = super().compute_ref_log_probs(model, inputs)
        return logps

    def _residuals(
        self, model: Any, inputs: dict[str, Any], extras: dict[str, Tensor], logps: tuple[Tensor, Tensor]
    ) -> Tensor:
        """What further passes of the reference say of each completion: `(2B, _n_residuals)` float32."""
        return torch.cat(logps).float()[:, None][:, :0]

    def _cached_scores(self, cached: Tensor) -> RawScores:
        """Raw scores from what `compute_ref_log_probs` gave of each completion: `(2B, 2 + F + P + R)`."""
        widths = [2, self._reader.n_columns, self._reader.n_prompt_columns, self._n_residuals]
        _, completion, prompt, residuals = cached.split(widths, dim=1)
        return RawScores(completion, prompt[: len(prompt) // 2], residuals=residuals)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        self._prepare_reading()
        if not self.concepts:
            return super()._precompute_ref_logps(dataset, name, batch_size)
        if self._reader.n_columns > MAX_CACHED_SCORES:
            widest = max(zip(self.concepts, self._reader.readers, strict=True), key=lambda pair: pair[1].n_features)
            raise ValueError(
                f"Concept {widest[0].name!r} reads {widest[1].n_features} features. With `precompute_ref_log_probs=True` "
                f"all scores are cached for every completion, and {self._reader.n_columns} are more than "
                f"{MAX_CACHED_SCORES}. Read fewer features, or set `precompute_ref_log_probs=False`."
            )
        with restored(self, "_precompute_model_hash", "_precomputing"):
            self._precomputing = True
            # Part of the cache's name: other concepts, other cache.
            self._precompute_model_hash: Any = (self._precompute_model_hash, self._cache_fingerprint)
            return super()._precompute_ref_logps(dataset, name, batch_size)

    @property
    def _cache_fingerprint(self) -> str:
        """Hash of all that is cached beside the reference's log-probabilities."""
        return self._reader.fingerprint

    # ------------------------------------------------------------ calibration

    def _calibrate(self) -> None:
        """Read the reference on a sample of the training data, or take all of it from the cache."""
        reader = self._reader
        if self.precompute_ref_logps:
            table = self._cached_table()
        else:
            examples = self._calibration_examples(getattr(self.args, "calibration_size", 512))
            looking = self._monitor.watch.calibration_reader() if self._monitor is not None else None
            reader.monitored = looking or reader.monitored
            # Not the arguments' batch size, which may be the one that `auto_find_batch_size` found too large.
            table = read_sample(examples, self._train_batch_size, self._read_rows, self.accelerator)
            if looking is not None and self._monitor is not None:
                reader.monitored = self._monitor.watch.calibrated()
        calibration, warnings = calibrate(reader, *self._columns(table))
        for warning in warnings:
            logger.warning(warning)
        if self._calibration is None:  # not one from a checkpoint, that lacked the monitored features only
            self._take_over(calibration)

    def _make_ready(self) -> None:
        """Calibrate, if that is still to be done. All processes together."""
        if self._calibration is None or (self._monitor is not None and self._monitor.watch.needs_calibration):
            self._calibrate()

    def _read_rows(self, examples: list[Any], fresh: Tensor) -> Tensor:
        extras, inputs = split_batch(self._prepare_inputs(self.data_collator(examples)))
        _, raw = self._reference_pass(self._reference(), inputs, extras)
        valid = valid_pairs(inputs["completion_mask"])
        looking = self._reader.monitored
        if isinstance(looking, ExcitingReader) and self._monitor is not None and raw.features is not None:
            self._monitor.watch.calibrate_batch(
                raw.features, looking, inputs["input_ids"], valid & fresh.to(valid.device)
            )
        valid = valid[:, None].float()
        gates = extras.get(keys.GATES, valid.new_ones(len(valid), len(self._reader.gate_columns)))
        return torch.cat([*raw.completion.chunk(2), raw.prompt, valid, gates], dim=1)

    def _columns(self, table: Tensor) -> tuple[RawScores, Tensor, Tensor]:
        """The columns of `_read_rows`: raw scores, `(N,)` bool whether a pair has tokens on both sides, and the gate columns."""
        f, p, g = self._reader.n_columns, self._reader.n_prompt_columns, len(self._reader.gate_columns)
        chosen, rejected, prompt, valid, gates = table.split([f, f, p, 1, g], dim=1)
        return RawScores(torch.cat([chosen, rejected]), prompt), valid[:, 0] > 0, gates

    def _cached_table(self) -> Tensor:
        """The same columns as `_read_rows`, of the whole training data."""
        columns = [*REF_COLUMNS, *self._reader.gate_columns]
        dataset: Any = self.train_dataset
        rows = dataset.with_format("numpy", columns=columns)[:]  # not as lists of Python's numbers, ten times as large
        rows = {name: torch.tensor(np.asarray(rows[name], np.float32)) for name in columns}
        raw = self._cached_scores(torch.cat([rows[name] for name in REF_COLUMNS]))
        gates = [rows[name][:, None] for name in self._reader.gate_columns]
        return torch.cat([*raw.completion.chunk(2), raw.prompt, rows[REF_COLUMNS[0]][:, 1:2], *gates], dim=1)

    def _calibration_examples(self, size: int) -> list[dict[str, Any]]:
        dataset: Any = self.train_dataset
        if isinstance(dataset, IterableDataset):
            rows = dataset.take(size)
        else:
            order = np.random.default_rng(self.args.seed).permutation(len(dataset))[:size]
            rows = dataset.select(sorted(order))
        self._set_signature_columns_if_needed()
        keep: Any = self._signature_columns if self.args.remove_unused_columns else rows.column_names
        return [{name: value for name, value in row.items() if keep is None or name in keep} for row in rows]

    # ------------------------------------------------------------ checkpoints

    def _resume(self, checkpoint: Path) -> None:
        if not self._reads:
            if (checkpoint / CALIBRATION).is_file():
                logger.warning(
                    f"The checkpoint {str(checkpoint)!r} is of a run with concepts, and this one has none: it goes on as plain DPO."
                )
            return
        allow = getattr(self.args, "allow_concept_change", False)
        calibration = load_calibration(checkpoint, self.concepts, self._reader.fingerprint, allow)
        if calibration is not None:
            self._take_over(calibration)
            if self._monitor is not None:
                self._reader.monitored = self._monitor.load_state(checkpoint) or self._reader.monitored

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self._monitor is not None:
            self._monitor.gather_state()  # on all processes, which `save_model` need not be
        super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As [`~transformers.Trainer.save_model`], with the concepts and their calibration beside the model."""
        super().save_model(output_dir, _internal_call)
        if self._calibration is not None and self.args.should_save:
            folder: Any = output_dir if output_dir is not None else self.args.output_dir
            save_calibration(folder, self._hand_over(), self.concepts, self._reader.fingerprint)
            if self._monitor is not None and _internal_call:  # of a checkpoint, not of the finished model
                self._monitor.save_state(Path(folder))


def valid_pairs(completion_mask: Tensor) -> Tensor:
    """`(B,)` bool: whether both completions have a token that the loss predicts."""
    chosen, rejected = (completion_mask[:, 1:].sum(dim=1) > 0).chunk(2)
    return chosen & rejected
