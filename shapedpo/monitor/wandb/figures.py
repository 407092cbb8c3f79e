"""Figures for Weights & Biases, as Plotly's JSON: W&B draws it itself, with hovering and zooming, and needs no image.

Only plain lists go in: Plotly packs NumPy arrays as base64, which older W&B servers cannot read. Text from data is escaped,
because Plotly takes `<a href>` and a few other tags, and `$...$`, in any text.
"""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

from .tables import CONCEPT, FEATURE, Item, Key, Latest, Record, Z, clip, feature_label, number


if TYPE_CHECKING:
    from plotly.graph_objects import Figure

BARS, MAP_ROWS = 12, 30
"""Bars on each side of `concepts/top`; rows of `concepts/heatmap`."""
UP, DOWN, GREY = "#d55e00", "#0072b2", "#777777"
"""Amplified and suppressed: told apart in every common form of colour blindness (Okabe and Ito)."""
LABEL = 40


def top_figure(amplified: list[Item], suppressed: list[Item], step: int) -> Figure | None:
    """Bars of the most amplified and most suppressed, with 95 % intervals."""
    items = amplified[:BARS] + suppressed[:BARS][::-1]
    if not items:
        return None
    halves = [None if item.error is None else _short(Z * item.error) for item in items]
    bars: Any = {
        "type": "bar",
        "orientation": "h",
        "x": [_short(item.value) for item in items],
        "y": list(range(len(items))),  # numbers: two features may share a label, and equal names would share a bar
        "error_x": {"type": "data", "array": halves, "color": GREY, "thickness": 1.2},
        "marker": {"color": [UP if (item.value or 0.0) > 0 else DOWN for item in items]},
        "hovertext": [_escape(f"{clip(item.label, 120)} ({item.kind})") for item in items],
        "hoverinfo": "x+text",
    }
    return _figure(
        [bars],
        f"Amplified and suppressed at step {step}",
        xaxis={"title": {"text": "amplification (sd), 95 % interval"}, "zeroline": True},
        yaxis={**_names([item.label for item in items]), "autorange": "reversed"},
    )


def heatmap_figure(latest: Latest) -> Figure | None:
    """Amplification of each concept at each step; features where they were among the top, held until the next ranking."""
    steps = sorted(latest.history)
    peaks: dict[Key, float] = {}
    for values in latest.history.values():
        for key, value in values.items():
            peaks[key] = max(peaks.get(key, 0.0), abs(value))
    keys = sorted(peaks, key=lambda key: (key[0] != CONCEPT, -peaks[key]))[:MAP_ROWS]
    if not keys:
        return None
    columns: list[dict[Key, float]] = []
    ranking: dict[Key, float] = {}
    for step in steps:
        column = latest.history[step]
        ranking = {key: value for key, value in column.items() if key[0] == FEATURE} or ranking
        columns.append({**ranking, **column})
    peak = _short(max(peaks[key] for key in keys)) or 1.0
    cells: Any = {
        "type": "heatmap",
        "x": steps,
        "y": list(range(len(keys))),
        "z": [[_short(column.get(key)) for column in columns] for key in keys],
        "zmin": -peak,
        "zmax": peak,
        "colorscale": [[0, DOWN], [0.5, "#f7f7f7"], [1, UP]],
        "colorbar": {"title": {"text": "sd"}},
        "hovertemplate": "step %{x}<br>%{z}<extra></extra>",
        "hoverongaps": False,
    }
    return _figure(
        [cells],
        f"Amplification by step, to step {steps[-1]}",
        xaxis={"title": {"text": "train/global_step"}},
        yaxis={**_names([latest.labels[key] for key in keys]), "autorange": "reversed"},
    )


def prediction_figure(latest: Latest) -> Figure | None:
    """Predicted against observed change of the mean score, from a probe; `None` until both are known for something."""
    probe = latest.probe
    named = [(latest.label(name), entry) for name, entry in (probe.get("concepts") or {}).items()]
    features = [(feature_label(entry), entry) for entry in probe.get("features") or ()]
    traces, reach = [], 0.0
    for kind, entries, colour in ((FEATURE, features, GREY), (CONCEPT, named, UP)):
        known = [(label, entry) for label, entry in entries if _both(entry)]
        if not known:
            continue
        traces.append(_points(known, kind, colour))
        reach = max([reach, *(abs(value) for _, entry in known for value in _both(entry))])
    if not traces:
        return None
    diagonal: Any = {"type": "scatter", "mode": "lines", "x": [-reach, reach], "y": [-reach, reach], "name": "equal"}
    r2 = number([probe.get("r2")])
    title = f"Predicted against observed change at step {probe.get('step')}" + (
        "" if r2 is None else f", R² = {r2:.2f}"
    )
    predictor, estimator = probe.get("predictor") or "estimate", probe.get("estimator") or "probe rollouts"
    return _figure(
        [{**diagonal, "line": {"color": GREY, "dash": "dot"}, "hoverinfo": "skip"}, *traces],
        title,
        xaxis={"title": {"text": f"predicted by {_escape(clip(predictor, 80))} (sd)"}},
        yaxis={"title": {"text": f"observed by {_escape(clip(estimator, 80))} (sd)"}},
    )


def _points(known: list[tuple[str, Record]], kind: str, colour: str) -> Any:
    def halves(key: str) -> list[float | None]:
        errors = [number(entry.get(key), 1) for _, entry in known]
        return [None if error is None else _short(Z * error) for error in errors]

    return {
        "type": "scatter",
        "mode": "markers",
        "name": f"{kind}s",
        "x": [_short(number(entry.get("predicted"))) for _, entry in known],
        "y": [_short(number(entry.get("change"))) for _, entry in known],
        "error_x": {"type": "data", "array": halves("predicted"), "thickness": 0.8, "width": 0},
        "error_y": {"type": "data", "array": halves("change"), "thickness": 0.8, "width": 0},
        "marker": {"color": colour},
        "hovertext": [_escape(clip(label, 120)) for label, _ in known],
        "hoverinfo": "x+y+text",
    }


def _both(entry: Record) -> tuple[float, ...]:
    """Predicted and observed change, or nothing where one is unknown."""
    values = (number(entry.get("predicted")), number(entry.get("change")))
    return () if None in values else values  # type: ignore[return-value]


def _names(labels: list[str]) -> dict[str, Any]:
    """An axis whose ticks 0, 1, ... read as these labels."""
    texts = [_escape(clip(label, LABEL)) for label in labels]
    return {"tickvals": list(range(len(texts))), "ticktext": texts, "tickfont": {"size": 10}, "automargin": True}


def _figure(traces: list[Any], title: str, **layout: Any) -> Figure:
    from plotly.graph_objects import Figure

    # Without a template: the default one is 6 kB in every figure.
    layout |= {"title": {"text": title}, "template": "none", "margin": {"t": 40, "r": 20}}
    return Figure(data=traces, layout=layout)


def _escape(text: str | None) -> str:
    """Text as Plotly shows it literally. A dollar sign becomes an entity, or two of them would start a formula."""
    return html.escape(text or "", quote=False).replace("$", "&#36;").replace("\n", " ")


def _short(value: float | None) -> float | None:
    """Four significant digits: a figure's JSON is mostly numbers."""
    return None if value is None else float(f"{value:.4g}")
