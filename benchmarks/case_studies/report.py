"""The tables of the case studies, as CSV and Markdown."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.case_studies.methods import GIVEN, NO_GATE, PROBE, SPARING, method, middle
from benchmarks.case_studies.study import Job
from benchmarks.case_studies.table import Row, expected, place
from benchmarks.case_studies.worlds import WORLDS, World


COLUMNS = {
    "strength": "strength",
    "before": "before, %",
    "plain": "plain DPO, %",
    "rate": "this, %",
    "recovery": "recovery, %",
    "others": "off target, %",
    "others off by": "elsewhere, points",
    "seeming off by": "seeming, points",
    "capability": "capability, %",
    "kl": "KL, nats/token",
    "time": "time",
}


def write(table: Sequence[Row], missing: Sequence[Job], out: Path) -> None:
    """The table, as CSV (all of it) and Markdown."""
    out.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(name for row in table for name in row))
    with (out / "case-studies.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=names)
        writer.writeheader()
        writer.writerows(table)
    (out / "case-studies.md").write_text("\n".join(_markdown(table, missing)) + "\n", encoding="utf-8")


def _markdown(table: Sequence[Row], missing: Sequence[Job]) -> Iterator[str]:
    yield from INTRODUCTION.splitlines()
    yield from ("", OVERVIEW, "", *overview(table))
    for name, world in WORLDS.items():
        for target in world.targets:
            part = [row for row in table if (row["case"], row["target"]) == (name, target)]
            if not part:
                continue
            left_out = ("recovery",) if world.amplify else ()
            shown = {key: title for key, title in COLUMNS.items() if key in part[0] and key not in left_out}
            first = part[0]
            yield from ("", f"## {name}" + (f": {target}" if len(world.targets) > 1 else ""), "")
            yield (
                f"{_taught(world)} Expected: {expected(world)}. Plain DPO: capability {first['capability, plain']:.1f} % (before {first['capability, before']:.1f} %), KL {first['kl, plain']:.3f}"
                + (f", elsewhere {first['others plain off by']:+.1f} points" if "others plain off by" in first else "")
                + (f", seeming {first['seeming plain off by']:+.1f}." if "seeming plain off by" in first else ".")
            )
            yield ""
            yield "| method | " + " | ".join(shown.values()) + " | as expected | seeds |"
            yield "| --- |" + " ---: |" * len(shown) + " --- | ---: |"
            for row in part:
                cells = [
                    "" if key == "strength" and not method(row["method"]).meaning else _cell(key, row[key])
                    for key in shown
                ]
                verdict = {True: "**yes**", False: "no", None: ""}[row["meets"]]
                yield f"| {row['method']} | {' | '.join(cells)} | {verdict} | {row['seeds']} |"
    if missing:
        yield from ("", f"Not run yet: {len(missing)} runs ({_summary(missing)}).")


def overview(table: Sequence[Row]) -> Iterator[str]:
    """Which method does what is expected of which case, each at its middle strength."""
    part = [row for row in table if not WORLDS[row["case"]].amplify and row["strength"] == middle(row["method"])]
    cases = [name for name in WORLDS if any(row["case"] == name for row in part)]
    if not cases:
        return
    yield "| method | " + " | ".join(cases) + " |"
    yield "| --- |" + " --- |" * len(cases)
    for name in sorted({row["method"] for row in part}, key=place):
        of = [row for row in part if row["method"] == name]
        cells = [", ".join(_short(row) for row in of if row["case"] == case) for case in cases]
        yield f"| {name} | {' | '.join(cells)} |"


def _short(row: Row) -> str:
    world = WORLDS[row["case"]]
    text = f"{row['recovery']:.0f}/{row['others']:.0f}" if world.together < 1 else f"{row['off by']:+.1f}"
    name = f"{row['target']} " if len(world.targets) > 1 else ""
    return name + (f"**{text}**" if row["meets"] else text)


def _taught(world: World) -> str:
    lessons = ", ".join(
        f"{lesson.name}{'' if lesson.more else ' (less)' if lesson.name in world.taught else ''} {lesson.rate:.0%}"
        + (f" of {lesson.when}" if lesson.when else "")
        for lesson in world.lessons
    )
    return f"The data teach: {lessons}."


def _cell(key: str, value: float) -> str:
    if key == "strength":
        return f"{value:g}"
    if key in ("others off by", "seeming off by"):
        return f"{value:+.1f}"
    if key in ("recovery", "others"):
        return f"{value:.0f}"
    return f"{value:.3f}" if key == "kl" else f"{value:.2f}" if key == "time" else f"{value:.1f}"


def _summary(missing: Sequence[Job]) -> str:
    counts: dict[str, int] = {}
    for job in missing:
        counts[job.world] = counts.get(job.world, 0) + 1
    return ", ".join(f"{name} {count}" for name, count in counts.items())


OVERVIEW = """\
At the middle strength of each method: the target's change from before DPO, in points; of formatting recovery on and off the target, in percent. Bold: as
expected of the case."""
INTRODUCTION = f"""\
# Case studies

`python -m benchmarks.case_studies`. Each run trains the lab's model on 800 pairs and samples 400 held-out prompts (of conditional cases half of
them on the affected topics). *Recovery* is 100 % x (plain - this)/(plain - before) of the target, *off target* the mean of the same over the other taught traits
(what is lost of them; negative: they are learned better), *elsewhere* and *seeming* the target's change on other prompts and on those that only
look affected, in points, *capability* exact answers to 232 sums and facts, *KL* to the base, on 128 rollouts, *time* the processor's time for a step as a
multiple of plain DPO's (only as good as the machine was quiet). Sampling noise of a rate near 5 % is 1.1 points (sd), of one near 50 % 2.5 (conditional cases: 1.4 times that). The strength of `mask` and `filter`
is in multiples of the share of pairs that teach the target, which nobody knows of real data; that of `tokens` is the share of tokens; `ablate`: at how many
layers; `inoculate`: of how many rows. `its rows out` trains without the rows that teach the target, as only who wrote the data can: what other lessons bring along
remains; `hold above`: held at so many sd above its score before. `hold, rollouts`: corrected by probe rollouts. `{NO_GATE.removeprefix(", ")}`: the case's gate is left out; `{GIVEN.removeprefix(", ")}`: the target is read without what it shares with the other
taught traits; `{SPARING.removeprefix(", ")}`: these are spared; `{PROBE.removeprefix(", ")}`: it is read by an attention probe, fitted on 4,000 answers of the base that a judge labelled, the other traits as hard negatives. `learned`: it is steered
by a vector that was learned by what it makes the base say (`shapedpo fit --kinds steering_vector`), from 512 answers with and without the trait."""
