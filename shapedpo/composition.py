"""Which methods have a meaning for the run's loss, and which go together; if not, why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .concept import Concept
from .losses import DIVIDING_LOSSES, DPO_LIKE_LOSSES, NORMALISED_LOSSES, SORTING_LOSSES, pull_at_start
from .readouts import ActivationReader, LoadedReadout
from .shapers import Inoculate, Residual
from .shapers.steering import ForwardEdit
from .shaping import projects


def check_composition(concepts: Sequence[Concept], args: Any) -> None:
    """Check that the methods of the concepts go together, and with the settings.

    Raises:
        ValueError: If two do not; the text names the concepts and says why.
    """
    shaping = [concept for concept in concepts if concept.shapes]
    held = [concept for concept in shaping if concept.action == "hold"]
    edited = [concept for concept in shaping if isinstance(concept.shaper, ForwardEdit | Inoculate)]
    if held and edited:
        raise ValueError(
            f"Concept {held[0].name!r} is held by what the policy's log-ratios say, and method {edited[0].shaper.name!r} of "
            f"concept {edited[0].name!r} has the policy read or compute something else while it trains. Use 'reward', 'tokens', 'filter' or "
            "pair weights for the one, or give the other a strength (action='suppress')."
        )
    inoculated = [concept for concept in shaping if isinstance(concept.shaper, Inoculate)]
    if len(inoculated) > 1:
        names = " and ".join(repr(concept.name) for concept in inoculated[:2])
        raise ValueError(
            f"Concepts {names}: method 'inoculate' goes with one concept of a run: a completion that shows several would need a prompt "
            "with every combination of their instructions."
        )
    for concept in shaping:
        shaper: Any = concept.shaper
        instructs = isinstance(shaper, Inoculate | Residual) and shaper.instruction
        if (
            instructs
            and shaper.place == "system"
            and args.max_length is not None
            and args.truncation_mode == "keep_end"
        ):
            raise ValueError(
                f"Concept {concept.name!r}: method {shaper.name!r} puts its instruction into the system turn, which `truncation_mode='keep_end'` "
                "cuts off first. Set place: user, or keep the start."
            )


def check_methods(
    concepts: Sequence[Concept], readers: Sequence[LoadedReadout], args: Any, weight_column: str | None, pairs: int
) -> list[str]:
    """Check that every method has a meaning for the run's loss.

    Args:
        concepts: All concepts.
        readers: Their readers.
        args: The trainer's arguments.
        weight_column: Column of pair weights in use, if any.
        pairs: Pairs of one forward batch over all processes.

    Returns:
        Warnings.

    Raises:
        ValueError: If a method has none; the text names the concept, the method and the loss type.
    """
    losses = list(args.loss_type)
    warnings = []
    users = [
        (f"Concept {concept.name!r}: method {concept.shaper.name!r}", concept) for concept in concepts if concept.shapes
    ]
    weighing = [owner for owner, concept in users if concept.shaper.per_pair]
    if weight_column is not None:
        weighing.append(f"The weight column {weight_column!r}")
    for owner in weighing:
        if unfit := [loss for loss in losses if loss in (*SORTING_LOSSES, "sft")]:
            why = (
                "TRL's 'sft' loss takes no pair weights (it fails with `use_weighting`)"
                if unfit[0] == "sft"
                else "it sorts the batch, so that a pair has no loss of its own to weight"
            )
            raise ValueError(f"{owner} has no meaning for the loss type {unfit[0]!r}: {why}. Use another loss type.")
    for owner, concept in users:
        if set(losses) == {"sft"} and not (
            concept.shaper.fits_sft or projects(concept, "residual") or projects(concept, "parameters")
        ):
            raise ValueError(
                f"{owner} has no meaning for the loss type 'sft' alone, which compares no pairs and reads no reference."
            )
        if projects(concept, "pair") and (unfit := [loss for loss in losses if loss in SORTING_LOSSES]):
            raise ValueError(
                f"{owner} in pair space has no meaning for the loss type {unfit[0]!r}, which sorts the batch: a pair has "
                "no coefficient of its own. Use another loss type, or space: residual."
            )
        if projects(concept, "residual"):
            index = concepts.index(concept)
            reader = readers[index]
            if not isinstance(reader, ActivationReader):
                raise ValueError(
                    f"{owner} in the residual stream needs a readout with a direction (SAEFeatures, Direction or LinearProbe); a readout of "
                    "text has none. Use space: pair."
                )
            if concept.gate is not None:
                raise ValueError(f"{owner} in the residual stream takes no gate. Leave it out, or use space: pair.")
        if concept.action == "hold":
            owner = f"Concept {concept.name!r}: action 'hold'"
            pulls = {loss: pull_at_start(loss, args.label_smoothing) for loss in losses if loss != "sft"}
            if unfit := [loss for loss, pull in pulls.items() if pull is None]:
                raise ValueError(
                    f"{owner} weighs its pull against DPO's on each pair, and that of the loss type {unfit[0]!r} is no "
                    "multiple of it. Use another loss type, or action suppress or amplify with a strength."
                )
            if args.f_divergence_type != "reverse_kl":
                raise ValueError(
                    f"{owner} weighs its pull against DPO's on each pair, and f_divergence_type={args.f_divergence_type!r} multiplies that by a "
                    "factor that depends on each completion's log-ratio. Use 'reverse_kl', or action suppress or amplify with a strength."
                )
            for loss, pull in pulls.items():
                if loss not in DPO_LIKE_LOSSES:
                    warnings.append(
                        f"{owner} takes the pull of the loss type {loss!r} for DPO's, and it is {pull:.2g} times DPO's where the policy is the "
                        "reference, and fades in another way. The concept is held less exactly: look at rollouts."
                    )
            if args.use_weighting:
                raise ValueError(
                    f"{owner} weighs its pull against DPO's on each pair, and with `use_weighting=True` (WPO) that is smaller by a factor that "
                    "only TRL's loss knows. Leave one out, or use action suppress or amplify with a strength."
                )
            normalised = {loss in NORMALISED_LOSSES for loss in losses if loss != "sft"}
            if len(normalised) > 1:
                raise ValueError(
                    f"{owner} needs losses that compare one thing, got {', '.join(losses)}: 'sigmoid_norm' compares log-ratios a "
                    "token, the others those of whole completions. Use one of the two kinds."
                )
        if concept.shaper.name == "reward" and concept.action != "hold":
            strength = abs(concept.signed_strength)
            for loss in (loss for loss in losses if loss in DIVIDING_LOSSES):
                warnings.append(
                    f"{owner} shifts a completion's reward before the loss type {loss!r} divides it by the completion's length: with 200 tokens "
                    f"a strength of {strength:g} counts as {strength / 200:g}. Multiply it by the usual length."
                )
        if args.beta == 0 and concept.shaper.name in ("reward", "residual"):
            raise ValueError(f"{owner} divides by `beta`, which is 0.")
    projected = [repr(concept.name) for _, concept in users if projects(concept, "pair")]
    owner = f"Concept {', '.join(projected)}: method 'project' in pair space"
    if projected and pairs <= len(projected):
        raise ValueError(
            f"{owner} would leave nothing of the gradient of a forward batch, which has {pairs} pair(s) over all processes. "
            "Raise `per_device_train_batch_size` (accumulation does not help)."
        )
    if projected and pairs < 4 * len(projected):
        warnings.append(
            f"{owner} takes {len(projected)} of {pairs} directions from the gradient of each forward batch. Larger batches lose "
            "less."
        )
    return warnings
