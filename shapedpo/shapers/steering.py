"""Steering: the policy's forward pass is given the concept, or loses it, while it trains."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .base import ConceptSignal, Shaper, check_number, register, top_threshold


SIDES = ("showing", "chosen", "rejected", "both")


def check_layers(owner: str, layers: Sequence[int] | None) -> list[int] | None:
    """Layers as a list, or `None`. Raises `ValueError` unless they are indices from 0."""
    if layers is None:
        return None
    found = list(layers) if isinstance(layers, list | tuple) else []
    if not found or any(isinstance(layer, bool) or not isinstance(layer, int) or layer < 0 for layer in found):
        raise ValueError(f"{owner}: `layers` must be a list of layer indices from 0, got {layers!r}.")
    return found


def check_path(owner: str, path: object) -> str | None:
    """The path of a direction's file as a string, or `None`. Raises `ValueError` unless it is one."""
    if not isinstance(path, str | os.PathLike | None):
        raise ValueError(f"{owner}: `direction` must be the path of a safetensors file, got {path!r}.")
    return None if path is None else str(path)


@dataclass(frozen=True)
class ForwardEdit(Shaper):
    """What `steer` and `ablate` share: which completions' forward passes are changed, and where."""

    reads_first: ClassVar[bool] = True
    fits_sft: ClassVar[bool] = True

    side: Literal["showing", "chosen", "rejected", "both"] = "showing"
    fraction: float | None = None
    layers: Sequence[int] | None = None
    direction: str | None = None

    def __post_init__(self) -> None:
        owner = f"Method {self.name!r}"
        if self.side not in SIDES:
            raise ValueError(f"{owner}: `side` must be one of {', '.join(SIDES)}, got {self.side!r}.")
        if self.fraction is not None:
            check_number(owner, "fraction", self.fraction, 0, 1)
        object.__setattr__(self, "layers", check_layers(owner, self.layers))
        object.__setattr__(self, "direction", check_path(owner, self.direction))

    def amount(self, signal: ConceptSignal, strength: float, calibration: ConceptSignal) -> Tensor:
        """How much each completion's forward pass is changed: `(2B,)`, 0 for those that are left alone.

        Args:
            signal: The batch's scores.
            strength: Positive to suppress the concept, negative to amplify it. Of size 1 if the method takes no strength.
            calibration: The scores of the calibration sample.
        """
        ahead = self._ahead(signal.delta)
        on = signal.gate
        if self.fraction is not None:
            sample = torch.where(calibration.gate > 0, self._ahead(calibration.delta), torch.nan)
            on = on * ((ahead > 0) & (ahead >= top_threshold(sample, self.fraction)))
        if self.side == "showing":
            sides = torch.cat([signal.delta > 0, signal.delta < 0]).float()
        else:
            sides = torch.tensor([self.side != "rejected", self.side != "chosen"], device=on.device).float()
            sides = sides.repeat_interleave(len(on))
        return strength * on.repeat(2) * sides

    def _ahead(self, delta: Tensor) -> Tensor:
        """How far the side that is changed is ahead of the other one."""
        return {"chosen": delta, "rejected": -delta}.get(self.side, delta.abs())


@register
@dataclass(frozen=True)
class Steer(ForwardEdit):
    r"""Add the concept's direction to the policy's hidden states while it trains, \\( h \leftarrow h + \alpha v \\).

    What the steering supplies the policy need not learn, and without it, from the next evaluation on, it is not there ("explaining
    away"). So a concept is suppressed by steering **towards** it, and amplified by steering away. The reference is never steered, nor is
    evaluation. Steered are the tokens from the content of the prompt's final user turn on (of a prompt that is plain text, all of it) to
    the completion's end, but for the sequence's first token and BOS.

    \\( v \\) is a unit vector: the readout's direction; of several features of an SAE, the mean of their decoder's unit rows, scaled to length
    1. The strength is \\( \alpha \\), in the units of the hidden states: their norm is the yardstick, which differs between models and layers.

    What is logged of `rewards/*`, `logps/*` and the concepts' amplification is of the policy as it is steered.

    Args:
        side: `"showing"`, the completion of each pair that scores higher, whichever that is; `"chosen"`; `"rejected"`; or `"both"`.
        fraction: Only the top fraction of the (gated) pairs, between 0 and 1, by how far the steered side scores above the other. The
            threshold is that quantile of the calibration sample. All pairs by default.
        layers: Decoder layers after which to steer. By default where the concept is read.
        direction: A file with another direction than the readout's (as [`Direction`]`(path=...)` reads one), for what reads a concept need not
            be what brings it about: the `steering` column of `shapedpo fit` says whether it is. Of any readout then, and at the place that the
            file names.

    Source: Bergen et al. (arXiv 2606.12360), activation steering: the rejected side steered towards what it shows did better than the
    chosen one. Preventative steering: Chen et al., "Persona Vectors" (arXiv 2507.21509).
    """

    name: ClassVar[str] = "steer"
    needs_strength: ClassVar[bool] = True
    strength_hint: ClassVar[str] = "in the units of the hidden states, whose norm is the yardstick"


@register
@dataclass(frozen=True)
class Ablate(ForwardEdit):
    r"""Project the concept's directions out of the policy's hidden states while it trains, \\( h \leftarrow h - h Q Q^\top \\).

    The policy learns to do without them, and the gradient has nothing along them. \\( Q \\) is an orthonormal basis of the concept's
    directions (an SAE's decoder rows, or the direction itself). Which tokens, and what is logged, is as for [`Steer`].

    Args:
        side, fraction, layers, direction: As for [`Steer`], but `side` is `"both"` by default.

    Source: Casademunt et al., "Steering Out-of-Distribution Generalization with Concept Ablation Fine-Tuning" (CAFT, arXiv 2507.16795).
    """

    name: ClassVar[str] = "ablate"
    actions: ClassVar[tuple[str, ...]] = ("suppress",)

    side: Literal["showing", "chosen", "rejected", "both"] = "both"
