"""Readout of a trait of the embedded lab."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from .base import ActivationReader, Readout, register
from .sae import SAEFeatures


@register
@dataclass(frozen=True)
class LabTrait(Readout):
    """The features of the lab's SAE that read one of its traits (see [`shapedpo.lab`]).

    It names no folder, so a recipe or checkpoint with it is good on any machine.

    Args:
        trait: Name of a trait of `shapedpo.lab.TRAITS`.

    Raises:
        ValueError: If the lab has no such trait.
    """

    type: ClassVar[str] = "lab"

    trait: str

    def __post_init__(self) -> None:
        from ..lab import TRAITS

        if self.trait not in TRAITS:
            raise ValueError(f"unknown trait {self.trait!r}, expected one of {', '.join(TRAITS)}")

    def features(self) -> SAEFeatures:
        """The shipped SAE's features of the trait."""
        from ..lab.features import shipped_features

        return SAEFeatures(sae="lab", features=shipped_features()[self.trait])

    def load(self) -> ActivationReader:
        """Load the shipped SAE's features."""
        return self.features().load()

    def load_shared(self, loaded: dict[Any, Any]) -> ActivationReader:
        return self.features().load_shared(loaded)
