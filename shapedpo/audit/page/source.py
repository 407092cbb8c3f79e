"""An audit's folder, opened for its page."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..analysis.hypotheses import Analysis
from ..analysis.maps import ClusterMap, cluster_maps
from ..folder import ANALYSIS, HARVEST
from ..harvesting.store import Harvest
from ..labels.names import Labels
from ..prediction.run import Prediction
from ..summary import Summary, summarise
from .overview import overview


@dataclass
class Audit:
    """What `shapedpo audit` left in a folder.

    Attributes:
        folder: The folder.
        analysis, harvest: What is in it.
        labels: What features and clusters are called; empty where there is no `labels.json` for this analysis.
        maps: Of [`cluster_maps`].
        prediction: What the audit predicts; `None` where an older one did not.
    """

    folder: Path
    analysis: Analysis
    harvest: Harvest
    labels: Labels
    maps: dict[str, ClusterMap]
    prediction: Prediction | None = None

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Audit:
        """Open a folder.

        Raises:
            FileNotFoundError: If it holds no finished audit; the text says what is missing.
            ValueError: If a file of it cannot be read.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"There is no folder '{folder}'. Name the one that `shapedpo audit --out` wrote to."
            )
        analysis, harvest = Analysis.load(folder / ANALYSIS), Harvest.open(folder / HARVEST)
        return cls(
            folder,
            analysis,
            harvest,
            Labels.load(folder, analysis) or Labels(),
            cluster_maps(analysis, harvest),
            Prediction.load_if_made(folder / ANALYSIS),
        )

    @cached_property
    def summary(self) -> Summary:
        """Of [`summarise`]."""
        return summarise(self.analysis, self.harvest, self.labels.features, prediction=self.prediction)

    def overview(self) -> dict[str, Any]:
        """Of [`overview`]."""
        return overview(self.analysis, self.harvest, self.summary, self.labels, self.maps, self.prediction)

    def tokenizer(self) -> Any | None:
        """The model's; `None` where it cannot be had, and tokens are not marked."""
        from transformers import AutoTokenizer

        from ...sources import model_source

        if not (name := self.harvest.settings.get("model")):
            return None
        try:
            return AutoTokenizer.from_pretrained(model_source(name))
        except (OSError, ValueError):
            return None
