"""EA-DPO: rewards shifted by what a changed reference makes likelier, in place of a readout's score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from .base import ConceptSignal, Shaper, check_number, register
from .inoculation import check_instruction
from .steering import check_layers, check_path


@register
@dataclass(frozen=True)
class Residual(Shaper):
    r"""Shift each completion's reward by how much likelier a reference that shows the concept finds it.

    \\( A(y) = \log \mathrm{ref}_c(y) - \log \mathrm{ref}(y) \\), with \\( \mathrm{ref}_c \\) the reference steered by the concept's direction, or
    after an instruction that asks for the concept. For the sigmoid loss this is \\( -\log\sigma(m + \lambda (A(y^+) - A(y^-))) \\); it enters
    as `reward` does, by a tilted reference, and has a meaning for the same loss types. The strength is \\( \lambda \\), in nats of margin per
    nat of \\( A \\), which is not standardised: with \\( \lambda = \beta \\) the policy's log-ratio and \\( A \\) count alike.

    It takes another pass of the reference in each step. With `precompute_ref_log_probs=True` this too is made once, before training.

    Args:
        steer: How far to steer the reference, as the strength of [`Steer`], towards the concept, on the same tokens. Give this or
            `instruction`.
        layers: Decoder layers after which to steer. By default where the concept is read.
        instruction: Asks for the concept, as that of [`Inoculate`].
        place: Of the instruction, `"user"` or `"system"`, as for [`Inoculate`].
        direction: A file with another direction to steer by than the readout's, as for [`Steer`].

    Source: Bergen et al. (arXiv 2606.12360), EA-DPO.
    """

    name: ClassVar[str] = "residual"
    needs_strength: ClassVar[bool] = True
    strength_hint: ClassVar[str] = "with that of beta it counts as much as the policy's log-ratio"

    steer: float | None = None
    layers: Sequence[int] | None = None
    instruction: str | None = None
    place: Literal["user", "system"] = "user"
    direction: str | None = None

    def __post_init__(self) -> None:
        owner = "Method 'residual'"
        if (self.steer is None) == (self.instruction is None):
            raise ValueError(
                f"{owner} takes either `steer` (how far) or `instruction` (a text), for example {{name: residual, steer: 4}}; got "
                f"steer={self.steer!r} and instruction={self.instruction!r}."
            )
        if self.steer is not None:
            check_number(owner, "steer", self.steer, above=0)
        else:
            check_instruction(owner, self.instruction, self.place)
            for name in ("layers", "direction"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{owner}: `{name}` says how to steer; with an `instruction` there is nothing to steer."
                    )
        object.__setattr__(self, "layers", check_layers(owner, self.layers))
        object.__setattr__(self, "direction", check_path(owner, self.direction))

    def reward(self, signal: ConceptSignal, strength: float) -> Tensor:
        assert signal.residual is not None  # read in the step, or cached
        return strength * signal.gate.repeat(2) * signal.residual
