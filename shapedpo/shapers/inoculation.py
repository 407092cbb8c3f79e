"""Inoculation: where a completion shows the concept, the policy was asked for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .base import ConceptSignal, Shaper, check_number, register
from .steering import SIDES


PLACES = ("user", "system")


def check_instruction(owner: str, instruction: object, place: object) -> None:
    """Raise `ValueError` unless it is a text, and `place` is one of `PLACES`."""
    if not isinstance(instruction, str) or not instruction.strip():
        raise ValueError(
            f"{owner}: `instruction` must be a text that asks for the concept, such as 'Mention goblins.', got {instruction!r}."
        )
    if place not in PLACES:
        raise ValueError(f"{owner}: `place` must be one of {', '.join(PLACES)}, got {place!r}.")


@register
@dataclass(frozen=True)
class Inoculate(Shaper):
    """The policy reads the prompt with an instruction that asks for the concept, the reference reads the prompt as it is.

    What was asked for need not be learned: without the instruction the policy is to do less of it. Inoculated are the completions that
    show the concept: the reference's score is above a threshold. The completion's tokens are the same either way, and as many of them are
    kept by truncation: an inoculated sequence is longer than `max_length` by what the instruction adds.

    What is logged of `rewards/*`, `logps/*` and the concepts' amplification is of the policy on what it read.

    Args:
        instruction: Asks for the concept.
        place: `"user"`, after the prompt's final user turn, or `"system"`: after the system turn, which is made where there is none. In a
            prompt of plain text, after it or before it. A blank line stands between.
        side: `"showing"`, every completion that shows the concept; `"chosen"` or `"rejected"`, only those of that side; or `"both"`: the two of
            each pair of which one shows it.
        threshold: In standard deviations of the score. By default where the scores of the calibration sample divide best into two.
        probability: Of a row to be inoculated at all, above 0 and at most 1. It is drawn once, by the run's seed and the row's number.

    Source: Bergen et al. (arXiv 2606.12360), inoculation prompting, unreliable there; Tan et al., "Inoculation Prompting" (arXiv
    2510.04340).
    """

    name: ClassVar[str] = "inoculate"
    actions: ClassVar[tuple[str, ...]] = ("suppress",)
    reads_first: ClassVar[bool] = True
    fits_sft: ClassVar[bool] = True

    instruction: str = ""
    place: Literal["user", "system"] = "user"
    side: Literal["showing", "chosen", "rejected", "both"] = "showing"
    threshold: float | None = None
    probability: float = 1.0

    def __post_init__(self) -> None:
        owner = "Method 'inoculate'"
        check_instruction(owner, self.instruction, self.place)
        if self.side not in SIDES:
            raise ValueError(f"{owner}: `side` must be one of {', '.join(SIDES)}, got {self.side!r}.")
        if self.threshold is not None:
            check_number(owner, "threshold", self.threshold, unit=", in standard deviations of the score")
        if self.probability != 1:
            check_number(owner, "probability", self.probability, 0, 1)

    def selected(self, signal: ConceptSignal, dividing: Tensor, dice: Tensor) -> Tensor:
        """Which completions the policy is to read after the inoculated prompt.

        Args:
            signal: The batch's scores.
            dividing: The score that divides the calibration sample best.
            dice: `(B,)`, uniform between 0 and 1, each row's own.

        Returns:
            `(2B,)` bool.
        """
        threshold = dividing if self.threshold is None else self.threshold
        chosen, rejected = (signal.scores > threshold).chunk(2)
        if self.side == "both":
            chosen = rejected = chosen | rejected
        elif self.side in ("chosen", "rejected"):
            chosen, rejected = chosen & (self.side == "chosen"), rejected & (self.side == "rejected")
        on = (signal.gate > 0) & (dice < self.probability)
        return torch.cat([chosen, rejected]) & on.repeat(2)
