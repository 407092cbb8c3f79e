"""How a concept's scores change the training signal: one class per method."""

from .base import SHAPERS, ConceptSignal, Shaper, shaper_from_config
from .pairs import Mask, Reweight
from .projection import Project
from .reward import Reward


__all__ = ["SHAPERS", "ConceptSignal", "Mask", "Project", "Reward", "Reweight", "Shaper", "shaper_from_config"]
