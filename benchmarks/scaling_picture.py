"""The picture of `benchmarks/scaling.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.scaling_gpus import GPUS, SETTINGS


SHAPED = "predicted shaped, ms", "shaped, ms"
OVERHEAD = "predicted overhead, %", "overhead, %"
"""Columns of what was predicted and what was measured."""


def draw(rows: Sequence[dict[str, Any]], gpus: Sequence[dict[str, Any]], out: Path) -> None:
    """Predicted against measured, and the evaluation for GPUs."""
    from matplotlib.figure import Figure

    chart = Figure(figsize=(13, 4.2), layout="constrained")
    steps, overhead, many = chart.subplots(1, 3)
    for axis, (predicted, measured), name in (
        (steps, SHAPED, "Shaped step, ms"),
        (overhead, OVERHEAD, "Overhead over TRL, %"),
    ):
        values = [row[key] for row in rows for key in (predicted, measured)]
        low, high = 0.8 * min(values), 1.25 * max(values)
        axis.fill_between(
            [low, high], [0.8 * low, 0.8 * high], [1.2 * low, 1.2 * high], color="0.92", label="within 20 %"
        )
        axis.plot([low, high], [low, high], color="0.6", linewidth=0.8)
        for held, colour in ((False, "tab:blue"), (True, "tab:orange")):
            for many_ranks, mark in ((False, "o"), (True, "^")):
                some = [row for row in rows if row["held out"] == held and (row["processes"] > 1) == many_ranks]
                axis.scatter(
                    [row[measured] for row in some],
                    [row[predicted] for row in some],
                    s=22,
                    marker=mark,
                    color=colour,
                    alpha=0.8,
                    linewidths=0,
                    label=f"{'held out' if held else 'fitted'}, {'2 ranks' if many_ranks else '1 rank'}"
                    if some
                    else None,
                )
        axis.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), title=name)
        axis.set(xlabel="measured", ylabel="predicted")
        ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if low <= tick <= high]
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_locator(_fixed(ticks))
            side.set_major_formatter("{x:g}")
            side.set_minor_locator(_fixed([]))
    steps.legend(fontsize=8, frameon=False)
    colours = ("tab:green", "tab:blue", "black", "tab:red")
    for model, style in zip(dict.fromkeys(row["model"] for row in gpus), ("-", "--"), strict=True):
        for setting, colour in zip(SETTINGS, colours, strict=True):
            some = [row for row in gpus if row["model"] == model and row["setting"] == setting]
            many.plot(
                [row["GPUs"] for row in some],
                [row["overhead, %"] for row in some],
                style,
                color=colour,
                label=setting if style == "-" else None,
                linewidth=1.5,
            )
    many.set(
        xscale="log",
        yscale="log",
        title="Evaluated for H100s, ZeRO-3: overhead, %",
        xlabel="GPUs (solid: 8B, dashed: 70B)",
    )
    many.xaxis.set_major_locator(_fixed(GPUS))
    many.xaxis.set_major_formatter("{x:g}")
    many.xaxis.set_minor_locator(_fixed([]))
    many.yaxis.set_major_locator(_fixed([0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10]))
    many.yaxis.set_major_formatter("{x:g}")
    many.yaxis.set_minor_locator(_fixed([]))
    low, high = many.get_ylim()
    many.set_ylim(low, 8 * high)
    many.legend(fontsize=8, frameon=False, loc="upper right")
    chart.savefig(out, dpi=110)


def _fixed(ticks: Sequence[float]) -> Any:
    from matplotlib.ticker import FixedLocator

    return FixedLocator(list(ticks))
