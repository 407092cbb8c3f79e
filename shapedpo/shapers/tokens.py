"""Token filtering: the tokens that show a concept leave the loss, and the rest of the completion stays."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import ClassVar, Literal

from .base import Shaper, check_number, register


SIDES = ("chosen", "rejected", "both")


@register
@dataclass(frozen=True)
class Tokens(Shaper):
    r"""Leave the completion tokens out of the loss whose readout passes a threshold.

    \\( \log\pi(y) \\) and \\( \log\mathrm{ref}(y) \\) become sums over the tokens that stay, and so do the lengths that some losses divide
    by. Tokens are read by the reference, in the pass that it makes anyway, one number each: the mean of the readout's features,
    standardised as completions' scores are. A token leaves where that is **above** the threshold. Of a [`Regex`] the tokens leave that a
    match touches, and there is no threshold to give.

    Args:
        side: `"chosen"`, `"rejected"` or `"both"`. By default the side that teaches what is not wanted: to suppress, the chosen one;
            to amplify, the rejected one, which teaches against the concept.
        threshold: In standard deviations of the concept's score.
        quantile: The threshold as a quantile, between 0 and 1, of the tokens of that side of the calibration sample: 0.99 leaves out the
            top 1 %, or fewer where many tokens score alike.
        contrast: The threshold that best tells the responses of a labelled set apart, by F1: the path of a JSON Lines, CSV or Parquet file of
            `prompt`, `response` (two strings, or two lists of messages) and `label` (whether the response shows the concept). A response
            counts as showing it where one of its tokens passes. Give one of the three.
        whole_words: Whether a word leaves as a whole as soon as one of its tokens does. A word is a run of letters and digits.

    Source: Bergen et al. (arXiv 2606.12360), token filtering.
    """

    name: ClassVar[str] = "tokens"
    reads_first: ClassVar[bool] = True
    fits_sft: ClassVar[bool] = True

    side: Literal["chosen", "rejected", "both"] | None = None
    threshold: float | None = None
    quantile: float | None = None
    contrast: str | None = None
    whole_words: bool = False

    def __post_init__(self) -> None:
        owner = "Method 'tokens'"
        if self.side is not None and self.side not in SIDES:
            raise ValueError(f"{owner}: `side` must be one of {', '.join(SIDES)}, got {self.side!r}.")
        given = [name for name in ("threshold", "quantile", "contrast") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{owner} takes one of `threshold`, `quantile` and `contrast`, got {' and '.join(given)}.")
        if self.threshold is not None:
            check_number(owner, "threshold", self.threshold, unit=", in standard deviations of the score")
        if self.quantile is not None:
            check_number(owner, "quantile", self.quantile, 0, 1)
        if not isinstance(self.contrast, str | os.PathLike | None):
            raise ValueError(f"{owner}: `contrast` must be the path of a file, got {self.contrast!r}.")
        object.__setattr__(self, "contrast", None if self.contrast is None else str(self.contrast))
        if not isinstance(self.whole_words, bool):
            raise ValueError(f"{owner}: `whole_words` must be true or false, got {self.whole_words!r}.")

    def sides(self, suppress: bool) -> tuple[bool, bool]:
        """Whether tokens leave the chosen and the rejected completions."""
        side = self.side or ("chosen" if suppress else "rejected")
        return side in ("chosen", "both"), side in ("rejected", "both")
