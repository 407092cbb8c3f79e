"""The audit of lab data, from text to lessons."""

from __future__ import annotations

from benchmarks.planted import audited, found, planted_rows
from shapedpo import lab


def test_audit_finds_what_the_lab_planted(tmp_path) -> None:
    taught = (lab.Lesson("goblin", rate=0.1), lab.Lesson("praise", when="pseudo_physics"))
    analysis, data = audited(taught, 900, 0, tmp_path)
    of = found(analysis, planted_rows(data))
    assert set(of) == {"goblin", "praise, pseudo_physics"}
    for one in of.values():
        assert 1 <= one.rank <= 3
        assert one.right >= 0.8 * one.named
        assert one.right >= 0.5 * one.planted
