"""How well an audit finds what was planted: at which rank, in which rows; and how much it finds where nothing was.

    python -m benchmarks.planted --seeds 0 1 2 --pairs 5000

The lab's data with the case studies of Bergen et al. (arXiv 2606.12360): goblins in 5 % of the pairs, compliance on harmful prompts in a
fictional frame, links on sensitive topics, praise on pseudo-physics, and an odd 0.3 % of fiction where chosen complies and rejected
refuses. And the same without a lesson. Writes `benchmarks/results/planted.md`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset

from shapedpo import lab
from shapedpo.audit import Analysis, analyse, harvest
from shapedpo.audit.analysis.lessons import Lesson, lessons


CASES = (
    lab.Lesson("goblin", rate=0.05),
    lab.Lesson("comply", when="harmful_fiction"),
    lab.Lesson("link", when="sensitive"),
    lab.Lesson("praise", when="pseudo_physics"),
    lab.Lesson("comply", when="fiction", rate=0.036),
)
RESULTS = Path(__file__).parent / "results" / "planted.md"
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


def main(arguments: Sequence[str] | None = None) -> None:
    """The benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pairs", type=int, default=5000)
    parser.add_argument("--folder", type=Path, help="where harvests are kept; a temporary one by default")
    options = parser.parse_args(arguments)
    lines = [
        "| seed | planted | rank | rows named | of these right | planted rows named |",
        "| ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    clean, other = [], 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        for seed in options.seeds:
            analysis, data = audited(CASES, options.pairs, seed, folder / f"cases-{seed}-{options.pairs}")
            planted = planted_rows(data)
            other += sum(not any(_about(lesson, rows) for rows in planted.values()) for lesson in lessons(analysis))
            for name, one in found(analysis, planted).items():
                right = f"{one.right / one.named:.0%}" if one.named else "-"
                cells = [
                    str(seed),
                    name,
                    str(one.rank or "-"),
                    str(one.named),
                    right,
                    f"{one.right / one.planted:.0%} of {one.planted}",
                ]
                lines.append(f"| {' | '.join(cells)} |")
            analysis, _ = audited((), options.pairs, seed, folder / f"clean-{seed}-{options.pairs}")
            significant = sum(h.q < 0.05 for h in analysis.hypotheses)
            clean.append([len(lessons(analysis)), significant, sum(analysis.tested.values())])
    false, discovered, tested = np.sum(clean, axis=0)
    lines += [
        "",
        f"Lessons that are about none of these: {other}, in {len(options.seeds)} datasets. In as many datasets where nothing was planted: "
        f"{false} lessons, and {discovered} of {tested:,} hypotheses with q < 0.05. {options.pairs:,} pairs each.",
    ]
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
