"""shapedpo: DPO that reads which concepts each preference pair teaches, and shapes what the model learns from it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import lazy


__version__ = "0.1.0"

# Loaded on first use.
_HOME = {
    "Concept": "concept",
    "Gate": "concept",
    "load_concepts": "concept",
    "ShapedDPOConfig": "config",
    "ShapedDPOTrainer": "trainer",
    "AttentionProbe": "readouts",
    "Direction": "readouts",
    "LinearProbe": "readouts",
    "Readout": "readouts",
    "Regex": "readouts",
    "SAEFeatures": "readouts",
    "TextFunction": "readouts",
    "Ablate": "shapers",
    "Filter": "shapers",
    "Inoculate": "shapers",
    "Mask": "shapers",
    "Project": "shapers",
    "Residual": "shapers",
    "Reward": "shapers",
    "Reweight": "shapers",
    "Shaper": "shapers",
    "Steer": "shapers",
    "Tokens": "shapers",
}

if TYPE_CHECKING:
    from .concept import Concept, Gate, load_concepts
    from .config import ShapedDPOConfig
    from .readouts import AttentionProbe, Direction, LinearProbe, Readout, Regex, SAEFeatures, TextFunction
    from .shapers import Ablate, Filter, Inoculate, Mask, Project, Residual, Reward, Reweight, Shaper, Steer, Tokens
    from .trainer import ShapedDPOTrainer

__all__ = [
    "Ablate",
    "AttentionProbe",
    "Concept",
    "Direction",
    "Filter",
    "Gate",
    "Inoculate",
    "LinearProbe",
    "Mask",
    "Project",
    "Readout",
    "Regex",
    "Residual",
    "Reward",
    "Reweight",
    "SAEFeatures",
    "ShapedDPOConfig",
    "ShapedDPOTrainer",
    "Shaper",
    "Steer",
    "TextFunction",
    "Tokens",
    "load_concepts",
]


__getattr__ = lazy.attributes(__name__, _HOME)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
