"""The trainer: TRL's, with the concepts read in the reference pass and the signal shaped on its way into TRL's loss."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import Tensor
from transformers.trainer_utils import get_last_checkpoint
from trl import DPOTrainer
from trl.trainer.utils import get_config_model_id

from . import collator as keys
from .calibration import Calibration, calibrate, load_calibration, read_sample, save_calibration
from .collator import ConceptCollator, check_columns, split_batch
from .concept import Concept, resolve_concepts
from .config import ShapedDPOConfig
from .metrics import Pairs, concept_metrics, unshaped_rewards
from .monitor import ExcitingReader, RunMonitor, Source, TrainerAccess, make_sinks, monitor_settings, numbered
from .monitor.wandb import guard_wandb
from .openings import REF_COLUMNS, Computed, check_trl, hand_pair_weights, mutable_losses, restored
from .reading import ConceptReader, RawScores, reading_masks
from .shaping import Shaping, check_methods, project_policy


if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import (
        BitsAndBytesConfig,
        DataCollator,
        EvalPrediction,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        ProcessorMixin,
        TrainerCallback,
    )
    from trl import DPOConfig

logger = get_logger(__name__)

MAX_CACHED_SCORES = 4096
"""With precomputed reference log-probabilities every completion's scores are cached; a whole SAE's are too many."""


class ShapedDPOTrainer(DPOTrainer):
    r"""[`~trl.DPOTrainer`] that reads concepts in the reference pass and shapes what the policy learns about them.

    TRL computes the loss. The reference pass that it would make is made with hooks that read the concepts, and its
    log-probabilities are handed to TRL's loss, tilted where a concept asks for it; pair weights and projections enter through
    the policy's output. Without concepts, and with concepts that only watch, every loss, gradient and metric is that of
    `DPOTrainer`, bit for bit. Evaluation is always plain DPO's.

    Each logging step has, per concept, `concepts/<name>/amplification` (\\( \overline{(l(y^+) - l(y^-))\, d}/4 \\), the
    first-order change of its mean score from reference to policy), `.../pressure` (\\( \overline{\sigma(-m)\, d} \\), how hard
    the loss still pushes it), `.../delta` (\\( \overline{d} \\)), both of the unshaped margin, and `.../strength`.
    `concepts/empty_pairs` counts the pairs so far that had no completion token on one side after truncation; their delta is 0.

    Args:
        model, ref_model, args, ..., peft_config: As for [`~trl.DPOTrainer`]. `args` may be a plain `DPOConfig`.
        concepts (`list[Concept | dict]` or `str`, *optional*):
            The concepts, if not given by `args.concepts`.

    Raises:
        ValueError: If a concept does not fit the model, the data or the loss type; the text names the concept.
        ImportError: If the installed TRL lacks an opening that is used.

    Source: Bergen, Bhalla, Baskaran et al., "Anatomy of Post-Training" (arXiv 2606.12360).

    Example:
        ```python
        from shapedpo import Concept, Regex, ShapedDPOConfig, ShapedDPOTrainer

        links = Concept("links", Regex(r"https?://"), action="suppress", strength=2.0)
        trainer = ShapedDPOTrainer(
            model="Qwen/Qwen3-0.6B",
            args=ShapedDPOConfig(output_dir="out", concepts=[links]),
            train_dataset=dataset,
        )
        trainer.train()
        ```
    """

    _tag_names = ["trl", "dpo", "shapedpo"]

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None = None,
        args: DPOConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, Any]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        concepts: str | Iterable[Concept | Mapping[str, Any]] | None = None,
    ) -> None:
        check_trl()
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = ShapedDPOConfig(f"{name.split('/')[-1]}-DPO")
        configured = getattr(args, "concepts", None)
        if concepts is not None and configured:
            raise ValueError("Concepts are given both as `concepts=` and in `args.concepts`. Give them in one place.")
        self.concepts = resolve_concepts(configured if concepts is None else concepts)
        if isinstance(args, ShapedDPOConfig):
            args.concepts = self.concepts or None  # so that the run's config has them wherever they were given
        keeps_reference = ref_model is not None or peft_config is not None or isinstance(model, PeftModel)
        settings, monitored = monitor_settings(args, self.concepts, keeps_reference)
        self._weight_column: str | None = None
        if isinstance(train_dataset, Dataset | IterableDataset):  # else TRL says what is wrong with it
            self._weight_column = check_columns(self.concepts, getattr(args, "weight_column", None), train_dataset)
        self._reader = ConceptReader(self.concepts, None if monitored is None else monitored.load())
        self._reads = bool(self.concepts) or monitored is not None
        self._monitor: RunMonitor | None = None
        source = Source(None, None)
        if self._reads:
            train_dataset, source = numbered(train_dataset)
        pairs = args.per_device_train_batch_size * args.world_size
        for warning in check_methods(self.concepts, self._reader.readers, args, self._weight_column, pairs):
            logger.warning(warning)
        if self.concepts and args.sync_ref_model:
            raise ValueError(
                "`sync_ref_model=True` moves the reference during training, and with it what the concepts' scores mean. "
                "Leave the concepts or `sync_ref_model` out."
            )
        self._shaping = Shaping(self.concepts, args.beta)
        self._calibration: Calibration | None = None
        self._reading_ready = False
        self._precomputing = False
        super().__init__(
            model=model,
            ref_model=ref_model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        self._prepare_reading()
        if self._reads:
            run = TrainerAccess(self, source)
            reader: Any = self._reader.monitored
            self._monitor = RunMonitor(run, settings, reader, make_sinks(self.args))
            self.add_callback(self._monitor)
            guard_wandb(self.callback_handler)
            if self.precompute_ref_logps:
                self._calibrate()  # nothing needs to run for it

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
            )
        if not self._reads:
            return
        model = self.accelerator.unwrap_model(self._reference())
        for warning in reader.check_model(model, model.config.get_text_config()):
            logger.warning(warning)
        policy: Any = self.model
        self._residual_projection = self._shaping.residual_projection(policy, reader.readers)

    # --------------------------------------------------- the reference reads

    def _reference(self) -> Any:
        return self.ref_model if self.ref_model is not None else self.model

    def _reference_pass(
        self, model: Any, inputs: dict[str, Any], extras: dict[str, Tensor]
    ) -> tuple[tuple[Tensor, Tensor], RawScores]:
        """The one pass of the reference: its log-probabilities, `(B,)` each, and the concepts' raw scores."""
        completion, prompt = reading_masks(inputs, self._tokenizer.bos_token_id, self._tokenizer.eos_token_id)
        with self._reader.capture(self.accelerator.unwrap_model(model), completion, prompt) as capture:
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
        valid = _valid_pairs(inputs["completion_mask"]).float()
        return tuple(
            torch.cat([logp[:, None].float(), valid[:, None], scores, raw.prompt], dim=1)
            for logp, scores in zip(logps, raw.completion.chunk(2), strict=True)
        )

    def _cached_scores(self, cached: Tensor) -> RawScores:
        """Raw scores from what `compute_ref_log_probs` laid behind the log-probabilities: `(2B, 1 + F + P)`."""
        _, completion, prompt = cached.split([1, self._reader.n_columns, self._reader.n_prompt_columns], dim=1)
        return RawScores(completion, prompt[: len(prompt) // 2])

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
            self._precompute_model_hash: Any = (self._precompute_model_hash, self._reader.fingerprint)
            return super()._precompute_ref_logps(dataset, name, batch_size)

    # ------------------------------------------------------------ calibration

    def _calibrate(self) -> None:
        """Read the reference on a sample of the training data, or take all of it from the cache."""
        reader = self._reader
        if self.precompute_ref_logps:
            table = self._cached_table()
        else:
            examples = self._calibration_examples(getattr(self.args, "calibration_size", 512))
            looking = self._monitor.calibration_reader() if self._monitor is not None else None
            reader.monitored = looking or reader.monitored
            table = read_sample(examples, self.args.per_device_train_batch_size, self._read_rows, self.accelerator)
            if looking is not None and self._monitor is not None:
                reader.monitored = self._monitor.calibrated()
        f, p, g = reader.n_columns, reader.n_prompt_columns, len(reader.gate_columns)
        chosen, rejected, prompt, valid, gates = table.split([f, f, p, 1, g], dim=1)
        raw = RawScores(torch.cat([chosen, rejected]), prompt)
        calibration, warnings = calibrate(reader, raw, valid[:, 0] > 0, gates)
        for warning in warnings:
            logger.warning(warning)
        if self._calibration is None:  # not one from a checkpoint, that lacked the monitored features only
            self._take_over(calibration)

    def _take_over(self, calibration: Calibration) -> None:
        """Make a calibration the run's, with the state of the controller of held concepts if it has one."""
        self._calibration = calibration.to(self.accelerator.device)
        self._shaping.start(self._calibration)

    def _make_ready(self) -> None:
        """Calibrate, if that is still to be done. All processes together."""
        if self._calibration is None or (self._monitor is not None and self._monitor.needs_calibration):
            self._calibrate()

    def _read_rows(self, examples: list[Any], fresh: Tensor) -> Tensor:
        extras, inputs = split_batch(self._prepare_inputs(self.data_collator(examples)))
        _, raw = self._reference_pass(self._reference(), inputs, extras)
        valid = _valid_pairs(inputs["completion_mask"])
        looking = self._reader.monitored
        if isinstance(looking, ExcitingReader) and self._monitor is not None and raw.features is not None:
            self._monitor.calibrate_batch(raw.features, looking, inputs["input_ids"], valid & fresh.to(valid.device))
        valid = valid[:, None].float()
        gates = extras.get(keys.GATES, valid.new_ones(len(valid), len(self._reader.gate_columns)))
        return torch.cat([*raw.completion.chunk(2), raw.prompt, valid, gates], dim=1)

    def _cached_table(self) -> Tensor:
        """The same columns as `_read_rows`, of the whole training data."""
        columns = [*REF_COLUMNS, *self._reader.gate_columns]
        rows: Any = self.train_dataset
        rows = {name: torch.as_tensor(np.asarray(rows[name][:], np.float32)) for name in columns}
        raw = self._cached_scores(torch.cat([rows[name][:, 1:] for name in REF_COLUMNS]))
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

    # --------------------------------------------------------------- the step

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        if not self.concepts:
            return super().training_step(*args, **kwargs)
        # Around the backward pass too: gradient checkpointing runs the layers again there.
        with self._residual_projection:
            return super().training_step(*args, **kwargs)

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        extras, inputs = split_batch(inputs)
        if not self._reads and not extras:
            return super()._compute_loss(model, inputs, return_outputs)
        if self._reads:
            self._make_ready()
        batch = _Batch(extras, inputs)
        with restored(self, "precompute_ref_logps", "use_weighting"), batch.loss_context:
            loss = super()._compute_loss(self._policy(model, batch), inputs, return_outputs)
        # After TRL's metrics: their `.item()` calls have made the host wait for the device already.
        self._log_batch(batch)
        return loss

    def _policy(self, model: Any, batch: _Batch) -> Callable[..., Any]:
        """The policy as TRL's loss is to see it: after its forward pass, the reference is read and the signal shaped.

        In this order, because it is TRL's, and dropout draws from one stream of random numbers.
        """

        def policy(**kwargs: Any) -> Any:
            outputs = model(**kwargs)
            if kwargs.get("fused_lm_head"):  # not in the extra pass for `compute_metrics`
                if self._reads:
                    self._read(outputs, batch)
                if self._training:
                    self._shape(outputs, batch)  # evaluation is plain DPO's
            return outputs

        return policy

    def _read(self, outputs: Any, batch: _Batch) -> None:
        """Make the reference pass, or take its results from the cache, and hand them to TRL."""
        inputs, mask = batch.inputs, batch.inputs["completion_mask"]
        if self.precompute_ref_logps:
            ref_logps, raw = tuple(inputs[name] for name in REF_COLUMNS), self._cached_scores(batch.extras[keys.CACHED])
        else:
            ref_logps, raw = self._reference_pass(self._reference(), inputs, batch.extras)
            self.precompute_ref_logps = True  # until the loss is computed: TRL takes what the batch holds
            inputs.update(zip(REF_COLUMNS, ref_logps, strict=True))
        batch.features = raw.features
        valid = _valid_pairs(mask)
        assert self._calibration is not None  # by _compute_loss
        gates = batch.extras.get(keys.GATES, raw.prompt.new_ones(len(valid), len(self._reader.gate_columns)))
        batch.pairs = Pairs(
            policy_logps=super().compute_ref_log_probs(Computed(outputs.log_probs.detach()), inputs),
            ref_logps=ref_logps,
            signals=self._reader.signals(raw, self._calibration.statistics, valid, gates),
            non_finite=self._reader.non_finite(raw),
            empty=~valid,
            weights=None,
        )

    def _shape(self, outputs: Any, batch: _Batch) -> None:
        inputs, mask = batch.inputs, batch.inputs["completion_mask"]
        signals = batch.pairs.signals if batch.pairs is not None else []
        if (tilt := self._shaping.tilt(signals)) is not None:
            batch.tilted = True
            for name, offset in zip(REF_COLUMNS, tilt.chunk(2), strict=True):
                inputs[name] = inputs[name] - offset
        column = batch.extras[keys.WEIGHT][:, 0] if keys.WEIGHT in batch.extras else None
        weights = self._shaping.pair_weights(signals, self._calibration, column)
        if weights is not None:
            hand_pair_weights(outputs, weights, mask, wpo=self.use_weighting)
            self.use_weighting = True  # until the loss is computed
            batch.loss_context.enter_context(mutable_losses())
            batch.pairs = batch.pairs._replace(weights=weights) if batch.pairs is not None else None
        deltas = self._shaping.projected_deltas(signals)
        if deltas is not None and outputs.log_probs.requires_grad:
            project_policy(outputs.log_probs, deltas, mask, self.ld_alpha, self._sum)

    @property
    def _training(self) -> bool:
        model: Any = self.model
        return bool(model.training)

    def _sum(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, reduction="sum") if self.accelerator.num_processes > 1 else tensor

    def _log_batch(self, batch: _Batch) -> None:
        """Add a batch's concept metrics to those that TRL averages and logs."""
        if batch.pairs is None:
            return
        where = f"a batch of step {self.state.global_step}"
        metrics, empty = concept_metrics(
            batch.pairs, self.concepts, self._shaping.strengths, self.beta, self._sum, where
        )
        logged = self._metrics["train" if self._training else "eval"]
        for name, value in metrics.items():
            logged[name].append(value)
        if self._training:
            assert self._calibration is not None  # by _compute_loss
            self._calibration = self._calibration._replace(empty_pairs=self._calibration.empty_pairs + empty)
            logged["concepts/empty_pairs"] = [self._calibration.empty_pairs]
            assert self._monitor is not None  # it is there wherever there is a reading
            self._monitor.update(batch.pairs, batch.features, batch.extras.get(keys.ROW), self.beta, metrics)
            self._shaping.observe(batch.pairs, self.accelerator.gather, last=self.accelerator.sync_gradients)
        if batch.tilted:
            for name, value in unshaped_rewards(batch.pairs, self.beta, self.accelerator.gather).items():
                logged[name][-1] = value  # TRL's own is against the tilted reference

    # ------------------------------------------------------------ checkpoints

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As [`~transformers.Trainer.train`]. A checkpoint's calibration is taken over.

        Raises:
            ValueError: If the checkpoint was made with other concepts and `allow_concept_change` is not set.
        """
        folder: Any = self.args.output_dir
        checkpoint = get_last_checkpoint(folder) if resume_from_checkpoint is True else resume_from_checkpoint
        if self._reads and isinstance(checkpoint, str | os.PathLike):
            allow = getattr(self.args, "allow_concept_change", False)
            calibration = load_calibration(checkpoint, self.concepts, self._reader.fingerprint, allow)
            if calibration is not None:
                self._take_over(calibration)
                if self._monitor is not None:
                    self._reader.monitored = self._monitor.load_state(Path(checkpoint)) or self._reader.monitored
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self._monitor is not None:
            self._monitor.gather_state()  # on all processes, which `save_model` need not be
        super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As [`~transformers.Trainer.save_model`], with the concepts and their calibration beside the model."""
        super().save_model(output_dir, _internal_call)
        if self._calibration is not None and self.args.should_save:
            folder: Any = output_dir if output_dir is not None else self.args.output_dir
            hold = self._shaping.hold.state() if self._shaping.hold is not None else None
            save_calibration(folder, self._calibration._replace(hold=hold), self.concepts, self._reader.fingerprint)
            if self._monitor is not None and _internal_call:  # of a checkpoint, not of the finished model
                self._monitor.save_state(Path(folder))


class _Batch:
    """The batch whose loss is being computed.

    Attributes:
        extras: What the collator added, unpacked.
        inputs: What TRL knows of it.
        pairs: What was read of it, if anything is read.
        features: Raw scores of the monitored features, `(2B, F)`, if there are any.
        tilted: Whether TRL was handed a tilted reference.
        loss_context: Open until TRL has computed the loss.
    """

    def __init__(self, extras: dict[str, Tensor], inputs: dict[str, Any]) -> None:
        self.extras = extras
        self.inputs = inputs
        self.pairs: Pairs | None = None
        self.features: Tensor | None = None
        self.tilted = False
        self.loss_context = ExitStack()


def _valid_pairs(completion_mask: Tensor) -> Tensor:
    """`(B,)` bool: whether both completions have a token that the loss predicts."""
    chosen, rejected = (completion_mask[:, 1:].sum(dim=1) > 0).chunk(2)
    return chosen & rejected
