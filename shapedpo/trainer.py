"""The trainer: TRL's, with the concepts read in the reference pass and the signal shaped on its way into TRL's loss."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.logging import get_logger
from accelerate.utils import tqdm
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers.trainer_utils import get_last_checkpoint
from trl import DPOTrainer
from trl.trainer import utils as trl_utils
from trl.trainer.utils import get_config_model_id

from . import collator as batch_keys
from .calibration import Calibration, calibrate, load_calibration, raise_non_finite, save_calibration
from .collator import REF_COLUMNS, ConceptCollator, check_gate, check_weight, unpack
from .concept import Concept, resolve_concepts
from .config import ShapedDPOConfig
from .reading import ConceptReader, RawScores, reading_masks
from .shapers import ConceptSignal
from .shaping import Shaping, check_methods, shape_policy


logger = get_logger(__name__)

TRL_VERSIONS = ">=1.15,<1.17"
"""The releases of TRL that have the openings of its loss that we use."""

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
        model: Any,
        ref_model: Any = None,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        callbacks: Any = None,
        optimizers: Any = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        concepts: str | Iterable[Concept | Mapping[str, Any]] | None = None,
    ) -> None:
        _check_trl()
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = ShapedDPOConfig(f"{model_name.split('/')[-1]}-DPO")
        configured = getattr(args, "concepts", None)
        if concepts is not None and configured:
            raise ValueError("Concepts are given both as `concepts=` and in `args.concepts`. Give them in one place.")
        self.concepts = resolve_concepts(configured if concepts is None else concepts)
        if isinstance(args, ShapedDPOConfig):
            args.concepts = self.concepts or None  # so that the run's config has them wherever they were given
        self._check_columns(args, train_dataset, eval_dataset)
        self._reader = ConceptReader(self.concepts)
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
        self._empty_pairs = 0
        self._reading_ready = False
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
        if self.concepts and self.precompute_ref_logps:
            self._calibrate_from_cache()

    # ------------------------------------------------------------------ data

    def _check_columns(self, args: Any, train_dataset: Any, eval_dataset: Any) -> None:
        """Find the weight column and check that the columns that gates name are there, and what they hold."""
        self._weight_column: str | None = None
        if not isinstance(train_dataset, Dataset | IterableDataset):
            return  # TRL says what is wrong with it
        row = next(iter(train_dataset))
        weight_column = getattr(args, "weight_column", None)
        if weight_column in row:
            self._weight_column = weight_column
            logger.info(f"Column {weight_column!r} weights the pairs' losses.")
        elif weight_column not in (None, "weight"):
            raise ValueError(f"The dataset has no weight column {weight_column!r}. Its columns are {', '.join(row)}.")
        for concept in self.concepts:
            column = getattr(concept.gate, "column", None)
            if column is not None and column not in row:
                raise ValueError(
                    f"Concept {concept.name!r}: the dataset has no gate column {column!r}. Its columns are {', '.join(row)}."
                )
            if column is not None:
                check_gate(row, column)
        if self._weight_column is not None and isinstance(train_dataset, Dataset):
            for weight in train_dataset.unique(self._weight_column):
                check_weight({self._weight_column: weight}, self._weight_column)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        extra = [*self._reader.gate_columns, *([self._weight_column] if self._weight_column else [])]
        self._signature_columns += [column for column in extra if column not in self._signature_columns]

    def _prepare_reading(self) -> None:
        """Check the concepts against the model and wrap the collator, once; before the first batch is made."""
        if self._reading_ready:
            return
        self._reading_ready = True
        reader = self._reader
        if (
            reader.text_readouts
            or reader.gate_columns
            or self._weight_column
            or (self.concepts and self.precompute_ref_logps)
        ):
            self.data_collator = ConceptCollator(
                self.data_collator,
                self._tokenizer,
                reader.text_readouts,
                prompt_text=bool(reader.prompt_index),
                weight_column=self._weight_column,
                gate_columns=reader.gate_columns,
            )
        if not self.concepts:
            return
        # Before `train`, neither model is wrapped by DDP or an engine, but for a reference that DeepSpeed has.
        model = self.accelerator.unwrap_model(self.ref_model or self.model)
        for warning in reader.check_model(model, model.config.get_text_config()):
            logger.warning(warning)
        self._residual_projection = self._shaping.residual_projection(self.model, reader.readers)

    # --------------------------------------------------- the reference reads

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        """TRL's, for a batch that may carry our keys.

        While precomputing, each completion's scores ride behind its log-probability, so that TRL's own code gathers and caches
        them beside it.
        """
        extras, inputs = _split(inputs)
        if not self._precomputing:
            return super().compute_ref_log_probs(model, inputs)
        logps, raw = self._reference_pass(model, inputs, extras)
        valid = _valid_pairs(inputs["completion_mask"]).float()
        columns = [
            torch.cat([logp[:, None].float(), valid[:, None], scores, raw.prompt], dim=1)
            for logp, scores in zip(logps, raw.completion.chunk(2), strict=True)
        ]
        return tuple(columns)

    _precomputing = False

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        self._prepare_reading()
        if not self.concepts:
            return super()._precompute_ref_logps(dataset, name, batch_size)
        if self._reader.n_columns > MAX_CACHED_SCORES:
            widest = max(zip(self.concepts, self._reader.readers, strict=True), key=lambda pair: pair[1].n_features)
            raise ValueError(
                f"Concept {widest[0].name!r} reads {widest[1].n_features} features. With `precompute_ref_log_probs=True` all "
                f"scores are cached for every completion, and {self._reader.n_columns} are more than {MAX_CACHED_SCORES}. "
                "Read fewer features, or set `precompute_ref_log_probs=False`."
            )
        model_hash = self._precompute_model_hash
        # Other concepts, other cache.
        self._precompute_model_hash = (model_hash, self._reader.fingerprint)
        self._precomputing = True
        try:
            return super()._precompute_ref_logps(dataset, name, batch_size)
        finally:
            self._precomputing = False
            self._precompute_model_hash = model_hash

    def _reference_pass(
        self, model: Any, inputs: dict[str, Any], extras: dict[str, Tensor]
    ) -> tuple[tuple[Tensor, Tensor], RawScores]:
        """The one pass of the reference: its log-probabilities, `(B,)` each, and the concepts' raw scores."""
        completion, prompt = reading_masks(inputs, self._tokenizer.bos_token_id, self._tokenizer.eos_token_id)
        with self._reader.capture(self.accelerator.unwrap_model(model), completion, prompt) as capture:
            logps = super().compute_ref_log_probs(model, inputs)
        text, prompt_text = extras.get(batch_keys.TEXT), extras.get(batch_keys.PROMPT_TEXT)
        return logps, self._reader.assemble(capture.scores, text, prompt_text)

    def _cached_scores(self, cached: Tensor) -> RawScores:
        """Raw scores from rows as `compute_ref_log_probs` lays them out while precomputing: `(2B, 1 + F + P)`."""
        _, completion, prompt = cached.split([1, self._reader.n_columns, self._reader.n_prompt_columns], dim=1)
        return RawScores(completion, prompt[: len(prompt) // 2])

    # ------------------------------------------------------------ calibration

    def _calibrate_from_cache(self) -> None:
        rows = self.train_dataset.with_format("torch", columns=[*REF_COLUMNS, *self._reader.gate_columns])[:]
        cached = torch.cat([torch.as_tensor(rows[column], dtype=torch.float32)[:, 1:] for column in REF_COLUMNS])
        pairs = len(cached) // 2
        gates = [torch.as_tensor(rows[column], dtype=torch.float32) for column in self._reader.gate_columns]
        self._set_calibration(
            self._cached_scores(cached),
            cached[:pairs, 0] > 0,
            torch.stack(gates, dim=1) if gates else torch.zeros(pairs, 0),
        )

    def _calibrate(self) -> None:
        """Read the reference on a sample of the training data. All ranks do the same number of passes."""
        args, world, rank = self.args, self.accelerator.num_processes, self.accelerator.process_index
        size = args.per_device_train_batch_size
        examples = self._calibration_examples(getattr(args, "calibration_size", 512))
        # Rows are dealt out to ranks and wrapped around, for ranks must not wait for each other in vain; repeats are cut off.
        rounds = -(-len(examples) // (size * world))
        dealt = np.resize(np.arange(len(examples)), (rounds, world, size))[:, rank]
        parts = []
        with torch.random.fork_rng(enabled=self.accelerator.device.type in ("cpu", "cuda")):
            for indices in tqdm(dealt, desc="Calibrating concepts"):
                inputs = self._prepare_inputs(self.data_collator([examples[index] for index in indices]))
                extras, inputs = _split(inputs)
                raw = self._reference_pass(self._reference(), inputs, extras)[1]
                chosen, rejected = raw.completion.chunk(2)
                gates = extras.get(batch_keys.GATES, torch.zeros(size, 0, device=chosen.device))
                valid = _valid_pairs(inputs["completion_mask"])[:, None].float()
                parts.append(torch.cat([chosen, rejected, raw.prompt, gates, valid], dim=1))
        table = torch.stack(parts)  # (rounds, size, columns)
        if world > 1:
            table = self.accelerator.gather(table).unflatten(0, (world, -1)).transpose(0, 1)
        table = table.reshape(-1, table.shape[-1])[: len(examples)]
        f, p, g = self._reader.n_columns, self._reader.n_prompt_columns, len(self._reader.gate_columns)
        chosen, rejected, prompt, gates, valid = table.split([f, f, p, g, 1], dim=1)
        self._set_calibration(RawScores(torch.cat([chosen, rejected]), prompt), valid[:, 0] > 0, gates)

    def _calibration_examples(self, size: int) -> list[dict[str, Any]]:
        if isinstance(self.train_dataset, IterableDataset):
            rows: Iterator[Any] = iter(self.train_dataset.take(size))
        else:
            order = np.random.default_rng(self.args.seed).permutation(len(self.train_dataset))[:size]
            rows = iter(self.train_dataset.select(sorted(order)))
        self._set_signature_columns_if_needed()
        keep = self._signature_columns if self.args.remove_unused_columns else None
        return [{key: row[key] for key in row if keep is None or key in keep} for row in rows]

    def _set_calibration(self, raw: RawScores, valid: Tensor, gates: Tensor) -> None:
        calibration, warnings = calibrate(self._reader, raw, valid, gates)
        for warning in warnings:
            logger.warning(warning)
        self._calibration = calibration.to(self.accelerator.device)

    def _reference(self) -> Any:
        return self.ref_model if self.ref_model is not None else self.model

    # --------------------------------------------------------------- the step

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        # Around the backward pass too: gradient checkpointing runs the layers again there.
        if not self.concepts:
            return super().training_step(*args, **kwargs)
        with self._residual_projection:
            return super().training_step(*args, **kwargs)

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        extras, inputs = _split(inputs)
        if not self.concepts and not extras:
            return super()._compute_loss(model, inputs, return_outputs)
        if self.concepts and self._calibration is None:
            self._calibrate()
        batch = _Batch(extras, inputs)
        with self._restored("precompute_ref_logps", "use_weighting"):
            loss = super()._compute_loss(self._policy(model, batch), inputs, return_outputs)
        self._log_concepts(batch)
        return loss

    def _policy(self, model: Any, batch: _Batch) -> Callable[..., Any]:
        """The policy as TRL's loss is to see it: after its forward pass the reference is read and the signal shaped.

        In this order, and not the reference first, because it is TRL's, and dropout draws from one stream of random numbers.
        """

        def policy(**kwargs: Any) -> Any:
            outputs = model(**kwargs)
            if kwargs.get("fused_lm_head"):
                self._shape(outputs, batch)
            return outputs

        return policy

    def _shape(self, outputs: Any, batch: _Batch) -> None:
        inputs, extras = batch.inputs, batch.extras
        mask = inputs["completion_mask"]
        if self.concepts:
            if self.precompute_ref_logps:
                batch.ref_logps = (inputs[REF_COLUMNS[0]], inputs[REF_COLUMNS[1]])
                raw = self._cached_scores(extras[batch_keys.CACHED])
            else:
                batch.ref_logps, raw = self._reference_pass(self._reference(), inputs, extras)
                self.precompute_ref_logps = True  # until the loss is done: TRL then takes what the batch holds
            assert self._calibration is not None  # by _compute_loss
            gates = extras.get(batch_keys.GATES, torch.zeros(len(mask) // 2, 0))
            batch.bad = self._reader.non_finite(raw)
            batch.signals = self._reader.signals(raw, self._calibration.statistics, _valid_pairs(mask), gates)
            batch.policy_logps = super().compute_ref_log_probs(_Computed(outputs.log_probs.detach()), inputs)
            inputs.update(zip(REF_COLUMNS, batch.ref_logps, strict=True))
        if not self.model.training:
            return  # evaluation is plain DPO's
        if (tilt := self._shaping.tilt(batch.signals)) is not None:
            batch.tilted = True
            chosen, rejected = tilt.chunk(2)
            inputs[REF_COLUMNS[0]] = batch.ref_logps[0] - chosen
            inputs[REF_COLUMNS[1]] = batch.ref_logps[1] - rejected
        batch.weights = self._shaping.pair_weights(
            batch.signals, self._calibration, extras[batch_keys.WEIGHT][:, 0] if batch_keys.WEIGHT in extras else None
        )
        shape_policy(
            outputs,
            mask,
            batch.weights,
            self._shaping.projected_deltas(batch.signals),
            wpo=self.use_weighting,
            ld_alpha=self.ld_alpha,
            reduce=self._sum,
        )
        if batch.weights is not None:
            self.use_weighting = True  # until the loss is done

    def _sum(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, reduction="sum") if self.accelerator.num_processes > 1 else tensor

    @contextmanager
    def _restored(self, *names: str) -> Iterator[None]:
        values = {name: getattr(self, name) for name in names}
        try:
            yield
        finally:
            for name, value in values.items():
                setattr(self, name, value)

    # ---------------------------------------------------------------- logging

    def _log_concepts(self, batch: _Batch) -> None:
        """Add the concepts' metrics of a batch, over all processes, to those that TRL averages and logs.

        Comes after TRL's own metrics, whose `.item()` calls have made the host wait for the device already.
        """
        metrics = self._metrics["train" if self.model.training else "eval"]
        if not self.concepts:
            return
        (chosen, rejected), (ref_chosen, ref_rejected) = batch.policy_logps, batch.ref_logps
        apart = (chosen - ref_chosen) - (rejected - ref_rejected)  # (B,), unshaped log-ratio of the pair
        push = torch.sigmoid(-self.beta * apart.float())
        rows = []
        for signal, bad in zip(batch.signals, batch.bad, strict=True):
            d = signal.delta
            rows.append(torch.stack([(apart * d).sum() / 4, (push * d).sum(), d.sum(), bad]))
        valid = _valid_pairs(batch.inputs["completion_mask"])
        weights = batch.weights if batch.weights is not None else torch.zeros_like(push)
        counts = torch.stack([torch.ones_like(push).sum(), (~valid).float().sum(), weights.sum(), push.new_zeros(())])
        totals = self._sum(torch.stack([*rows, counts]).float()).tolist()
        (pairs, empty, weight, _) = totals.pop()
        raise_non_finite(self.concepts, [row[3] for row in totals], f"the batch of step {self.state.global_step}")
        for concept, (amplification, pressure, delta, _) in zip(self.concepts, totals, strict=True):
            prefix = f"concepts/{concept.name}"
            metrics[f"{prefix}/amplification"].append(amplification / pairs)
            metrics[f"{prefix}/pressure"].append(pressure / pairs)
            metrics[f"{prefix}/delta"].append(delta / pairs)
            metrics[f"{prefix}/strength"].append(abs(concept.signed_strength) if concept.shapes else 0.0)
        if batch.weights is not None:
            metrics["concepts/pair_weight"].append(weight / pairs)
        if self.model.training:
            self._empty_pairs += int(empty)
            metrics["concepts/empty_pairs"] = [self._empty_pairs]
        if batch.tilted:
            self._unshape_rewards(metrics, batch)

    def _unshape_rewards(self, metrics: dict[str, list[float]], batch: _Batch) -> None:
        """TRL has logged rewards against the tilted reference: put those against the reference in their place."""
        rewards = [self.beta * (logps - ref) for logps, ref in zip(batch.policy_logps, batch.ref_logps, strict=True)]
        chosen, rejected = self.accelerator.gather(torch.stack(rewards, dim=1)).unbind(dim=1)
        unshaped = {
            "chosen": chosen,
            "rejected": rejected,
            "accuracies": (chosen > rejected).float(),
            "margins": chosen - rejected,
        }
        for name, values in unshaped.items():
            metrics[f"rewards/{name}"][-1] = values.mean().item()

    # ------------------------------------------------------------ checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As [`~transformers.Trainer.train`]. A checkpoint's calibration is taken over.

        Raises:
            ValueError: If the checkpoint was made with other concepts and `allow_concept_change` is not set.
        """
        checkpoint = (
            get_last_checkpoint(self.args.output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
        )
        if self.concepts and isinstance(checkpoint, str | os.PathLike):
            allow = getattr(self.args, "allow_concept_change", False)
            calibration = load_calibration(checkpoint, self.concepts, self._reader.fingerprint, allow)
            if calibration is not None:
                self._calibration = calibration.to(self.accelerator.device)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As [`~transformers.Trainer.save_model`], with the concepts and their calibration beside the model."""
        super().save_model(output_dir, _internal_call)
        if self._calibration is not None and self.args.should_save:
            folder = output_dir if output_dir is not None else self.args.output_dir
            save_calibration(folder, self._calibration, self.concepts, self._reader.fingerprint)


class _Batch:
    """What is known of the batch whose loss is being computed."""

    def __init__(self, extras: dict[str, Tensor], inputs: dict[str, Any]) -> None:
        self.extras = extras
        self.inputs = inputs
        self.ref_logps: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))  # (B,) each, never tilted
        self.policy_logps: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))
        self.signals: list[ConceptSignal] = []
        self.bad = torch.empty(0)  # (C,), numbers of scores that are not finite
        self.weights: Tensor | None = None
        self.tilted = False


class _Computed(NamedTuple):
    """A model that has run already: lets TRL reduce the policy's token log-probabilities as it does the reference's."""

    log_probs: Tensor

    def __call__(self, **kwargs: Any) -> _Computed:
        return self


def _split(inputs: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Our keys of a batch, unpacked, and TRL's."""
    extras = {key: unpack(value) for key, value in inputs.items() if key in batch_keys.KEYS}
    return extras, {key: value for key, value in inputs.items() if key not in batch_keys.KEYS}


def _valid_pairs(completion_mask: Tensor) -> Tensor:
    """`(B,)` bool: whether both completions have a token that the loss predicts."""
    chosen, rejected = (completion_mask[:, 1:].sum(dim=1) > 0).chunk(2)
    return chosen & rejected


def _check_trl() -> None:
    """Raise `ImportError` if the installed TRL lacks an opening of its loss that we use."""
    missing = []
    for name, parameters in {
        "_compute_loss": ["self", "model", "inputs", "return_outputs"],
        "compute_ref_log_probs": ["self", "model", "inputs"],
        "_precompute_ref_logps": ["self", "dataset", "name", "batch_size"],
        "_set_signature_columns_if_needed": ["self"],
    }.items():
        method = getattr(DPOTrainer, name, None)
        if method is None or list(inspect.signature(method).parameters) != parameters:
            missing.append(f"DPOTrainer.{name}({', '.join(parameters)})")
    fused = getattr(trl_utils, "FusedCausalLMOutput", None)
    missing += [
        f"FusedCausalLMOutput.{field}"
        for field in ("log_probs", "log_sum_sq_probs")
        if field not in getattr(fused, "__dataclass_fields__", {})
    ]
    if missing:
        raise ImportError(
            f"trl {version('trl')} lacks {', '.join(missing)}, through which ShapedDPOTrainer enters the loss. The versions that "
            f"have it are trl{TRL_VERSIONS}: pip install 'trl{TRL_VERSIONS}'."
        )
