"""What `shapedpo verify` leaves: figures and misses as text, all lines and figures as data, and a picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...files import replacing
from ..analysis.hypotheses import Analysis
from ..harvesting.store import Harvest
from ..labels.names import exciting_tokens
from ..prediction.conditions import Conditions
from ..rollouts.run import Rollouts
from ..summary import feature_names
from .comparison import GROUPS, Figures, Miss, Outcome, as_json, figures, largest_misses


_SHOWN = 160  # characters of an answer


def report(
    outcome: Outcome,
    rollouts: Rollouts,
    conditions: Conditions,
    harvest: Harvest,
    analysis: Analysis,
    decode: Callable[[list[int]], str],
    out: Path,
    *,
    concepts: Mapping[str, Sequence[int]] | None = None,
    misses: int = 10,
) -> dict[str, Figures]:
    """Print the figures and the largest misses; write `verify.txt`, `verify.json`, `verify.parquet` and `verify.png`.

    Args:
        outcome: Predicted and observed.
        rollouts: What it was observed on.
        conditions: Of the audit.
        harvest: The audit's, whose texts name features.
        analysis: The audit's.
        decode: Makes text of tokens.
        out: Where the files go.
        concepts: Features of the named concepts.
        misses: How many are shown.
    """
    from rich.console import Console, Group

    found = figures(outcome)
    slopes = {
        (kind, view): found[name].slope for name, (kind, view, less) in GROUPS.items() if not less and name in found
    }
    missed = largest_misses(outcome, rollouts, conditions, misses, slopes)
    features = {f for miss in missed for f in _features(outcome, analysis, miss.line)[:4]}
    conditional = [outcome.prediction.condition[m.line] for m in missed if outcome.prediction.view[m.line] == "prompt"]
    features |= {f for condition in conditional for f in analysis.clusters["prompt"][condition][:4]}
    labels = exciting_tokens(harvest, features, decode)
    lines = concept_lines(outcome, concepts or {})
    parts: list[Any] = [_figures(found, len(rollouts.log_ratios), bool(outcome.prediction.scaled.any()))]
    if lines:
        parts.append(_concepts(lines))
    if unseen := [name for name in concepts or {} if name not in lines]:
        parts.append(f"Too rare in data and answers to be looked at: {', '.join(unseen)}.")
    if missed:
        parts.append(_misses(outcome, missed, analysis, labels))
    elif misses:
        parts.append("No prediction misses by more than the noise of the answers.")
    Console().print(Group(*parts))
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / "verify.txt") as partial, partial.open("w", encoding="utf-8") as file:
        Console(file=file, width=200).print(Group(*parts))
    data = {
        "rollouts": 2 * len(rollouts.log_ratios),
        "log_ratio_nats": {
            "mean": rollouts.log_ratios.mean(axis=0).tolist(),
            "sd": rollouts.log_ratios.std(axis=0).tolist(),
        },
        "figures": as_json(found),
        "concepts": lines,
        "misses": [
            {**outcome.prediction.line(miss.line), "observed": float(outcome.observed[miss.line]), **vars(miss)}
            for miss in missed
        ],
    }
    with replacing(out / "verify.json") as partial:
        partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    outcome.save(out)
    picture(outcome, found, out / "verify.png")
    print(
        f"{len(outcome.observed):,} lines: {out / 'verify.parquet'}; figures: {out / 'verify.json'}; picture: {out / 'verify.png'}"
    )
    return found


def concept_lines(outcome: Outcome, concepts: Mapping[str, Sequence[int]]) -> dict[str, dict[str, float]]:
    """Predicted and observed change of named concepts, the mean over their features', in sd."""
    every = outcome.of("feature", "global")
    p, lines = every.prediction, {}
    for name, features in concepts.items():
        which = np.isin(p.number, features)
        if which.any():
            values: dict[str, Any] = {
                "predicted": p.score,
                "low": p.score_low,
                "high": p.score_high,
                "observed": every.observed,
            }
            lines[name] = {key: float(np.mean(value[which])) for key, value in values.items()}
            lines[name]["se"] = float(np.mean(every.se[which]))  # features of a concept go together
    return lines


def picture(outcome: Outcome, found: Mapping[str, Figures], path: Path) -> None:
    """Predicted against observed change, a panel a group."""
    from matplotlib.figure import Figure

    shown = [name for name in GROUPS if name in found]
    contrast = outcome.contrast()
    figure = Figure(figsize=(4 * min(4, len(shown)), 4 * -(-len(shown) // 4)), layout="constrained")
    axes: Any = figure.subplots(-(-len(shown) // 4), min(4, len(shown)), squeeze=False).ravel()
    for ax, name in zip(axes, shown, strict=False):
        kind, view, less = GROUPS[name]
        some = (contrast if less else outcome).of(kind, view)
        p, f = some.prediction, found[name]
        ax.errorbar(p.score, some.observed, yerr=some.se, fmt="none", ecolor="0.8", elinewidth=0.6, zorder=1)
        ax.scatter(p.score, some.observed, s=6, color="tab:blue", zorder=2)
        ends = np.array([p.score.min(), p.score.max()])
        ax.plot(ends, f.slope * ends, color="tab:orange", lw=1)
        ax.axhline(0, color="0.9", lw=0.8, zorder=0)
        ax.axvline(0, color="0.9", lw=0.8, zorder=0)
        ax.set_title(f"{name}\n$R^2$ {f.r2:.2f} [{f.low:.2f}, {f.high:.2f}]", fontsize=9)
        ax.set_xlabel("predicted change, sd")
        ax.set_ylabel("observed change, sd")
    for ax in axes[len(shown) :]:
        ax.set_visible(False)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=120, format="png")


def _figures(found: Mapping[str, Figures], pairs: int, scaled: bool) -> Any:
    """A table of the figures; `scaled` says whether the prediction knew how far the run would go."""
    from rich.table import Table

    table = Table(title=f"Predicted and observed change, on {pairs:,} answers before and after", title_justify="left")
    for head in ("of", "n", "R² [95 %]", "ceiling", "slope", "in 90 %", "sign"):
        table.add_column(head, justify="left" if head == "of" else "right")
    for name, f in found.items():
        table.add_row(
            name,
            f"{f.n:,}",
            f"{f.r2:.2f} [{f.low:.2f}, {f.high:.2f}]",
            f"{f.ceiling:.2f}",
            f"{f.slope:.2f}",
            f"{f.covered if scaled else f.covered_scaled:.0%}",
            "-" if np.isnan(f.sign) else f"{f.sign:.0%}",  # where no change is clear
        )
    table.caption = (
        "R² is the squared correlation; ceiling: that of a perfect prediction, as the answers are noisy; slope: of observed on predicted "
        f"change; in 90 %: share of the intervals that held{'' if scaled else ', multiplied by the slope, as the audit does not know how far a run goes'}; "
        "sign: right where the change is clear"
    )
    table.caption_justify = "left"
    return table


def _concepts(lines: Mapping[str, Mapping[str, float]]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table("concept", "predicted, sd [90 %]", "observed, sd", title="Named concepts", title_justify="left")
    for name, line in lines.items():
        predicted = f"{line['predicted']:+.2f} [{line['low']:+.2f}, {line['high']:+.2f}]"
        table.add_row(escape(name), escape(predicted), f"{line['observed']:+.2f} ± {line['se']:.2f}")
    return table


def _misses(outcome: Outcome, missed: Sequence[Miss], analysis: Analysis, labels: Mapping[int, str]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="The largest misses, after scaling", title_justify="left", show_lines=True)
    for name in ("what and where", "predicted, observed", "prompt, answer before (-) and after (+)"):
        table.add_column(name, overflow="fold", ratio={"what and where": 3, "predicted, observed": 2}.get(name, 7))
    table.expand = True
    p = outcome.prediction
    for miss in missed:
        where = "everywhere"
        if p.view[miss.line] == "prompt":
            condition = analysis.clusters["prompt"][p.condition[miss.line]]
            where = f"prompts with {feature_names(condition, labels)}"
        named = feature_names(_features(outcome, analysis, miss.line), labels)
        cells = (
            f"{str(p.kind[miss.line]).replace('_', ' ')} {p.number[miss.line]}: {named}\n{where}",
            f"{p.score[miss.line]:+.2f} [{p.score_low[miss.line]:+.2f}, {p.score_high[miss.line]:+.2f}]\n"
            f"{outcome.observed[miss.line]:+.2f} ± {outcome.se[miss.line]:.2f}",
            f"? {_short(miss.prompt)}\n- {_short(miss.before)}\n+ {_short(miss.after)}",
        )
        table.add_row(*map(escape, cells))
    return table


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _features(outcome: Outcome, analysis: Analysis, line: int) -> list[int]:
    kind, number = outcome.prediction.kind[line], int(outcome.prediction.number[line])
    if kind == "feature":
        return [number]
    return analysis.clusters["feature" if kind == "feature_cluster" else "response"][number]
