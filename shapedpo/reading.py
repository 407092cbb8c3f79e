"""Reading a list of concepts on a batch of pairs: from hidden states and texts to one score per concept and completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .capture import CapturePass, resolve_site
from .concept import Concept, Gate
from .readouts import ActivationReader, LoadedReadout, Readout, SAEFeatures, TextReader, family_mismatch
from .readouts.base import fingerprint
from .shapers import ConceptSignal
from .structure import given_indices, without_given


class RawScores(NamedTuple):
    """Pooled, not yet standardised scores of B pairs, float32.

    Attributes:
        completion: `(2B, F)`, chosen completions first; the columns of all concepts side by side.
        prompt: `(B, P)`, the same on the prompts, for the concepts that gate others.
        features: `(2B, F')`, the features that are only monitored, if there are any.
        residuals: `(2B, R)`, for concepts of method `residual`, where they come with the scores from a cache.
    """

    completion: Tensor
    prompt: Tensor
    features: Tensor | None = None
    residuals: Tensor | None = None


class Statistics(NamedTuple):
    """Mean and standard deviation of each raw score under the reference on the training data, float32.

    Attributes:
        mean: `(F,)`.
        std: `(F,)`, 1 where a score never varied.
        prompt_mean: `(P,)`.
        prompt_std: `(P,)`.
        given: `(C, C)`, what of each concept's score the others predict, for those that are `given` others; else 0.
    """

    mean: Tensor
    std: Tensor
    prompt_mean: Tensor
    prompt_std: Tensor
    given: Tensor

    def to(self, device: torch.device) -> Statistics:
        return Statistics(*(tensor.to(device) for tensor in self))


class ConceptReader:
    """Loads the readouts of a list of concepts and reads them together.

    Args:
        concepts: The concepts.
        monitored: Features to read beside them, which belong to no concept.

    An SAE that several of them name is loaded once.

    Raises:
        ValueError: If a readout cannot be loaded; the text names the concept.
    """

    def __init__(self, concepts: Sequence[Concept], monitored: SAEFeatures | None = None) -> None:
        self.concepts = list(concepts)
        loaded: dict[Any, Any] = {}
        self.monitored: ActivationReader | None = None if monitored is None else monitored.load_shared(loaded)
        gating = {concept.gate.concept for concept in concepts if isinstance(concept.gate, Gate)}
        self.readers = [_load(concept, loaded) for concept in concepts]
        self.columns = _slices([reader.n_features for reader in self.readers])
        self.prompt_index = [index for index, concept in enumerate(concepts) if concept.name in gating]
        self.prompt_columns = _slices([self.readers[index].n_features for index in self.prompt_index])
        self.given = given_indices(concepts)
        self.gate_columns = sorted(
            {concept.gate.column for concept in concepts if isinstance(concept.gate, Gate) and concept.gate.column}
        )

    @property
    def n_columns(self) -> int:
        """Number of raw scores of a completion, F."""
        return sum(reader.n_features for reader in self.readers)

    @property
    def n_prompt_columns(self) -> int:
        """Number of raw scores of a prompt, P."""
        return sum(self.readers[index].n_features for index in self.prompt_index)

    @property
    def text_readouts(self) -> list[Readout]:
        """The readouts of text, in the concepts' order: the collator scores them (see [`~shapedpo.collator.ConceptCollator`])."""
        return [
            concept.readout
            for concept, reader in zip(self.concepts, self.readers, strict=True)
            if isinstance(reader, TextReader) and isinstance(concept.readout, Readout)
        ]

    @property
    def fingerprint(self) -> str:
        """Hash of all that changes a raw score."""
        return fingerprint(*(reader.fingerprint for reader in self.readers), str(self.prompt_index))

    def check_model(self, model: nn.Module, config: Any) -> list[str]:
        """Check that every hook point is there and as wide as its reader.

        Returns:
            Warnings, one for each concept whose weights name another model family.

        Raises:
            ValueError: If one does not fit; the text names the concept.
        """
        warnings = []
        named = [
            (f"Concept {concept.name!r}", reader) for concept, reader in zip(self.concepts, self.readers, strict=True)
        ]
        for owner, reader in [*named, ("The monitored SAE", self.monitored)]:
            if not isinstance(reader, ActivationReader):
                continue
            if mismatch := check_reader(owner, reader, model, config):
                warnings.append(mismatch)
        return warnings

    def capture(self, model: nn.Module, completion: Tensor, prompt: Tensor) -> CapturePass:
        """A context that reads all activation scores in the one forward pass that runs inside it.

        Args:
            model: The model that is going to run, unwrapped.
            completion: `(2B, T)` bool, the completion tokens to read.
            prompt: `(2B, T)` bool, the prompt tokens to read.
        """
        jobs = [(reader, completion) for reader in self.readers] + [
            (self.readers[index], prompt) for index in self.prompt_index
        ]
        if self.monitored is not None:
            jobs.append((self.monitored, completion))
        jobs = [(reader, mask) for reader, mask in jobs if isinstance(reader, ActivationReader)]
        return CapturePass(model, [reader for reader, _ in jobs], [mask for _, mask in jobs])  # type: ignore[misc]

    def assemble(self, captured: Sequence[Tensor], text: Tensor | None, prompt_text: Tensor | None) -> RawScores:
        """Put what was captured and what the collator scored side by side, in the concepts' order.

        Args:
            captured: The scores of a `capture`, each `(2B, F_i)`.
            text: `(2B, n)` scores of the completions' texts, one column for each text readout.
            prompt_text: `(B, n)`, the same of the prompts'.
        """
        activations, texts = iter(captured), _columns(text)
        prompt_texts = dict(zip(self._text_indices(), _columns(prompt_text), strict=False))
        completion = [
            next(activations) if isinstance(reader, ActivationReader) else next(texts) for reader in self.readers
        ]
        features = captured[-1] if self.monitored is not None else None
        some = completion[0] if completion else features
        assert some is not None  # a reader of nothing is not asked
        pairs = len(some) // 2
        # Both rows of a pair have the prompt: the chosen one's is read.
        prompt = [
            next(activations)[:pairs] if isinstance(self.readers[index], ActivationReader) else prompt_texts[index]
            for index in self.prompt_index
        ]
        return RawScores(
            torch.cat(completion, dim=1) if completion else some.new_zeros(2 * pairs, 0),
            torch.cat(prompt, dim=1) if prompt else some.new_zeros(pairs, 0),
            features,
        )

    def signals(self, raw: RawScores, statistics: Statistics, valid: Tensor, gates: Tensor) -> list[ConceptSignal]:
        """Standardise, average a concept's features, and gate.

        Args:
            raw: The raw scores of B pairs.
            statistics: What to standardise by.
            valid: `(B,)` bool, whether both completions have tokens.
            gates: `(B, G)` the values of `gate_columns`.

        Returns:
            One for each concept.
        """
        scores = self.standardised(raw.completion, statistics)  # (2B, C)
        scores = scores * valid.repeat(2)[:, None]
        signals = []
        gating = self.gates(raw, statistics, gates)
        for score, gate in zip(scores.unbind(dim=1), gating.unbind(dim=1), strict=True):
            chosen, rejected = score.chunk(2)
            signals.append(ConceptSignal(score, chosen - rejected, gate))
        return signals

    def gates(self, raw: RawScores, statistics: Statistics, columns: Tensor) -> Tensor:
        """How far each concept's gate lets B rows in: `(B, C)` float32, from 0 to 1.

        Args:
            raw: The raw scores of B pairs.
            statistics: What to standardise by.
            columns: `(B, G)` the values of `gate_columns`.
        """
        prompt = self._standardise(raw.prompt, statistics.prompt_mean, statistics.prompt_std, self.prompt_columns)
        names = [self.concepts[index].name for index in self.prompt_index]
        gates = torch.ones(len(raw.prompt), len(self.concepts), device=raw.prompt.device)
        for index, concept in enumerate(self.concepts):
            if not isinstance(concept.gate, Gate):
                continue
            if concept.gate.column is not None:
                gates[:, index] = columns[:, self.gate_columns.index(concept.gate.column)]
            else:
                gates[:, index] = prompt[:, names.index(concept.gate.concept or "")] > concept.gate.threshold
        return gates

    def standardised(self, completion: Tensor, statistics: Statistics) -> Tensor:
        """Raw scores of completions, `(N, F)`, to the concepts' standardised ones, `(N, C)`, each without what it is given."""
        own = self._standardise(completion, statistics.mean, statistics.std, self.columns)
        return without_given(own, statistics.given, self.given)

    def non_finite(self, raw: RawScores) -> Tensor:
        """`(C,)` float32: for each concept, how many of its raw scores, of prompts too, are not finite."""
        if not self.columns:
            return raw.completion.new_zeros(0)
        bad = (~torch.isfinite(raw.completion)).float().sum(dim=0)
        counts = torch.stack([bad[columns].sum() for columns in self.columns])
        bad = (~torch.isfinite(raw.prompt)).float().sum(dim=0)
        for index, columns in zip(self.prompt_index, self.prompt_columns, strict=True):
            counts[index] += bad[columns].sum()
        return counts

    def _text_indices(self) -> list[int]:
        return [index for index, reader in enumerate(self.readers) if isinstance(reader, TextReader)]

    @staticmethod
    def _standardise(raw: Tensor, mean: Tensor, std: Tensor, columns: Sequence[slice]) -> Tensor:
        """`(N, F)` raw scores to `(N, C)`: each column standardised, each concept the mean of its columns."""
        if not columns:
            return raw
        # Concept by concept, so that no second tensor as wide as a whole SAE is made for all of them.
        return torch.stack([((raw[:, part] - mean[part]) / std[part]).mean(dim=1) for part in columns], dim=1)


def check_reader(owner: str, reader: ActivationReader, model: nn.Module, config: Any) -> str | None:
    """Check that a model has a reader's hook point, as wide as the reader.

    Args:
        owner: Whose reader it is, for texts.
        reader: The reader.
        model: The model, unwrapped.
        config: Its configuration, of the text part.

    Returns:
        A warning if the reader's weights name another model family.

    Raises:
        ValueError: If it does not fit; the text names the owner.
    """
    try:
        site = resolve_site(model, reader.hook_name)
    except ValueError as error:
        raise ValueError(f"{owner}: {error}") from error
    if site.width != reader.d_in:
        raise ValueError(
            f"{owner}: its readout is {reader.d_in} wide, but {reader.hook_name!r} of "
            f"{type(model).__name__} is {site.width} wide. Was it made for another model?"
        )
    mismatch = family_mismatch(reader.model_name, config)
    return f"{owner}: {mismatch}" if mismatch else None


def reading_masks(
    inputs: dict[str, Tensor], bos_token_id: int | None, eos_token_id: int | None
) -> tuple[Tensor, Tensor]:
    """Which tokens are read.

    A sequence's first token and the BOS token are left out: their activations are outliers by orders of magnitude, and most SAEs
    were not trained on them. Where BOS and EOS are one token, only the first position is.

    Args:
        inputs: A batch of TRL's collator, `(2B, T)` each.

    Returns:
        `(2B, T)` bool each: the completions' tokens, and the prompts'.
    """
    attended = inputs["attention_mask"].bool()
    readable = attended & (attended.cumsum(dim=1) > 1)
    if bos_token_id is not None and bos_token_id != eos_token_id:
        readable = readable & (inputs["input_ids"] != bos_token_id)
    completion = inputs["completion_mask"].bool()
    return readable & completion, readable & ~completion


def _load(concept: Concept, loaded: dict[Any, Any]) -> LoadedReadout:
    assert isinstance(concept.readout, Readout)  # by Concept
    try:
        return concept.readout.load_shared(loaded)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"Concept {concept.name!r}: {error}") from error


def _slices(widths: Sequence[int]) -> list[slice]:
    ends = [sum(widths[: index + 1]) for index in range(len(widths))]
    return [slice(end - width, end) for width, end in zip(widths, ends, strict=True)]


def _columns(scores: Tensor | None) -> Any:
    return iter(()) if scores is None else iter(scores.split(1, dim=1))
