"""What a preference dataset teaches, before anything is trained.

After the data-centric audit of Bergen et al. (arXiv 2606.12360): [`harvest`] reads every feature of an SAE on every pair, once, and keeps
it on disk; [`Harvest`] opens what it has written. [`analyse`] makes both views of it, as ranked hypotheses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import lazy


# Loaded on first use: `harvest` needs torch and trl, which take seconds.
_HOME = {
    "Analysis": "hypotheses",
    "AuditSettings": "settings",
    "Harvest": "store",
    "HarvestSettings": "harvesting",
    "Hypothesis": "hypotheses",
    "Prediction": "prediction",
    "PredictionSettings": "prediction",
    "analyse": "analysis",
    "harvest": "harvesting",
    "predict": "prediction",
}

if TYPE_CHECKING:
    from .analysis import analyse
    from .harvesting import HarvestSettings, harvest
    from .hypotheses import Analysis, Hypothesis
    from .prediction import Prediction, PredictionSettings, predict
    from .settings import AuditSettings
    from .store import Harvest

__all__ = [
    "Analysis",
    "AuditSettings",
    "Harvest",
    "HarvestSettings",
    "Hypothesis",
    "Prediction",
    "PredictionSettings",
    "analyse",
    "harvest",
    "predict",
]


__getattr__ = lazy.attributes(__name__, _HOME)
