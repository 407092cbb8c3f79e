"""What a preference dataset teaches, before anything is trained.

After the data-centric audit of Bergen et al. (arXiv 2606.12360): [`harvest`] reads every feature of an SAE on every pair, once, and keeps
it on disk; [`Harvest`] opens what it has written. [`analyse`] makes both views of it, as ranked hypotheses; [`predict`] says how far a run
would move each feature and cluster. In the order in which an audit is made:

    harvesting/   pairs to a harvest: the one pass of the reference, and the files it leaves
    analysis/     a harvest to hypotheses, lessons and their rows
    prediction/   how far training would move what was found
    rollouts/     what models answer, read as a harvest, and how far it has moved
    labels/       what features, clusters and findings are called
    summary       the end of an audit in words
    page/         `audit.html` and `shapedpo view`
    suggestions   what bears on a description of what the model should learn
    fixes/        a finding to a recipe, or to another dataset
    verify/       after training: did the prediction come true
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import lazy


# Loaded on first use: `harvest` needs torch and trl, which take seconds.
_HOME = {
    "Analysis": "analysis.hypotheses",
    "AuditSettings": "analysis.settings",
    "Harvest": "harvesting.store",
    "HarvestSettings": "harvesting.run",
    "Hypothesis": "analysis.hypotheses",
    "Prediction": "prediction.run",
    "PredictionSettings": "prediction.run",
    "analyse": "analysis.run",
    "harvest": "harvesting.run",
    "predict": "prediction.run",
}

if TYPE_CHECKING:
    from .analysis.hypotheses import Analysis, Hypothesis
    from .analysis.run import analyse
    from .analysis.settings import AuditSettings
    from .harvesting.run import HarvestSettings, harvest
    from .harvesting.store import Harvest
    from .prediction.run import Prediction, PredictionSettings, predict

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
