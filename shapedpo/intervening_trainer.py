"""DPOTrainer that changes what the policy's forward pass is about, on what the reference has read. The wiring only, as in `trainer.py`."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from torch import Tensor
from trl.trainer.utils import global_then_local_main_first

from . import inoculation
from .batch import Batch
from .composition import check_composition
from .filtering_trainer import FilteringTrainer
from .inoculation import InoculatedSequences, Mixed, inoculated_columns
from .openings import REF_COLUMNS, sequence_logps
from .prompts import TURN, TURN_COLUMN, TurnStart, turn_tokens
from .reading_trainer import valid_pairs
from .readouts import LoadedReadout
from .shapers import Inoculate, Residual
from .shapers.steering import ForwardEdit
from .steering import Edit, Steering, residual_edit, steering_readers
from .tokens import TokenFilter


logger = get_logger(__name__)


class InterveningTrainer(FilteringTrainer):
    """Carries out the methods for which the reference is read before the policy.

    A subclass calls `_prepare_interventions` before `DPOTrainer.__init__`.

    Attributes:
        _reads_first: Whether there is such a method. Without one, nothing here is run.
        _tokens: Says which tokens leave the loss.
        _steering_readers: By concept, what gives the direction that its method steers by.
        _steering: Changes the policy's hidden states; the subclass enters it around a training step.
        _inoculated: The index of the concept of method `inoculate`, if there is one.
        _residual: The options of the concepts of method `residual`, by index.
        _residual_edits: How the reference is steered for those of them that steer it.
        _instructed: The instruction and its place of the concepts that have one, by index.
        _needs_turns: Whether final user turns must be found.
        _training_data: The training data, as `DPOTrainer.__init__` is given it. The subclass sets it.
    """

    _training_data: Any
    _reads_first: bool
    _steering_readers: list[LoadedReadout]
    _tokens: TokenFilter
    _steering: Steering

    def _prepare_interventions(self, args: Any) -> None:
        """Check the methods against their readouts.

        Raises:
            ValueError: If one does not fit; the text names the concept.
        """
        reader = self._reader
        self._reads_first = any(concept.shapes and concept.shaper.reads_first for concept in self.concepts)
        self._tokens = TokenFilter(reader, args.precompute_ref_log_probs)
        self._steering_readers = steering_readers(self.concepts, reader.readers)
        check_composition(self.concepts, args)
        shapers = {index: concept.shaper for index, concept in enumerate(self.concepts) if concept.shapes}
        inoculated = [index for index, shaper in shapers.items() if isinstance(shaper, Inoculate)]
        self._inoculated = inoculated[0] if inoculated else None
        self._residual = {index: shaper for index, shaper in shapers.items() if isinstance(shaper, Residual)}
        self._n_residuals = len(self._residual)
        self._residual_edits: dict[int, Edit] = {}
        if self._residual and not args.precompute_ref_log_probs:
            names = ", ".join(repr(self.concepts[index].name) for index in self._residual)
            logger.warning(
                f"Method 'residual' makes {self._n_residuals} further pass(es) of the reference in each step, for {names}. With "
                "`precompute_ref_log_probs=True` they are made once, before training."
            )
        self._instructed = {
            index: (shaper.instruction, shaper.place)
            for index, shaper in shapers.items()
            if isinstance(shaper, Inoculate | Residual) and shaper.instruction
        }
        # The turns of instructed prompts are told from those of the prompts as they are.
        self._needs_turns = any(isinstance(shaper, ForwardEdit | Inoculate | Residual) for shaper in shapers.values())

    # ------------------------------------------------------------------- data

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, dataset_name: str
    ) -> Dataset | IterableDataset:
        # Not by its name: a part of the evaluation data may be called "train" too
        trained_on = dataset is self._training_data
        dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if not trained_on:  # evaluation is plain DPO's
            weighted = self._weight_column is not None and self._weight_column in next(iter(dataset), {})
            return dataset.remove_columns(self._weight_column) if weighted else dataset
        if isinstance(dataset, Dataset) and not len(dataset):
            raise ValueError(
                f"No row of the training data is left: every prompt alone fills `max_length={args.max_length}`. Raise it, or set "
                "truncation_mode='keep_end'."
            )
        given: dict[str, Any] = {"processing_class": processing_class}
        if self._needs_turns:
            dataset = _mapped(dataset, _add_turn_tokens, given, args, "Finding the final user turns")
        for index, (instruction, place) in self._instructed.items():
            # A mapping of its own: a stream calls the function later.
            given = {**given, "instruction": instruction, "place": place, "concept": index}
            try:
                inoculated_columns(next(iter(dataset)), **given)  # of a stream too, whose other rows come later
                dataset = _mapped(dataset, inoculated_columns, given, args, "Inoculating prompts")
            except Exception as error:  # whatever a chat template says of a message that it does not take
                concept = self.concepts[index]
                raise ValueError(f"Concept {concept.name!r}: method {concept.shaper.name!r}: {error}") from error
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        extra = [inoculation.column(name, index) for index in self._instructed for name in ("ids", "turn")]
        extra += [TURN_COLUMN]
        columns += [name for name in extra if name not in columns]  # of which the data has what there is

    def _additions(self) -> list[Any]:
        marks = self._tokens.marks(self._tokenizer)
        turns = TurnStart() if self._needs_turns else None
        if turns is not None and self._is_vision_dataset:
            raise ValueError(
                "Methods 'steer', 'ablate', 'inoculate' and 'residual' look into a prompt's tokens, which TRL makes of a vision data set in "
                "the collator only. Use another method."
            )
        for index, shaper in self._residual.items():
            if shaper.steer is not None:
                model = self._unwrapped(self._reference())
                self._residual_edits[index] = residual_edit(model, self.concepts, self._steering_readers, index)
        pad = self._tokenizer.pad_token_id
        sequences = [InoculatedSequences(index, pad, self.args.seed) for index in self._instructed]
        return [*super()._additions(), *(adds for adds in (marks, turns, *sequences) if adds is not None)]

    def _reference_pass(self, model: Any, inputs: dict[str, Any], extras: dict[str, Tensor]) -> Any:
        if not self._tokens:
            return super()._reference_pass(model, inputs, extras)
        completion, _ = self._read_tokens(inputs)
        with self._tokens.reading(self._unwrapped(model), completion):
            return super()._reference_pass(model, inputs, extras)

    def _read_rows(self, examples: list[Any], fresh: Tensor) -> Tensor:
        table = super()._read_rows(examples, fresh)
        self._tokens.sample(fresh)
        return table

    def _calibrate(self) -> None:
        self._tokens.begin_sample()
        super()._calibrate()
        assert self._calibration is not None
        if self._tokens and self._calibration.tokens is None:
            found = self._tokens.thresholds(
                self._calibration.statistics,
                self.accelerator,
                self._train_batch_size,
                self._tokenizer,
                lambda rows: super(InterveningTrainer, self)._read_rows(rows, torch.ones(len(rows), dtype=torch.bool)),
            )
            self._calibration = self._calibration._replace(tokens=found.to(self.accelerator.device))

    # ---------------------------------------------------------- the residuals

    @property
    def _cache_fingerprint(self) -> str:
        changes = [
            (index, shaper, self._reader.given.get(index), self._steering_readers[index].fingerprint)
            for index, shaper in self._residual.items()
        ]
        return super()._cache_fingerprint + repr(changes) * bool(changes)

    def _residuals(
        self, model: Any, inputs: dict[str, Any], extras: dict[str, Tensor], logps: tuple[Tensor, Tensor]
    ) -> Tensor:
        found = [super()._residuals(model, inputs, extras, logps)]
        plain = torch.cat(logps)
        for index, shaper in self._residual.items():
            if TURN not in extras:  # data that is not trained on
                changed = plain
            elif shaper.steer is not None:
                with Steering({index: self._residual_edits[index]}) as steering:
                    amount = torch.full_like(plain, shaper.steer, dtype=torch.float32)
                    steering.aim({index: amount}, self._steered_places(inputs, extras))
                    changed = torch.cat(self._ref_logps(model, inputs))
            else:
                changed = torch.cat(self._ref_logps(model, inoculation.sequences(extras, index)))
            found.append((changed - plain).float()[:, None])
        return torch.cat(found, dim=1)

    def _take_residuals(self, batch: Batch, residuals: Tensor | None) -> None:
        """Hand the residuals to the shapers, with the scores."""
        assert residuals is not None  # read in the step, or from the cache
        valid = valid_pairs(batch.mask).repeat(2)
        for index, column in zip(self._residual, residuals.unbind(dim=1), strict=True):
            residual = column * valid
            batch.signals[index] = batch.signals[index]._replace(residual=residual)
            chosen, rejected = residual.chunk(2)
            batch.share(self.concepts[index], "residual", chosen - rejected)

    # -------------------------------------------------------------- the batch

    def _intervene(self, batch: Batch) -> None:
        """Change what the policy's forward pass and the loss are about, once the reference has read the batch."""
        self._leave_tokens(batch)
        self._inoculate(batch)
        self._steer(batch)

    def _inoculate(self, batch: Batch) -> None:
        """Have the policy read the instruction in the sequences that show the concept."""
        if self._inoculated is None:
            return
        assert self._calibration is not None  # by _compute_loss
        index = self._inoculated
        shaper: Any = self.concepts[index].shaper
        dice = batch.extras[inoculation.DICE] / inoculation.SIDES_OF_DICE
        selected = shaper.selected(batch.signals[index], self._calibration.thresholds[index], dice)
        batch.share(self.concepts[index], shaper.name, selected)
        inputs: dict[str, Any] = batch.inputs
        mixed = Mixed({**inputs, "completion_mask": batch.mask}, batch.extras, index, selected)
        batch.mask = mixed.inputs["completion_mask"]
        batch.inputs = {**inputs, **mixed.inputs}
        if batch.leaving is not None:
            batch.leaving = mixed.moved(batch.leaving)
            batch.inputs["completion_mask"] = batch.mask.masked_fill(batch.leaving, 0)
        batch.extras = {**batch.extras, TURN: mixed.turns()}

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
                batch.share(concept, concept.shaper.name, amounts[index] != 0)
        self._steering.aim(amounts, self._steered_places(batch.inputs, batch.extras))

    def _steered_places(self, inputs: dict[str, Any], extras: dict[str, Tensor]) -> Tensor:
        """`(2B, T)` bool: the tokens from the final user turn on."""
        completion, prompt = self._read_tokens(inputs)
        places = torch.arange(completion.shape[1], device=completion.device)
        return (completion | prompt) & (places >= extras[TURN][:, None])

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
            batch.share(self.concepts[index], "tokens", left, completion)
        kept = batch.mask.masked_fill(batch.leaving, 0)
        ref_logps = sequence_logps(self._tokens.log_probs, kept, self.ld_alpha)
        batch.inputs = {**batch.inputs, "completion_mask": kept, **dict(zip(REF_COLUMNS, ref_logps, strict=True))}


def _mapped(dataset: Any, function: Any, given: dict[str, Any], args: Any, title: str) -> Any:
    """The data with further columns, made once for all processes of a machine."""
    options = {"desc": title, "num_proc": args.dataset_num_proc} if isinstance(dataset, Dataset) else {}
    with global_then_local_main_first():
        return dataset.map(function, fn_kwargs=given, **options)


def _add_turn_tokens(example: dict[str, Any], processing_class: Any) -> dict[str, int]:
    return {TURN_COLUMN: turn_tokens(example, processing_class)}
