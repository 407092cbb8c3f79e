"""The tables and the picture of `benchmarks/scaling.py`."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.scaling_cases import BASES, Case, fitted
from benchmarks.scaling_gpus import (
    COMPLETION,
    GPUS,
    LOGGING,
    PAIRS,
    SETTINGS,
    TOKENS,
    WIDTH,
    Machine,
    evaluate,
    host_costs,
)
from benchmarks.scaling_model import (
    SECTIONS,
    Costs,
    case_of,
    fit,
    held_bytes,
    shaping_flops,
    shaping_messages,
    summary,
    trl_flops,
)
from benchmarks.scaling_picture import OVERHEAD, SHAPED, draw


CLOSE = 0.2
"""Relative error that counts as predicted."""


def errors(rows: Sequence[dict[str, Any]], predicted: str, measured: str) -> list[float]:
    return [row[predicted] / row[measured] - 1 for row in rows]


QUANTITIES = {
    "TRL's step": ("predicted TRL, ms", "TRL, ms"),
    "shaped step": SHAPED,
    "what shaping adds, ms": ("predicted added, ms", "added, ms"),
    "overhead, %": OVERHEAD,
}


def accuracy(rows: Sequence[dict[str, Any]]) -> str:
    """How well each quantity is predicted, as Markdown: on the cases fitted and on those held out."""
    lines = [
        "| quantity | cases | median error | 90 % of errors below | within 20 % |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for name, (predicted, measured) in QUANTITIES.items():
        for what in (False, True):
            some = [row for row in rows if row["held out"] == what]
            if not some:
                continue
            found = sorted(abs(error) for error in errors(some, predicted, measured))
            close = sum(error <= CLOSE for error in found)
            cells = [
                name,
                "held out" if what else "fitted",
                f"{100 * statistics.median(found):.0f} %",
                f"{100 * found[int(0.9 * (len(found) - 1))]:.0f} %",
                f"{close} of {len(found)}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def label(row: dict[str, Any], base: Case) -> str:
    """How a case differs from the base, in words."""
    names = ("hidden", "tokens", "layers", "pairs")
    words = [f"{name} {row[name]}" for name in names if row[name] != getattr(base, name)]
    words.append(f"{row['concepts']} x {row['action']}")
    if row["monitor"]:
        words.append(f"all {row['features']} features")
    return ", ".join(words)


def table(rows: Sequence[dict[str, Any]], base: Case) -> str:
    """The measured cases as Markdown."""
    lines = [
        "| launch | case | TRL, ms | shaping, ms | overhead | predicted | by whole steps | extra FLOP | extra messages (bytes) | tokens/s, TRL and shaped |",
        "| --- | --- |" + " ---: |" * 8,
    ]
    for row in rows:
        cells = [
            row["launch"],
            label(row, base) + (" *" if row["held out"] else ""),
            f"{row['TRL, ms']:.1f}",
            f"{row['added, ms']:.2f}",
            f"{row['overhead, %']:.1f} %",
            f"{row['predicted overhead, %']:.1f} %",
            f"{row['difference, %']:+.1f} %",
            f"{100 * row['extra FLOP'] / row['TRL, FLOP']:.2f} %",
            f"{row['extra messages']} ({row['extra bytes']})",
            f"{row['TRL, tokens/s']:,.0f}, {row['shaped, tokens/s']:,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def sections(rows: Sequence[dict[str, Any]], base: Case) -> str:
    """Where shaping's time goes in a step, as Markdown: of the cases that the model is fitted on."""
    lines = [
        f"| launch | case | {', ms | '.join(SECTIONS)}, ms | a log, ms |",
        "| --- | --- |" + " ---: |" * (len(SECTIONS) + 1),
    ]
    for row in rows:
        if not row["held out"] and row["hidden"] == base.hidden and row["tokens"] == base.tokens:
            cells = [f"{row[f'{name}, ms']:.2f}" for name in (*SECTIONS, "a log")]
            lines.append(f"| {row['launch']} | {label(row, base)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def counts(rows: Sequence[dict[str, Any]]) -> str:
    """Whether the formulas' counts are those of real steps."""
    checks = {
        "FLOP of TRL's step": (lambda case, processes: trl_flops(case), "TRL, FLOP"),
        "FLOP more in a step": (lambda case, processes: shaping_flops(case), "extra FLOP"),
        "messages more in a step": (lambda *one: shaping_messages(*one)[0], "extra messages"),
        "their bytes": (lambda *one: shaping_messages(*one)[1], "extra bytes"),
        "messages more in a logged step": (
            lambda *one: shaping_messages(*one, logged=True)[0],
            "extra messages, logged",
        ),
        "their bytes, logged": (lambda *one: shaping_messages(*one, logged=True)[1], "extra bytes, logged"),
        "bytes held": (lambda case, processes: held_bytes(case), "held bytes"),
    }
    cases = [case_of(row) for row in rows]
    lines = ["| count | formula exact in | largest error |", "| --- | ---: | ---: |"]
    for name, (formula, measured) in checks.items():
        found = [(formula(case, row["processes"]), row[measured]) for case, row in zip(cases, rows, strict=True)]
        exact = sum(one == other for one, other in found)
        worst = max(abs(one - other) / max(other, 1) for one, other in found)
        lines.append(f"| {name} | {exact} of {len(rows)} | {100 * worst:.2g} % |")
    return "\n".join(lines)


def terms(costs: Costs, unit: str) -> str:
    lines = [f"| {unit} | ms for each |", "| --- | ---: |"]
    return "\n".join([*lines, *(f"| {name} | {value:.4g} |" for name, value in costs.each.items() if value)])


def gpu_table(rows: Sequence[dict[str, Any]]) -> str:
    """The evaluation for GPUs as Markdown."""
    lines = [
        f"| model | GPUs | TRL's step, s (computing, exchanging) | {' | '.join(SETTINGS)} |",
        "| --- | ---: | ---: |" + " ---: |" * len(SETTINGS),
    ]
    for model, gpus in dict.fromkeys((row["model"], row["GPUs"]) for row in rows):
        some = [row for row in rows if (row["model"], row["GPUs"]) == (model, gpus)]
        one = some[0]
        cells = [model, str(gpus), f"{one['TRL, s']:.2f} ({one['computing, s']:.2f}, {one['exchanging, s']:.2f})"]
        cells += [f"{row['overhead, %']:.2f} % ({row['added, ms']:.1f} ms)" for row in some]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def parts(rows: Sequence[dict[str, Any]]) -> str:
    """Where it goes, for the largest model and number of GPUs of each setting."""
    names = ("operators", "products", "memory", "messages", "hold", "log")
    lines = [f"| model, GPUs | setting | {', ms | '.join(names)}, ms |", "| --- | --- |" + " ---: |" * len(names)]
    for row in rows:
        if row["GPUs"] in (GPUS[0], GPUS[-1]):
            cells = [f"{row['model']}, {row['GPUs']}", row["setting"], *(f"{row[f'{name}, ms']:.2f}" for name in names)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def save(rows: Sequence[dict[str, Any]], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{value:.5g}" if isinstance(value, float) else value for key, value in row.items()})


def write(found: Sequence[dict[str, Any]], scale: str, device: str, out: Path) -> str:
    """Writes the tables and the picture into `out`; returns the text.

    Args:
        found: The measured cases.
        scale: Of the cases.
        device: `cpu` or `cuda`.
        out: A folder.
    """
    rows = [summary(one) for one in found]
    learn = [Case(**one["case"]) in fitted(scale, one["launch"]) for one in found]
    trl, shaping = fit(rows, learn)
    gpus = evaluate(host_costs(rows, shaping.each))
    out.mkdir(parents=True, exist_ok=True)
    name = "scaling" if device == "cpu" else f"scaling-{device}"
    save(rows, out / f"{name}.csv")
    save(gpus, out / f"{name}-gpus.csv")
    draw(rows, gpus, out / f"{name}.png")
    base, machine = BASES[scale], Machine()
    clock = "CPU time of rank 0" if device == "cpu" else "wall time"
    warning = "This is a quick run: its times mean nothing, its counts do.\n\n" if scale == "quick" else ""
    text = f"""{warning}What shaping costs over TRL, and how that grows. {len(rows)} cases on {found[0]["machine"]}, torch {found[0]["torch"]}, {min(row["steps"] for row in rows)} to
{max(row["steps"] for row in rows)} measured steps each, plain and shaped in turns in one process. The base: {base.layers} layers, hidden size {base.hidden}, {base.pairs} pairs of {base.tokens} tokens a rank, {base.concepts} concepts of 4
features each, suppressed; a row names what differs. *TRL* and *shaping* are {clock}, medians: of whole plain steps, and of shapedpo's own code within the
shaped ones. *By whole steps* is the difference of the two kinds of step, which has the noise of both. A star: held out of the fit. Tokens a second are of wall time, all ranks.

{accuracy(rows)}

{table(rows, base)}

Where it goes: *collate* is texts in the collator, *read* activations in the reference's pass, *shaping* scores, offsets and metrics, *monitor* the running
sums, *hold* the controller, *messages* the collectives. A log comes every 10 steps by default; here each draws the report too, which a long run does at most 50 times.

{sections(rows, base)}

The counts behind the prediction, by formula and in real steps:

{counts(rows)}

## On many GPUs

The same counts for {PAIRS} pairs of {TOKENS} tokens ({COMPLETION} of them completion) a GPU under ZeRO-3, an SAE of {WIDTH} features, a log every {LOGGING} steps, no gradient checkpointing. Not
measured: what one operation takes is assumed. H100 SXM: {machine.bf16 / 1e12:.0f} TFLOP/s in bf16 and {machine.fp32 / 1e12:.0f} in float32, {machine.memory / 1e12:.2f} TB/s, NVLink {machine.nvlink / 1e9:.0f} GB/s one way (NVIDIA's
datasheet), {machine.network / 1e9:.0f} GB/s a GPU between nodes (DGX H100 user guide: a 400 Gb/s port each); TRL at {100 * machine.mfu:.0f} % of the bf16 peak (the upper end of arXiv 2407.21783, table 4), with all
exchange behind the computing; assumed: an operator {1e6 * machine.operator:.0f} us, a small collective {1e6 * machine.message:.0f} us in a node and {1e6 * machine.hop:.0f} us more for each doubling of nodes, shaping's
products at {100 * machine.efficiency:.0f} % of their peak. All of these make TRL's step short and shaping's part long. The hold controller and a log take the host as long as here.

{gpu_table(gpus)}

Where it goes:

{parts(gpus)}

## What one of each takes here

{terms(trl, "TRL's step")}

{terms(shaping, "shaping")}
"""
    (out / f"{name}.md").write_text(text)
    return text
