"""What a concept reads: features of an SAE, a direction, a probe, or the text itself."""

from .base import POOLINGS, ActivationReader, LoadedReadout, Readout, TextReader, readout_from_dict
from .direction import Direction
from .family import family_mismatch
from .lab import LabTrait
from .probe import AttentionProbe, LinearProbe
from .sae import SAEFeatures
from .text import Regex, TextFunction


__all__ = [
    "POOLINGS",
    "ActivationReader",
    "AttentionProbe",
    "Direction",
    "LabTrait",
    "LinearProbe",
    "LoadedReadout",
    "Readout",
    "Regex",
    "SAEFeatures",
    "TextFunction",
    "TextReader",
    "family_mismatch",
    "readout_from_dict",
]
