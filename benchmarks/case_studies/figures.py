"""The figures of the case studies, in the forms of Bergen et al. (arXiv 2606.12360)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.case_studies.methods import middle
from benchmarks.case_studies.table import place
from benchmarks.case_studies.worlds import WORLDS


Row = dict[str, Any]
GOOD, BAD = "tab:blue", "0.7"


def draw(table: Sequence[Row], out: Path) -> None:
    """Draws every figure that the table has rows for."""
    for name, figure in FIGURES.items():
        chart = figure(table)
        if chart is not None:
            chart.savefig(out / f"case-studies{name}.png", dpi=100)


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    chart = Figure(figsize=(width, height), layout="constrained")
    return chart, chart.subplots(rows, columns, squeeze=False)


def _middle(table: Sequence[Row]) -> list[Row]:
    """The rows of methods at the strength that they are compared at."""
    return [row for row in table if row["strength"] == middle(row["method"])]


def _panels(table: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """The rows of each case and target that is to be suppressed, or restored, in the order of the cases."""
    found: dict[tuple[str, str], list[Row]] = {}
    for name, world in WORLDS.items():
        for target in world.targets:
            part = [row for row in _middle(table) if (row["case"], row["target"]) == (name, target)]
            if part and not world.amplify:
                found[name, target] = part
    return found


def bars(table: Sequence[Row]) -> Any:
    """The target's rate after each method, beside the base's and plain DPO's."""
    panels = _panels(table)
    if not panels:
        return None
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    most = max(map(len, panels.values()))
    chart, axes = _figure(lines, columns, 3.6 * columns, lines * (0.9 + 0.2 * most))
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, ((case, target), part) in zip(axes.flat, panels.items(), strict=False):
        part = part[::-1]
        colours = [GOOD if row["meets"] else BAD for row in part]
        axis.barh(range(len(part)), [row["rate"] for row in part], color=colours, height=0.7)
        axis.axvline(part[0]["before"], color="black", linewidth=1.2)
        axis.axvline(part[0]["plain"], color="tab:red", linewidth=1.2, linestyle="--")
        axis.set_yticks(range(len(part)), [row["method"] for row in part], fontsize=8)
        axis.tick_params(axis="x", labelsize=8)
        axis.set_title(_title(case, target), fontsize=10)
        axis.set_xlim(0, 1.08 * max(row[key] for row in part for key in ("rate", "plain", "before")))
        axis.set_ylim(len(part) - most - 0.6, len(part) - 0.4)  # bars of one height in all panels
        axis.spines[["top", "right"]].set_visible(False)
    chart.suptitle(
        "% of rollouts that show the target (safeguards: refusals of harmful requests). Black: before DPO; red: plain DPO; blue bars are as expected",
        fontsize=10,
    )
    return chart


def overview(table: Sequence[Row]) -> Any:
    """Recovery of the target by method and case, and which are as expected in everything."""
    panels = _panels(table)
    methods = sorted({row["method"] for part in panels.values() for row in part}, key=place)
    if not methods:
        return None
    values = np.full((len(methods), len(panels)), np.nan)
    chart, [[axis]] = _figure(1, 1, 3.2 + 0.78 * len(panels), 1.4 + 0.3 * len(methods))
    for column, part in enumerate(panels.values()):
        for row in part:
            values[methods.index(row["method"]), column] = row["recovery"]
    # 0: as plain DPO leaves it; 100: as before DPO; beyond: too little of it, or what was to come back in excess
    axis.imshow(-np.abs(values - 100), cmap="Blues", vmin=-110, vmax=110, aspect="auto")
    for column, part in enumerate(panels.values()):
        for row in part:
            place_of = methods.index(row["method"])
            text = f"{row['recovery']:.0f}"
            bold = {"weight": "bold"} if row["meets"] else {"color": "0.25"}
            axis.text(
                column, place_of, f"✓ {text}" if row["meets"] else text, ha="center", va="center", fontsize=8, **bold
            )
    axis.set_xticks(range(len(panels)), [_title(*key).replace(": ", ":\n") for key in panels], fontsize=8)
    axis.set_yticks(range(len(methods)), methods, fontsize=8)
    axis.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    axis.spines[:].set_visible(False)
    chart.suptitle(
        "Recovery of the target, %: 0 is plain DPO, 100 before DPO.  ✓: target, other traits and capability as expected",
        fontsize=9,
    )
    return chart


def _title(case: str, target: str) -> str:
    return case if target in case or len(WORLDS[case].targets) == 1 else f"{case}: {target}"


def recovery(table: Sequence[Row]) -> Any:
    """Recovery on the target against recovery off it."""
    panels = {key: part for key, part in _panels(table).items() if not WORLDS[key[0]].restores(key[1])}
    names = list(dict.fromkeys(row["method"] for part in panels.values() for row in part))
    if not names:
        return None
    chart, [[formatting, rest]] = _figure(1, 2, 12, 4.6)
    for axis, title, some in (
        (formatting, "over-formatting", [part for (case, _), part in panels.items() if case == "formatting"]),
        (rest, "the other cases", [part for (case, _), part in panels.items() if case != "formatting"]),
    ):
        axis.axvspan(90, 110, color="0.93")
        axis.axhspan(-25, 25, color="0.93")
        axis.axhline(0, color="0.6", linewidth=0.8)
        for index, name in enumerate(names):
            points = [row for part in some for row in part if row["method"] == name]
            axis.scatter(
                [row["recovery"] for row in points],
                [row["others"] for row in points],
                label=name,
                s=34,
                color=f"C{index % 10}",
                marker="os^"[index // 10],
            )
        axis.set(title=title, xlabel="recovery on the target, %", xlim=(-30, 135), ylim=(-60, 110))
        axis.spines[["top", "right"]].set_visible(False)
    formatting.set_ylabel("lost of the other traits, %")
    rest.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return chart


def frontier(table: Sequence[Row]) -> Any:
    """Refusal of harmful requests against capability, each method over its strengths."""
    part = [row for row in table if row["case"] == "safeguards"]
    if not part:
        return None
    chart, [[axis, benign]] = _figure(1, 2, 11, 4.4)
    names = list(dict.fromkeys(row["method"] for row in part))
    for panel, key, title in (
        (axis, "rate", "refusal of harmful requests, %"),
        (benign, "others off by", "refusal of other requests, points from before"),
    ):
        for index, name in enumerate(names):
            some = [row for row in part if row["method"] == name]
            style = {"color": f"C{index % 10}", "marker": "os^"[index // 10], "markersize": 5, "linewidth": 1}
            panel.plot([row["capability"] for row in some], [row[key] for row in some], label=name, **style)
        base, plain = (part[0]["before"], part[0]["plain"]) if key == "rate" else (0, part[0]["others plain off by"])
        panel.plot(part[0]["capability, before"], base, "*", color="black", markersize=13, label="before DPO")
        panel.plot(part[0]["capability, plain"], plain, "X", color="tab:red", markersize=10, label="plain DPO")
        panel.axhline(base, color="0.7", linewidth=0.8)
        panel.set(xlabel="capability, %", ylabel=title)
        panel.spines[["top", "right"]].set_visible(False)
    benign.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return chart


def strength(table: Sequence[Row]) -> Any:
    """An amplified trait, and capability, against the strength."""
    cases = [name for name, world in WORLDS.items() if world.amplify and any(row["case"] == name for row in table)]
    if not cases:
        return None
    chart, [panels] = _figure(1, len(cases), 5.2 * len(cases), 3.6)
    for axis, case in zip(panels, cases, strict=True):
        part = [row for row in table if row["case"] == case]
        first = part[0]
        lines = {
            first["target"] + (" on the topic" if "others off by" in first else ""): [
                first["plain"],
                *(row["rate"] for row in part),
            ],
            "capability": [first["capability, plain"], *(row["capability"] for row in part)],
        }
        if "others off by" in first:
            start = first["others plain off by"]
            lines[f"{first['target']} elsewhere"] = [
                first["others before"] + start,
                *(first["others before"] + row["others off by"] for row in part),
            ]
        places = range(1 + len(part))
        for colour, (label, values) in zip(("tab:blue", "0.5", "tab:orange"), lines.items(), strict=False):
            axis.plot(places, values, "o-", label=label, color=colour)
        axis.set_xticks(places, ["plain", *(f"{row['strength']:g}" for row in part)])
        axis.set(title=case, xlabel="strength of `reward`", ylabel="%", ylim=(0, 103))
        axis.legend(fontsize=8, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    return chart


FIGURES: dict[str, Callable[[Sequence[Row]], Any]] = {
    "-overview": overview,
    "": bars,
    "-recovery": recovery,
    "-frontier": frontier,
    "-strength": strength,
}
