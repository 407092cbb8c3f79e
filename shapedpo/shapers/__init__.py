"""How a concept's scores change the training signal: one class per method."""

from .base import SHAPERS, ConceptSignal, Shaper, shaper_from_config
from .pairs import Mask, Reweight
from .projection import Project
from .reward import Reward
from .tokens import Tokens


__all__ = [
    "SHAPERS",
    "ConceptSignal",
    "Mask",
    "Project",
    "Reward",
    "Reweight",
    "Shaper",
    "Tokens",
    "shaper_from_config",
]
