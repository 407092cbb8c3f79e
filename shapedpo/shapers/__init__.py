"""How a concept's scores change the training signal: one class per method."""

from .base import SHAPERS, ConceptSignal, Shaper, shaper_from_config
from .filtering import Filter
from .inoculation import Inoculate
from .pairs import Mask, Reweight
from .projection import Project
from .residual import Residual
from .reward import Reward
from .steering import Ablate, Steer
from .tokens import Tokens


__all__ = [
    "SHAPERS",
    "Ablate",
    "ConceptSignal",
    "Filter",
    "Inoculate",
    "Mask",
    "Project",
    "Residual",
    "Reward",
    "Reweight",
    "Shaper",
    "Steer",
    "Tokens",
    "shaper_from_config",
]
