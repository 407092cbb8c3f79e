"""Which methods do not go together in one run, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .concept import Concept
from .shapers import Inoculate, Residual
from .shapers.steering import ForwardEdit


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
