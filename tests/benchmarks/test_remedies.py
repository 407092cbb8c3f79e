"""What the study from finding to fix tries, and how it reports."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.remedies import BEFORE, DROPPED, HELD, LESSONS, PLAIN, picture, remedies, report, shapedpo, table


ABOUT = {"1": "goblin", "2": "praise, pseudo_physics", "3": "", "4": "praise, pseudo_physics"}


def test_findings_about_one_lesson_are_fixed_together() -> None:
    tried = [(one.how, one.findings) for one in remedies(ABOUT, together=False)]
    assert tried[:4] == [(BEFORE, ()), (PLAIN, ()), (HELD, tuple("1234")), (DROPPED, tuple("1234"))]
    assert tried[4:] == [(how, which) for which in (("1",), ("2", "4"), ("3",)) for how in (HELD, DROPPED)]
    assert len(remedies(ABOUT, together=True)) == 4
    assert len({one.name for one in remedies(ABOUT, together=False)}) == len(tried)


def test_the_table_marks_what_was_fixed_and_reads_each_lesson_where_it_is_taught() -> None:
    traits = {lesson.trait: 0.01 * place for place, lesson in enumerate(LESSONS, 1)}
    groups = ["everywhere", *(lesson.when for lesson in LESSONS if lesson.when)]
    rates = {group: {trait: rate + 0.1 * place for trait, rate in traits.items()} for place, group in enumerate(groups)}
    runs = [
        {"how": one.how, "findings": list(one.findings), "rates": rates, "capability": 0.5}
        for one in remedies(ABOUT, together=False)
    ]
    found = {"pairs": 100, "seed": 0, "about": ABOUT, "runs": runs}
    lines = table(found)
    assert [line.split("|")[1].strip() for line in lines[2:5]] == [BEFORE, PLAIN, "held: all findings"]
    assert "| rows dropped: finding 2 and 4 | 1.0 | 12.0 | 23.0 | **34.0** | 50.0 |" in lines
    assert "3 nothing that was planted" in report([found], 200)
    heights = sorted(round(bar.get_height()) for bar in picture([found], 200).axes[0].patches)
    assert heights == sorted(4 * [1, 12, 23, 34])


def test_a_command_that_fails_is_an_error_with_what_it_said(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shapedpo fix nowhere --finding 1 failed"):
        shapedpo("fix", "nowhere", "--finding", 1, folder=tmp_path)
