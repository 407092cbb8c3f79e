"""The trainer: TRL's, with the concepts read in the reference pass and the signal shaped on its way into TRL's loss."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import Tensor
from trl.trainer.utils import get_config_model_id

from . import collator as keys
from .batch import Batch
from .calibration import Calibration
from .collator import check_columns, split_batch
from .composition import check_methods
from .concept import Concept, resolve_concepts
from .config import ShapedDPOConfig
from .filtering import check_filters
from .intervening_trainer import InterveningTrainer
from .metrics import Pairs, concept_metrics
from .monitor import RecentRows, RunMonitor, Source, TrainerAccess, make_sinks, monitor_settings, numbered
from .monitor.wandb import guard_wandb
from .openings import REF_COLUMNS, check_trl, hand_pair_weights, mutable_losses, restored, sequence_logps, without
from .parameter_projection import ParameterProjection, check_parameter_projection
from .processes import all_or_none
from .reading import ConceptReader
from .reading_trainer import valid_pairs
from .shaping import Shaping, project_policy
from .steering import policy_steering


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


class ShapedDPOTrainer(InterveningTrainer):
    r"""[`~trl.DPOTrainer`] that reads concepts in the reference pass and shapes what the policy learns about them.

    TRL computes the loss. The reference pass that it would make is made with hooks that read the concepts, and its
    log-probabilities are handed to TRL's loss, tilted where a concept asks for it; pair weights and projections enter through
    the policy's output. Without concepts, and with concepts that only watch, every loss, gradient and metric is that of
    `DPOTrainer`, bit for bit. Evaluation is always plain DPO's.

    Each logging step has, per concept, `concepts/<name>/amplification` (\\( \overline{(l(y^+) - l(y^-))\, d}/4 \\), the
    first-order change of its mean score from reference to policy), `.../pressure` (\\( \overline{\sigma(-m)\, d} \\), how hard
    the loss still pushes it), `.../delta` (\\( \overline{d} \\)), both of the unshaped margin, and `.../strength`.
    Methods that change what the policy reads or computes say how much: `.../tokens`, the share of completion tokens that left the loss;
    `.../steer`, `.../ablate` and `.../inoculate`, the share of completions; `.../residual`, the mean of its delta in nats; and `.../projected`,
    how much of the step's gradient lay along the concept's.
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
        if concepts is not None and isinstance(args, ShapedDPOConfig):
            args = copy.copy(args)  # the caller's may be for other runs too
            args.concepts = self.concepts or None  # so that the run's config has them wherever they were given
        keeps_reference = ref_model is not None or peft_config is not None or isinstance(model, PeftModel)
        settings, monitored = monitor_settings(args, self.concepts, keeps_reference)
        self._weight_column: str | None = None
        if isinstance(train_dataset, Dataset | IterableDataset):  # else TRL says what is wrong with it
            self._weight_column = check_columns(self.concepts, getattr(args, "weight_column", None), train_dataset)
        _ = args.distributed_state  # so that the processes know of each other
        with all_or_none():
            self._reader = ConceptReader(self.concepts, monitored)
        self._reads = bool(self.concepts) or monitored is not None
        self._monitor: RunMonitor | None = None
        source = Source(None, None)
        if self._reads:
            train_dataset, source = numbered(train_dataset, args.process_index, args.world_size)
            check_filters(self.concepts, train_dataset)
        self._recent = RecentRows(settings.window) if source.rows is None and self._reads else None
        pairs = args.per_device_train_batch_size * args.world_size
        for warning in check_methods(self.concepts, self._reader.readers, args, self._weight_column, pairs):
            logger.warning(warning)
        if self._reads and args.sync_ref_model:
            raise ValueError(
                "`sync_ref_model=True` moves the reference during training, and with it what the concepts' scores mean. "
                "Leave the concepts or `sync_ref_model` out."
            )
        self._shaping = Shaping.of(self.concepts, args)
        self._prepare_interventions(args)
        self._training_data = train_dataset
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
            run = TrainerAccess(self, source, self._recent)
            reader: Any = self._reader.monitored
            with all_or_none():  # a file of labels can be missing too
                self._monitor = RunMonitor(run, settings, reader, make_sinks(self.args))
            self.add_callback(self._monitor)
            guard_wandb(self.callback_handler)
            if self.precompute_ref_logps:
                self._calibrate()  # nothing needs to run for it

    def _prepare_reading(self) -> None:
        """Prepare the methods with the readouts: before the reference's log-probabilities are precomputed, which takes as long as an epoch."""
        if self._reading_ready:
            return
        super()._prepare_reading()
        policy: Any = self.model
        self._residual_projection = self._shaping.residual_projection(policy, self._reader.readers)
        check_parameter_projection(self.concepts, self.args, self.is_deepspeed_enabled or self.is_fsdp_enabled)
        self._parameter_projection = ParameterProjection(policy, self.concepts)
        self._steering = policy_steering(policy, self.concepts, self._steering_readers)

    def _additions(self) -> list[Any]:
        return [*super()._additions(), *([self._recent] if self._recent is not None else [])]

    def _calibrate(self) -> None:
        super()._calibrate()
        if self._recent is not None:
            self._recent.clear()  # another row may be trained on under the same number, where workers count them

    # --------------------------------------------------------------- the step

    def _take_over(self, calibration: Calibration) -> None:
        """Make a calibration the run's, with the state of the controller of held concepts if it has one."""
        super()._take_over(calibration)
        assert self._calibration is not None
        for warning in self._shaping.start(self._calibration):
            logger.warning(warning)

    def _hand_over(self) -> Calibration:
        hold = self._shaping.hold
        return super()._hand_over()._replace(hold=hold.state() if hold is not None else None)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        if not self.concepts:
            return super().training_step(*args, **kwargs)
        # Around the backward pass too: gradient checkpointing runs the layers again there.
        with self._residual_projection, self._steering, self._parameter_projection:
            loss = super().training_step(*args, **kwargs)
        if self._parameter_projection and self.accelerator.sync_gradients:
            for index, share in self._parameter_projection.apply(self._sum).items():
                self._metrics["train"][f"concepts/{self.concepts[index].name}/projected"].append(share)
        return loss

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        extras, inputs = split_batch(inputs)
        if not self._reads and not extras:
            return super()._compute_loss(model, inputs, return_outputs)
        if self._reads:
            self._make_ready()
        batch = Batch(extras, inputs)
        with restored(self, "precompute_ref_logps", "use_weighting"), batch.loss_context:
            if self._reads_first and self._training:
                self._read(batch)
                self._intervene(batch)
            loss = super()._compute_loss(self._policy(model, batch), batch.inputs, return_outputs)
        # After TRL's metrics: their `.item()` calls have made the host wait for the device already.
        self._log_batch(batch)
        return loss if batch.penalty is None else loss + batch.penalty

    def _policy(self, model: Any, batch: Batch) -> Callable[..., Any]:
        """The policy as TRL's loss is to see it: after its forward pass, the reference is read and the signal shaped.

        In this order, because it is TRL's, and dropout draws from one stream of random numbers. Only what changes the policy's own pass
        has had the reference read before.
        """

        def policy(**kwargs: Any) -> Any:
            if not kwargs.get("fused_lm_head"):  # the extra pass for `compute_metrics`
                return model(**kwargs)
            if batch.leaving is not None:  # all tokens are wanted first
                kwargs["labels"] = kwargs["input_ids"].masked_fill(batch.mask == 0, -100)
            outputs = model(**kwargs)
            if self._reads:
                if batch.ref_logps is None:
                    self._read(batch)
                batch.pairs = self._pairs(outputs, batch)
            if self._training:
                self._shape(outputs, batch)  # evaluation is plain DPO's
            return outputs

        return policy

    def _read(self, batch: Batch) -> None:
        """Make the reference pass, or take its results from the cache, and hand them to TRL."""
        inputs, mask = batch.inputs, batch.mask
        if self.precompute_ref_logps:
            cached = batch.extras[keys.CACHED]
            # Not TRL's columns, which a trainer under DeepSpeed rounds to bf16: by nats, in a long completion.
            ref_logps, raw = cached[:, 0].chunk(2), self._cached_scores(cached)
        else:
            ref_logps, raw = self._reference_pass(self._reference(), inputs, batch.extras)
            if self._training:
                raw = raw._replace(residuals=self._residuals(self._reference(), inputs, batch.extras, ref_logps))
            self.precompute_ref_logps = True  # until the loss is computed: TRL takes what the batch holds
            inputs.update(zip(REF_COLUMNS, ref_logps, strict=True))
        batch.ref_logps, batch.features = ref_logps, raw.features
        valid = valid_pairs(mask)
        assert self._calibration is not None  # by _compute_loss
        gates = batch.extras.get(keys.GATES, raw.prompt.new_ones(len(valid), len(self._reader.gate_columns)))
        batch.signals = self._reader.signals(raw, self._calibration.statistics, valid, gates)
        batch.non_finite = self._reader.non_finite(raw)
        if self._n_residuals and self._training:
            self._take_residuals(batch, raw.residuals)

    def _pairs(self, outputs: Any, batch: Batch) -> Pairs:
        """What metrics need of the batch, all of its tokens counted."""
        return Pairs(
            policy_logps=sequence_logps(outputs.log_probs.detach(), batch.mask, self.ld_alpha),
            ref_logps=batch.ref_logps,
            signals=batch.signals,
            non_finite=batch.non_finite,
            empty=~valid_pairs(batch.mask),
            weights=None,
        )

    def _shape(self, outputs: Any, batch: Batch) -> None:
        inputs, mask, signals = batch.inputs, batch.inputs["completion_mask"], batch.signals
        if batch.pairs is not None:
            batch.penalty = self._shaping.penalty(outputs.log_probs, batch.mask, self.ld_alpha, batch.pairs)
        if batch.leaving is not None:
            outputs.log_probs = without(outputs.log_probs, batch.leaving)
        if (tilt := self._shaping.tilt(signals)) is not None:
            batch.tilt = tilt
            for name, offset in zip(REF_COLUMNS, tilt.chunk(2), strict=True):
                inputs[name] = inputs[name] - offset
        column = batch.extras[keys.WEIGHT][:, 0] if keys.WEIGHT in batch.extras else None
        weights = self._shaping.pair_weights(signals, self._calibration, column)
        if weights is not None:
            hand_pair_weights(outputs, weights, mask, wpo=self.use_weighting)
            self.use_weighting = True  # until the loss is computed
            batch.loss_context.enter_context(mutable_losses())
            batch.pairs = batch.pairs._replace(weights=weights) if batch.pairs is not None else None
        if self._parameter_projection and outputs.log_probs.requires_grad:
            self._parameter_projection.add(signals, *sequence_logps(outputs.log_probs, mask, self.ld_alpha))
            # Hooks that project the loss's gradient in pair space must not see the concepts'.
            outputs.log_probs = outputs.log_probs.view_as(outputs.log_probs)
        deltas = self._shaping.projected_deltas(signals)
        if deltas is not None and outputs.log_probs.requires_grad:
            project_policy(outputs.log_probs, deltas, mask, self.ld_alpha, self._sum)

    @property
    def _training(self) -> bool:
        model: Any = self.model
        return bool(model.training)

    def _sum(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, reduction="sum") if self.accelerator.num_processes > 1 else tensor

    def _log_batch(self, batch: Batch) -> None:
        """Add a batch's concept metrics to those that TRL averages and logs."""
        if batch.pairs is None:
            return
        where = f"a batch of step {self.state.global_step}"
        metrics, empty, unshaped = concept_metrics(
            batch.pairs, self.concepts, self._shaping.strengths, self.beta, self._sum, where, batch.shares
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
            last = self.accelerator.sync_gradients
            self._shaping.observe(batch.pairs, batch.mask, self.accelerator.gather, last, batch.tilt)
        if batch.tilt is not None or batch.leaving is not None:
            for name, value in unshaped.items():
                if name.startswith("rewards/") or batch.leaving is not None:
                    logged[name][-1] = value  # TRL's own is against the tilted reference, or of the tokens that stay
