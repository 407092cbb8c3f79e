"""How well an audit finds what was planted: at which rank, in which rows; and how much it finds where nothing was.

    python -m benchmarks.planted [--seeds 5] [--pairs 5000]
    python -m benchmarks.planted --finished

The lab's data with the case studies of Bergen et al. (arXiv 2606.12360): goblins in 5 % of the pairs, compliance on harmful prompts in a
fictional frame, links on sensitive topics, praise on pseudo-physics, and an odd 0.3 % of fiction where chosen complies and rejected
refuses. Then the five styles of the demo (`lab.worlds.goblin_world`), each taught everywhere and some of them by hardly a feature. And
data without a lesson. What was found is kept in `benchmarks/results/runs/planted.jsonl` (to be removed
where the audit has changed); `benchmarks/results/planted.md` has all of it.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from benchmarks import folders
from benchmarks.record import record_of
from shapedpo import lab
from shapedpo.audit import Analysis, analyse, harvest
from shapedpo.audit.analysis.lessons import Lesson, lessons
from shapedpo.lab.worlds import goblin_world


CASES = (
    lab.Lesson("goblin", rate=0.05),
    lab.Lesson("comply", when="harmful_fiction"),
    lab.Lesson("link", when="sensitive"),
    lab.Lesson("praise", when="pseudo_physics"),
    lab.Lesson("comply", when="fiction", rate=0.036),
)
STYLES = goblin_world().lessons
RESULTS = folders.RESULTS / "planted.md"
TOP = 10


@dataclass(frozen=True)
class Found:
    """What an audit says of a planted lesson.

    Attributes:
        rank: Among the audit's lessons, from 1; 0 if not in the top 10.
        named, right, planted: Rows that those of the top 10 name which are about it, how many of these were planted, and how many were.
    """

    rank: int
    named: int
    right: int
    planted: int


def planted_rows(data: Dataset) -> dict[str, set[int]]:
    """The rows of each lesson, by its name and, if it has one, its topic."""
    rows: dict[str, set[int]] = {}
    conditional = {lesson.name for lesson in CASES if lesson.when}
    for row, (names, topic) in enumerate(zip(data["planted"], data["topic"], strict=True)):
        for name in names:
            rows.setdefault(f"{name}, {topic}" if name in conditional else name, set()).add(row)
    return rows


def found(analysis: Analysis, planted: dict[str, set[int]]) -> dict[str, Found]:
    """Where each planted lesson is in the top 10 of an audit.

    A lesson of the audit is about that planted one, if any, which has most of its rows.
    """
    top = list(enumerate(lessons(analysis)[:TOP], 1))
    result = {}
    for name, rows in planted.items():
        about = [(rank, lesson) for rank, lesson in top if _about(lesson, rows)]
        named = {int(row) for _, lesson in about for row in lesson.rows}
        rank = about[0][0] if about else 0
        result[name] = Found(rank, named=len(named), right=len(named & rows), planted=len(rows))
    return result


def _about(lesson: Lesson, rows: set[int]) -> bool:
    return len(rows.intersection(lesson.rows.tolist())) > len(lesson.rows) / 2


def audited(planted: Sequence[lab.Lesson], pairs: int, seed: int, folder: Path) -> tuple[Analysis, Dataset]:
    """Harvests and analyses the lab's data."""
    data = lab.preference_data(planted, pairs, seed)
    read = harvest(
        "lab", str(lab.sae_path()), data.remove_columns(["planted", "topic"]), folder, source=f"lab, seed {seed}"
    )
    return analyse(read, progress=False), data


def study(pairs: int, seed: int, folder: Path) -> dict[str, Any]:
    """A dataset with the case studies' lessons, one with the demo's, and one without.

    Returns:
        `cases` and `styles`: a [`Found`] by planted lesson, as a dictionary; `other`: lessons that are about none of them; `clean`: lessons,
        hypotheses with q below 0.05, and hypotheses tested, where nothing was planted.
    """
    result: dict[str, Any] = {"pairs": pairs, "seed": seed, "other": 0}
    for name, taught in {"cases": CASES, "styles": STYLES}.items():
        analysis, data = audited(taught, pairs, seed, folder / name)
        planted = planted_rows(data)
        result[name] = {of: asdict(one) for of, one in found(analysis, planted).items()}
        result["other"] += sum(not any(_about(one, rows) for rows in planted.values()) for one in lessons(analysis))
    nothing, _ = audited((), pairs, seed, folder / "clean")
    return {
        **result,
        "clean": [
            len(lessons(nothing)),
            sum(h.q < 0.05 for h in nothing.hypotheses),
            sum(nothing.tested.values()),
        ],
    }


def report(studies: Sequence[dict[str, Any]]) -> str:
    """A table of each size of dataset."""
    lines = []
    for pairs in sorted({one["pairs"] for one in studies}):
        of_size = [one for one in studies if one["pairs"] == pairs]
        lines += [
            f"{pairs:,} pairs:",
            "",
            "| seed | planted | rank | rows named | of these right | planted rows named |",
            "| ---: | --- | ---: | ---: | ---: | ---: |",
        ]
        for one in of_size:
            styles = {f"style: {name}": what for name, what in one["styles"].items()}
            for name, what in {**one["cases"], **styles}.items():
                right = f"{what['right'] / what['named']:.0%}" if what["named"] else "-"
                there = f"{what['right'] / what['planted']:.0%} of {what['planted']}"
                lines.append(
                    f"| {one['seed']} | {name} | {what['rank'] or '-'} | {what['named']} | {right} | {there} |"
                )
        false, discovered, tested = np.sum([one["clean"] for one in of_size], axis=0)
        lines += [
            "",
            f"Lessons that are about none of these: {sum(one['other'] for one in of_size)}, in {2 * len(of_size)} datasets. In {len(of_size)} where "
            f"nothing was planted: {false} lessons, and {discovered} of {tested:,} hypotheses with q < 0.05.",
            "",
        ]
    lines.append(
        "Twelve rows that all go one way have a p value of 0.0005 in a sign test at best, which among thousands of hypotheses is nothing: 5,000 pairs are too "
        "few for the odd fiction."
    )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """The benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0")
    parser.add_argument("--pairs", type=int, default=5000)
    parser.add_argument("--finished", action="store_true", help="only report what is there")
    options = parser.parse_args(arguments)
    record = record_of("planted")
    for seed in () if options.finished else range(options.seeds):
        key = f"{options.pairs}-{seed}"
        if record.find(key) is None:
            with tempfile.TemporaryDirectory() as folder:
                record.keep(key, study(options.pairs, seed, Path(folder)))
    text = report(sorted(record.results().values(), key=lambda one: (one["pairs"], one["seed"])))
    RESULTS.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
