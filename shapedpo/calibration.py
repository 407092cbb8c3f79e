"""Calibration: what a score means, by the reference's scores on a sample of the training data."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .concept import Concept
from .errors import UserError
from .files import replacing
from .progress import progress_bar
from .reading import ConceptReader, RawScores, Statistics
from .shapers import ConceptSignal, Inoculate, Tokens
from .structure import fit_given


FILE_NAME = "concepts.safetensors"
"""Name of the file in a checkpoint."""
HOLD = "hold."
"""What the names of the tensors of the hold controller's state begin with."""


class Calibration(NamedTuple):
    """What standardisation and data-wide thresholds need.

    Attributes:
        statistics: Mean and standard deviation of each raw score.
        deltas: `(N, C)`, the concepts' deltas on the sample.
        gates: `(N, C)`, their gates on it.
        thresholds: `(C,)`, the standardised score above which a completion counts as showing the concept.
        empty_pairs: How many pairs without completion tokens on one side the run has met.
        hold: State of the controller of held concepts, as a checkpoint has it; `None` while there is none.
        tokens: `(C,)`, the scores above which a token leaves the loss, nan for concepts of other methods; `None` while not known.
    """

    statistics: Statistics
    deltas: Tensor
    gates: Tensor
    thresholds: Tensor
    empty_pairs: int = 0
    hold: dict[str, Tensor] | None = None
    tokens: Tensor | None = None

    def signal(self, concept: int) -> ConceptSignal:
        """The sample's deltas and gates of one concept."""
        return ConceptSignal(torch.empty(0), self.deltas[:, concept], self.gates[:, concept])

    def to(self, device: torch.device) -> Calibration:
        return Calibration(
            self.statistics.to(device),
            self.deltas.to(device),
            self.gates.to(device),
            self.thresholds.to(device),
            self.empty_pairs,
            self.hold,
            None if self.tokens is None else self.tokens.to(device),
        )


def calibrate(
    reader: ConceptReader, raw: RawScores, valid: Tensor, gates: Tensor, keep: int = 8192
) -> tuple[Calibration, list[str]]:
    """Statistics of raw scores.

    Args:
        reader: The concepts' reader.
        raw: Raw scores of the sample's N pairs.
        valid: `(N,)` bool, whether both completions have tokens; the others do not count.
        gates: `(N, G)`, the values of the reader's gate columns.
        keep: How many pairs' deltas to keep, spread evenly over the sample.

    Returns:
        The calibration, and warnings: of each concept a score of which never varies, whose gate never opens, whose threshold nothing reaches,
        or of which others leave nothing.

    Raises:
        FloatingPointError: If a score is not finite; the text names the concept.
        ValueError: If fewer than two pairs have tokens on both sides.
    """
    raise_non_finite(reader.concepts, reader.non_finite(raw), "the calibration sample")
    if int(valid.sum()) < 2:
        raise UserError(
            f"Of the {len(valid)} pairs of the calibration sample, {int(valid.sum())} have completion tokens on both sides "
            "after truncation; at least 2 are needed. Raise `max_length` or `calibration_size`."
        )
    rows = raw.completion[valid.repeat(2)]
    std, prompt_std = (scores.std(dim=0) if scores.shape[1] else scores.new_zeros(0) for scores in (rows, raw.prompt))
    warnings = []
    for concept, columns in zip(reader.concepts, reader.columns, strict=True):
        silent = int((std[columns] == 0).sum())
        width = columns.stop - columns.start
        # Of a whole SAE some features are always silent; of a chosen few, none should be.
        if silent == width or (silent and width <= 64):
            warnings.append(
                f"Concept {concept.name!r}: {silent} of its {width} scores never vary on "
                f"the calibration sample of {len(valid)} pairs, so they cannot be standardised and are taken as they are. Is the "
                "readout right? A rare concept needs a larger `calibration_size`."
            )
    none = rows.new_zeros(len(reader.concepts), len(reader.concepts))
    statistics = Statistics(rows.mean(dim=0), _or_one(std), raw.prompt.mean(dim=0), _or_one(prompt_std), none)
    signals = reader.signals(raw, statistics, valid, gates)
    if reader.given:
        given, more = fit_given(reader.concepts, signals, valid)
        statistics = statistics._replace(given=given)
        warnings += more
        signals = reader.signals(raw, statistics, valid, gates)
    for concept, signal in zip(reader.concepts, signals, strict=True):
        if concept.gate is not None and not bool((signal.gate[valid] > 0).any()):
            warnings.append(
                f"Concept {concept.name!r}: its gate is 0 on all {len(valid)} pairs of the calibration sample, so that nothing would be "
                "shaped. Is the gate's column or threshold right? Rare rows need a larger `calibration_size`."
            )
        elif warning := _unreached(concept, signal):
            warnings.append(warning)
    kept = torch.arange(len(valid), device=valid.device)[valid]
    kept = kept[torch.linspace(0, len(kept) - 1, min(keep, len(kept)), device=valid.device).round().long()]
    deltas = _columns([signal.delta[kept] for signal in signals], kept)
    gate = _columns([signal.gate[kept] for signal in signals], kept)
    scores = _columns([signal.scores[valid.repeat(2)] for signal in signals], rows)
    return Calibration(statistics, deltas, gate, dividing_scores(scores)), warnings


def _unreached(concept: Concept, signal: ConceptSignal) -> str | None:
    """A warning if the threshold that a concept's method was given is beyond all of a sample."""
    threshold = getattr(concept.shaper, "threshold", None)
    if not concept.shapes or threshold is None or isinstance(concept.shaper, Tokens):  # whose threshold is of tokens
        return None
    inside = signal.gate > 0
    by_score = isinstance(concept.shaper, Inoculate)
    values = signal.scores[inside.repeat(2)] if by_score else signal.delta[inside] * concept.signed_strength
    if float(values.max()) >= threshold:
        return None
    return (
        f"Concept {concept.name!r}: method {concept.shaper.name!r} has threshold={threshold:g}, and the largest {'score' if by_score else 'delta'} "
        f"of the calibration sample is {float(values.max()):.2g}, so that nothing would be shaped. Lower it, or raise `calibration_size` if the "
        "concept is rare."
    )


def dividing_scores(scores: Tensor) -> Tensor:
    """The score that best divides a sample into completions that show a concept and completions that do not.

    It is where the variance between the two parts is largest (Otsu, "A threshold selection method from gray-level histograms",
    IEEE Transactions on Systems, Man, and Cybernetics 9, 1979): half-way between the neighbouring scores. Where all scores are
    equal, that score: what lies above it has not been seen yet.

    Args:
        scores: `(N, C)`, standardised.

    Returns:
        `(C,)`.
    """
    ordered = scores.double().sort(dim=0).values
    n = len(ordered)
    below = torch.arange(1, n, device=scores.device)[:, None]  # how many lie below each split
    sums = ordered.cumsum(dim=0)
    means = sums[:-1] / below, (sums[-1] - sums[:-1]) / (n - below)
    between = below * (n - below) * (means[1] - means[0]).square()
    between = torch.where(ordered[1:] > ordered[:-1], between, 0.0)  # equal scores stay together
    best = between.argmax(dim=0, keepdim=True)
    middle = (ordered[:-1].gather(0, best) + ordered[1:].gather(0, best)) / 2
    return torch.where(between.amax(dim=0) > 0, middle[0], ordered[-1]).float()


def _columns(tensors: list[Tensor], like: Tensor) -> Tensor:
    """`(N, C)` of C tensors, of which there may be none."""
    return torch.stack(tensors, dim=1) if tensors else like.new_zeros(len(like), 0, dtype=torch.float32)


def read_sample(
    examples: Sequence[Any],
    batch_size: int,
    read: Callable[[list[Any], Tensor], Tensor],
    accelerator: Accelerator,
    title: str = "Calibrating concepts",
) -> Tensor:
    """Read a sample of rows, dealt out over processes.

    Args:
        examples: The rows, the same on all processes.
        batch_size: Rows read at once by a process.
        read: Gives each row's numbers, `(batch_size, columns)`. It is handed the rows, and `(batch_size,)` bool, which of them
            are read for the first time: the last round is filled up with repeats, which do not count.
        accelerator: The run's.
        title: Of the progress bar.

    Returns:
        `(N, columns)`, in the order of `examples`, the same on all processes.
    """
    world, rank = accelerator.num_processes, accelerator.process_index
    # Wrapped around to full rounds, repeats cut off: all processes make as many passes, or sharded models would wait in vain.
    rounds = -(-len(examples) // (batch_size * world))
    dealt = np.arange(rounds * world * batch_size).reshape(rounds, world, batch_size)[:, rank]
    # A reference with dropout would draw random numbers that the run must not miss.
    with torch.random.fork_rng(devices=[accelerator.device] if accelerator.device.type == "cuda" else []):
        tables = [
            read([examples[int(i) % len(examples)] for i in rows], torch.from_numpy(rows < len(examples)))
            for rows in progress_bar(dealt, desc=title, show=accelerator.is_local_main_process)
        ]
    table = torch.stack(tables)
    if world > 1:
        table = accelerator.gather(table).unflatten(0, (world, rounds)).transpose(0, 1)
    return table.reshape(-1, table.shape[-1])[: len(examples)]


def raise_non_finite(concepts: list[Concept], counts: Any, where: str) -> None:
    """Raise `FloatingPointError` naming the first concept whose count of non-finite scores is not 0."""
    for concept, count in zip(concepts, counts, strict=True):
        if count:
            raise FloatingPointError(
                f"Concept {concept.name!r}: {int(count)} of its scores on {where} are not finite. The reference model's "
                "activations there, the readout's weights, or what a function of text returns, hold inf or nan. Nothing was updated with them; "
                "what has been saved is as it was."
            )


def save_calibration(
    folder: str | os.PathLike[str], calibration: Calibration, concepts: list[Concept], fingerprint: str
) -> None:
    """Write a calibration and the concepts it belongs to into a folder, whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {**calibration.statistics._asdict(), "deltas": calibration.deltas, "gates": calibration.gates}
    tensors["thresholds"] = calibration.thresholds
    tensors |= {} if calibration.tokens is None else {"tokens": calibration.tokens}
    tensors |= {f"{HOLD}{name}": tensor for name, tensor in (calibration.hold or {}).items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {
        "concepts": json.dumps([concept.to_dict() for concept in concepts]),
        "fingerprint": fingerprint,
        "empty_pairs": str(calibration.empty_pairs),
    }
    with replacing(folder / FILE_NAME) as partial:
        save_file(tensors, partial, metadata=metadata)


def load_calibration(
    folder: str | os.PathLike[str], concepts: list[Concept], fingerprint: str, allow_change: bool
) -> Calibration | None:
    """Read the calibration of a checkpoint.

    Args:
        folder: The checkpoint.
        concepts: The concepts of this run.
        fingerprint: Of this run's readers.
        allow_change: Whether the concepts may differ from the checkpoint's.

    Returns:
        `None` if the checkpoint has none (one of plain `DPOTrainer`), or has one for other concepts and that is allowed.

    Raises:
        ValueError: If the concepts differ and may not; the text says what changed.
    """
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        was, was_fingerprint, empty_pairs = (metadata[key] for key in ("concepts", "fingerprint", "empty_pairs"))
        deltas, gates, thresholds = (tensors.pop(name) for name in ("deltas", "gates", "thresholds"))
    except (SafetensorError, KeyError, TypeError) as error:
        raise UserError(
            f"{str(path)!r} is not a whole file of concepts ({error}). Delete it to calibrate anew, or resume from an earlier "
            "checkpoint."
        ) from error
    changes = _changes(json.loads(was), [concept.to_dict() for concept in concepts])
    if not changes and was_fingerprint != fingerprint:
        changes = ["what a readout loads"]
    if changes and not allow_change:
        raise UserError(
            f"The concepts are not those of the checkpoint {str(folder)!r}: {'; '.join(changes)}. Use the checkpoint's "
            "concepts, or set `allow_concept_change=True`."
        )
    if changes:
        return None
    hold = {name.removeprefix(HOLD): tensors.pop(name) for name in list(tensors) if name.startswith(HOLD)}
    tokens = tensors.pop("tokens", None)
    tensors.setdefault(
        "given", deltas.new_zeros(len(concepts), len(concepts))
    )  # a checkpoint from before there was `given`
    return Calibration(Statistics(**tensors), deltas, gates, thresholds, int(empty_pairs), hold or None, tokens)


def _changes(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[str]:
    before, after = ({concept["name"]: concept for concept in concepts} for concepts in (old, new))
    changes = [f"{name!r} is gone" for name in before if name not in after]
    changes += [f"{name!r} is new" for name in after if name not in before]
    for name in before.keys() & after.keys():
        for field in before[name].keys() | after[name].keys():
            was, now = before[name].get(field), after[name].get(field)
            if was != now:
                changes.append(f"{field} of {name!r} was {was!r} and is {now!r}")
    if not changes and list(before) != list(after):  # the columns of what is saved are in it
        changes = [f"their order was {', '.join(before)} and is {', '.join(after)}"]
    return sorted(changes)


def _or_one(std: Tensor) -> Tensor:
    return torch.where(std > 0, std, torch.ones_like(std))
