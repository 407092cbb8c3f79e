"""What the page is told at once, as plain data: lessons, hypotheses, clusters and maps. The rows' texts come later, or beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...pages import clean
from ..analysis.hypotheses import Analysis
from ..analysis.maps import ClusterMap
from ..harvesting.store import Harvest
from ..labels.names import Label, Labels, hypothesis_key
from ..prediction.run import Place, Prediction
from ..summary import RARE, Finding, Summary


FEATURES = 24
"""Features of a cluster that the page names."""

EXEMPLARS = 3
"""Rows of a cluster that the page shows."""

_SNIPPET = 1000  # characters of a lesson's example
_STATISTICS = ("delta", "mean_in", "mean_out", "d", "z", "p", "q", "strength")


def overview(
    analysis: Analysis,
    harvest: Harvest,
    summary: Summary,
    labels: Labels,
    maps: Mapping[str, ClusterMap],
    prediction: Prediction | None = None,
) -> dict[str, Any]:
    """Everything but the rows' texts.

    Args:
        analysis: The analysis.
        harvest: What it was made of.
        summary: Its lessons in words.
        labels: What features and clusters are called.
        maps: Of [`cluster_maps`].
        prediction: What the audit predicts, if it does.
    """
    number_of = {id(hypothesis): number for number, hypothesis in enumerate(analysis.hypotheses)}
    settings = harvest.settings
    groups = {"everywhere": summary.everywhere, "conditional": summary.conditional, "rare": summary.rare}
    return {
        "title": clean(_last_part(str(settings.get("dataset") or harvest.folder.parent.name)), 200),
        "model": clean(settings.get("model") or "", 200),
        "sae": clean(_sae_name(settings.get("sae")), 200),
        "n_rows": analysis.n_rows,
        "d_sae": harvest.d_sae,
        "tested": analysis.tested,
        "rare": RARE,
        "max_rows": analysis.settings.max_rows,
        "max_q": analysis.settings.max_q,
        "labelled_by": clean(labels.by, 200),
        "lessons": {
            kind: [_lesson(finding, analysis, number_of) for finding in found] for kind, found in groups.items()
        },
        "hypotheses": _columns(analysis, labels, prediction),
        "clusters": {kind: _clusters(analysis, kind, labels, of) for kind, of in maps.items()},
        "features": {
            feature: clean(labels.features[feature], 120)
            for features in _groups(analysis)
            for feature in features[:FEATURES]
            if feature in labels.features
        },
    }


def _groups(analysis: Analysis) -> Iterable[list[int]]:
    return (features for groups in analysis.clusters.values() for features in groups)


def _last_part(name: str) -> str:
    """Of a path its last part; a name on the hub stays."""
    path = Path(name)
    return path.name or name if path.is_absolute() or path.suffix or len(path.parts) > 2 else name


def _sae_name(sae: Any) -> str:
    if not isinstance(sae, Mapping):
        return str(sae or "")
    return " ".join(_last_part(str(sae[key])) for key in ("sae", "source", "release", "path", "sae_id") if sae.get(key))


def _lesson(finding: Finding, analysis: Analysis, number_of: Mapping[int, int]) -> dict[str, Any]:
    numbers = [number_of[id(hypothesis)] for hypothesis in finding.lesson.hypotheses]
    return {
        # a hypothesis belongs to one lesson only
        "lesson": next(place for place, one in enumerate(analysis.attributions) if numbers[0] in one.hypotheses),
        "hypotheses": numbers,
        "where": clean(finding.where, 300),
        "more": [clean(word, 60) for word in finding.more],
        "less": [clean(word, 60) for word in finding.less],
        "n_named": len(finding.lesson.rows),
        "n_rows": len(finding.lesson.evidence),
        "example": {span: clean(text[:_SNIPPET]) for span, text in finding.example.items()},
    }


def _columns(analysis: Analysis, labels: Labels, prediction: Prediction | None) -> dict[str, list[Any]]:
    """The hypotheses, a list for each column."""
    found = analysis.hypotheses
    columns: dict[str, list[Any]] = {
        "view": [h.view for h in found],
        "condition": [h.condition for h in found],
        "response": [h.response for h in found],
        **{name: [rounded(getattr(h, name)) for h in found] for name in _STATISTICS},
        "halves": [[rounded(half) for half in h.halves] for h in found],
        "n_in": [h.n_in for h in found],
        "n_named": [h.n_named for h in found],
        "n_rows": [len(h.rows) for h in found],
        "label": [_label(labels.hypotheses.get(hypothesis_key(h))) for h in found],
    }
    if prediction:
        columns["predicted"] = predicted(prediction, [analysis.predicted_as(h) for h in found])
    return columns


def _label(label: Label | None) -> list[str] | None:
    return [clean(label.title, 200), clean(label.description, 1000)] if label and label.title else None


def _clusters(analysis: Analysis, kind: str, labels: Labels, shown: ClusterMap) -> dict[str, list[Any]]:
    groups = analysis.clusters.get(kind, [[] for _ in shown.rows])
    named = [labels.cluster(kind, number) for number in range(len(groups))]
    return {
        "x": [rounded(x, 3) for x in shown.place[:, 0]],
        "y": [rounded(y, 3) for y in shown.place[:, 1]],
        "rows": shown.rows.tolist(),
        "lean": [rounded(lean, 3) for lean in shown.lean],
        "exemplars": [rows[:EXEMPLARS] for rows in shown.exemplars],
        "size": [len(features) for features in groups],
        "features": [features[:FEATURES] for features in groups],
        "title": [clean(label.title, 200) for label in named],
        "description": [clean(label.description, 1000) for label in named],
        "keywords": [[clean(word, 60) for word in label.keywords or label.tokens] for label in named],
    }


def rounded(value: float | None, digits: int = 4) -> float | None:
    """To some significant digits; `None` for what is not finite."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{float(value):.{digits}g}")


# --- predicted changes, where the audit has them -----------------------------------------------------------------------


def predicted(prediction: Prediction, places: Sequence[Place]) -> list[list[float | None] | None]:
    """`[score, low, high, log-odds, low, high, base rate]` of some things, by kind, number, view and condition; `None` where there is none.

    Without log-odds where their scale is not known: rates that are off by ten times would be taken at their word.
    """
    lines = prediction.lines(places)
    scores, odds = (
        [getattr(prediction, name + end) for end in ("", "_low", "_high")] for name in ("score", "log_odds")
    )
    values = [*scores, *(np.where(prediction.scaled, part, np.nan) for part in odds), prediction.base_rate]
    return [[rounded(value[lines[place]].item()) for value in values] if place in lines else None for place in places]
