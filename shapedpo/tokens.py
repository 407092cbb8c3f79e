"""Which completion tokens show a concept, and leave the loss with method `tokens`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from .calibration import read_sample
from .capture import CapturePass
from .concept import Concept
from .marks import MATCHED, WORDS, TokenMarks
from .reading import ConceptReader, Statistics
from .readouts import ActivationReader, LoadedReadout, Regex
from .readouts.base import WrappedReader
from .shapers import ConceptSignal, Tokens
from .thresholds import best_f1, contrast_rows, labelled, upper_quantile


WIDEST = 64
"""Features that a concept may read, at most: every token of a batch has a number for each."""


class EveryToken(WrappedReader):
    """Reads every token: its `pooled` pools nothing and gives `(N, T, F)`, 0 outside the mask."""

    def pooled(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.tokens(x, mask)


class _Job(NamedTuple):
    """A concept whose tokens leave: its number, its options, whether it is to suppress, and what reads its tokens.

    That is nothing for a pattern, else the concept's own reader and those of the concepts that it is given, each with the number of its
    concept and its columns of the raw scores.
    """

    concept: int
    shaper: Tokens
    suppress: bool
    parts: list[tuple[int, slice, EveryToken]]

    def side(self, pairs: int, device: torch.device) -> Tensor:
        """`(2B, 1)` bool, the completions of the sides that tokens leave."""
        return torch.tensor(self.shaper.sides(self.suppress), device=device).repeat_interleave(pairs)[:, None]


class TokenFilter:
    """Says of each batch which completion tokens stay in the loss.

    The reference is read inside `reading`. Thresholds are found once (`sample`, `thresholds`) and belong to the run's calibration.

    Args:
        reader: Reads all concepts; those of other methods are passed over.
        precomputed: Whether the reference's log-probabilities are computed before training.

    Raises:
        ValueError: If a concept's readout has no tokens, its options do not fit its readout, or `precomputed` is set.
    """

    def __init__(self, reader: ConceptReader, precomputed: bool = False) -> None:
        self._concepts = reader.concepts
        self._jobs: list[_Job] = []
        for index, concept in enumerate(reader.concepts):
            if concept.shapes and isinstance(concept.shaper, Tokens):
                parts = []
                for other in [index, *reader.given.get(index, [])]:
                    read = reader.readers[other]
                    _check(concept, concept.shaper, read, reader.concepts[other], precomputed)
                    if isinstance(read, ActivationReader):
                        parts.append((other, reader.columns[other], EveryToken(read)))
                self._jobs.append(_Job(index, concept.shaper, concept.action == "suppress", parts))
        self._read = [job for job in self._jobs if job.parts]
        self._matched = [job for job in self._jobs if not job.parts]
        self._raw: list[Tensor] = []
        self._mask = torch.empty(0)
        self._samples: dict[int, list[Tensor]] = {
            job.concept: [] for job in self._read if job.shaper.quantile is not None
        }
        self.log_probs = torch.empty(0)
        """`(2B, T')`, the token log-probabilities of the last pass inside `reading`."""

    def __bool__(self) -> bool:
        return bool(self._jobs)

    def marks(self, tokenizer: Any) -> TokenMarks | None:
        """What the collator is to add to a batch, if anything."""
        patterns = [
            readout for job in self._matched if isinstance(readout := self._concepts[job.concept].readout, Regex)
        ]
        words = any(job.shaper.whole_words for job in self._jobs)
        return TokenMarks(tokenizer, patterns, words) if patterns or words else None

    @contextmanager
    def reading(self, model: nn.Module, completion: Tensor) -> Iterator[None]:
        """A context that reads every completion token in the one pass of the reference inside it.

        Args:
            model: The reference, unwrapped.
            completion: `(2B, T)` bool, the completion tokens to read.
        """

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            self.log_probs = output.log_probs.detach()

        readers = [reader for job in self._read for _, _, reader in job.parts]
        handle = model.register_forward_hook(keep)
        try:
            with CapturePass(model, readers, [completion] * len(readers)) if readers else nullcontext() as capture:
                yield
        finally:
            handle.remove()
        scores = iter(capture.scores if capture is not None else [])
        # (2B, T, F) each: a concept's own columns, then those of the concepts that it is given.
        self._raw = [torch.cat([next(scores) for _ in job.parts], dim=-1) for job in self._read]
        self._mask = completion

    # ------------------------------------------------------------------------------------------------------ thresholds

    def begin_sample(self) -> None:
        """Keep nothing of a calibration pass that failed, as for want of memory."""
        for kept in self._samples.values():
            kept.clear()

    def sample(self, fresh: Tensor) -> None:
        """Keep the tokens of the last pass for the quantiles.

        Args:
            fresh: `(B,)` bool, the pairs that count.
        """
        for job, raw in zip(self._read, self._raw, strict=True):
            if job.concept in self._samples:
                counts = self._mask & fresh.to(raw.device).repeat(2)[:, None] & job.side(len(fresh), raw.device)
                self._samples[job.concept].append(raw[counts].cpu())

    def thresholds(
        self,
        statistics: Statistics,
        accelerator: Accelerator,
        batch_size: int,
        tokenizer: Any,
        read: Callable[[list[Any]], Any],
    ) -> Tensor:
        """Find the thresholds, all processes together.

        Args:
            statistics: What scores are standardised by.
            accelerator: The run's.
            batch_size: Rows that a process reads at once.
            tokenizer: Of the responses of contrast sets.
            read: Makes the reference's pass over rows as TRL's tokenization gives them, inside `reading`.

        Returns:
            `(C,)` float32, nan for concepts that have none.
        """
        found = torch.full((len(self._concepts),), torch.nan)
        for job in self._read:
            if job.shaper.quantile is not None:
                tokens = torch.cat(self._samples.pop(job.concept)).to(accelerator.device)
                tokens = accelerator.pad_across_processes(tokens, dim=0, pad_index=torch.nan)
                scores = self._standardised(job, accelerator.gather(tokens), statistics)
                found[job.concept] = upper_quantile(scores[~scores.isnan()], job.shaper.quantile)
            elif job.shaper.contrast is not None:
                rows, labels = contrast_rows(job.shaper.contrast, tokenizer)

                def best(batch: list[Any], fresh: Tensor, job: _Job = job) -> Tensor:
                    read(batch)
                    scores = self._standardised(job, self._raw[self._read.index(job)], statistics)
                    return scores.masked_fill(~self._mask, -torch.inf).amax(dim=1).chunk(2)[0][:, None]

                scores = read_sample(rows, batch_size, best, accelerator)[:, 0]
                found[job.concept] = best_f1(scores.cpu(), labels)
            else:
                assert job.shaper.threshold is not None  # by _check
                found[job.concept] = job.shaper.threshold
        return found

    @staticmethod
    def _standardised(job: _Job, raw: Tensor, statistics: Statistics) -> Tensor:
        """`(..., F)` to `(...)`: as the completions' scores are, without what the given concepts predict."""
        widths = [part.stop - part.start for _, part, _ in job.parts]
        total = torch.zeros_like(raw[..., 0])
        for (index, part, _), columns in zip(job.parts, raw.split(widths, dim=-1), strict=True):
            score = ((columns - statistics.mean[part]) / statistics.std[part]).mean(dim=-1)
            total = score if index == job.concept else total - statistics.given[job.concept, index] * score
        return total

    # -------------------------------------------------------------------------------------------------------- a batch

    def leaving(
        self,
        signals: Sequence[ConceptSignal],
        statistics: Statistics,
        thresholds: Tensor,
        extras: Mapping[str, Tensor],
        completion: Tensor,
    ) -> dict[int, Tensor]:
        """Which tokens leave the loss.

        Args:
            signals: The batch's scores, for their gates.
            statistics: What scores are standardised by.
            thresholds: Of `thresholds`.
            extras: What the collator added.
            completion: `(2B, T)` bool, all completion tokens.

        Returns:
            For each concept of this method, by its index, `(2B, T)` bool.
        """
        left = {}
        read = iter(self._raw)
        matched = iter(extras[MATCHED].unbind(dim=2) if self._matched else ())
        for job in self._jobs:
            if not job.parts:
                hit = next(matched).bool()
            else:
                hit = (self._standardised(job, next(read), statistics) > thresholds[job.concept]) & self._mask
            if job.shaper.whole_words:
                words = extras[WORDS].long()  # (2B, T): 0 outside words
                hit_words = torch.zeros(len(hit), words.shape[1] + 1, dtype=torch.uint8, device=hit.device)
                hit_words.scatter_reduce_(1, words, hit.to(torch.uint8), "amax")
                hit |= (hit_words.gather(1, words) > 0) & (words > 0)
            gated = (signals[job.concept].gate > 0).repeat(2)[:, None]
            left[job.concept] = hit & gated & job.side(len(hit) // 2, hit.device) & completion
        return left


def _check(concept: Concept, shaper: Tokens, reader: LoadedReadout, read: Concept, precomputed: bool) -> None:
    """Check a concept's options against the reader of `read`: its own, or that of a concept that it is given."""
    owner = f"Concept {concept.name!r}: method 'tokens'"
    given = [name for name in ("threshold", "quantile", "contrast") if getattr(shaper, name) is not None]
    if precomputed:
        raise ValueError(
            f"{owner} leaves tokens out of the reference's log-probabilities too, and `precompute_ref_log_probs=True` keeps only their "
            "sums. Set it to False."
        )
    if read is not concept and not isinstance(reader, ActivationReader):
        raise ValueError(
            f"{owner} reads every token, and {read.name!r}, which it is given, is read from whole texts. Leave it out of `given`."
        )
    if isinstance(reader, ActivationReader):
        if not given:
            raise ValueError(
                f"{owner} needs one of `threshold`, `quantile` and `contrast`, for example {{name: tokens, quantile: 0.99}}."
            )
        if reader.n_features > WIDEST:
            raise ValueError(
                f"{owner} reads every token, and the readout of {read.name!r} has {reader.n_features} features. Name {WIDEST} at most."
            )
        if shaper.contrast is not None:
            labelled(shaper.contrast, owner)
    elif not isinstance(concept.readout, Regex):
        raise ValueError(
            f"{owner} needs a readout that says where in the text it fires: SAEFeatures, Direction, a probe or Regex. A function of the whole "
            "text does not."
        )
    elif concept.given:
        raise ValueError(f"{owner} leaves a Regex's matches out as they are, whatever it is `given`. Leave that out.")
    elif given:
        raise ValueError(f"{owner} takes no `{given[0]}` with a Regex, whose matches leave as they are. Leave it out.")
