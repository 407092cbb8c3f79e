"""shapedpo: DPO that reads which concepts each preference pair teaches, and shapes what the model learns from it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0"

# Loaded on first use: torch, trl and sae-lens take seconds, and the command line's `--help` needs none of them.
_HOME = {
    "Concept": "concept",
    "Gate": "concept",
    "load_concepts": "concept",
    "ShapedDPOConfig": "config",
    "ShapedDPOTrainer": "trainer",
    "Direction": "readouts",
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
    from .readouts import Direction, Readout, Regex, SAEFeatures, TextFunction
    from .shapers import Ablate, Filter, Inoculate, Mask, Project, Residual, Reward, Reweight, Shaper, Steer, Tokens
    from .trainer import ShapedDPOTrainer

__all__ = [
    "Ablate",
    "Concept",
    "Direction",
    "Filter",
    "Gate",
    "Inoculate",
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


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
