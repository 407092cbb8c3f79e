"""`audit.html`: a small audit in one self-contained page, with the texts of its most telling rows."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import jinja2

from ...pages import json_for_script, template, write_whole
from ..analysis.hypotheses import VIEWS, Analysis
from ..analysis.lessons import lessons
from ..folder import PAGE
from .marks import marked_rows
from .overview import EXEMPLARS, rounded
from .rows import Subject, hypothesis_subject, lesson_subject, plain, wanted_rows
from .source import Audit


SCRIPTS = ("source.js", "words.js", "rows.js", "detail.js", "maps.js", "table.js", "lessons.js")

ROWS = 3000
"""Rows whose texts the self-contained page holds."""

SHOWN = 20
"""Rows of each hypothesis that it shows."""

TEXT = 1500
"""Characters of each text that it holds."""

NUMBERS = 500_000
"""Row numbers that it holds, for all hypotheses together; for each lesson a tenth of that."""


def write_page(audit: Audit, tokenizer: Any | None = None, path: str | os.PathLike[str] | None = None) -> Path:
    """Write the self-contained page of an audit.

    Args:
        audit: The audit.
        tokenizer: Of the model, to mark tokens with; without it none are.
        path: Where it goes: `audit.html` in the audit's folder by default.
    """
    path = Path(path) if path is not None else audit.folder / PAGE
    write_whole(path, render({**audit.overview(), **_embedded(audit, tokenizer)}))
    return path


def render(data: dict[str, Any], *, served: bool = False) -> str:
    """The page.

    Args:
        data: What its script is told.
        served: Whether it fetches rows from where it came from.
    """
    data = {**data, "served": served}
    return _template(served).render(title=data["title"], served=served, data_json=json_for_script(data))


def policy(served: bool) -> str:
    """The Content-Security-Policy of the page."""
    return str(_template(served).globals["policy"])


@functools.cache
def _template(served: bool) -> jinja2.Template:
    return template(__package__, SCRIPTS, connect="'self'" if served else "")


def _embedded(audit: Audit, tokenizer: Any | None) -> dict[str, Any]:
    """Texts of some rows, which of them each hypothesis shows, and the numbers of more."""
    analysis = audit.analysis
    exemplars = {row for shown in audit.maps.values() for rows in shown.exemplars for row in rows[:EXEMPLARS]}
    kept = _kept(analysis, exemplars)
    wanted = {row: clusters for row, clusters in wanted_rows(analysis, audit.maps, SHOWN).items() if row in kept}
    rows = {}
    for row in marked_rows(audit.harvest, wanted, analysis.clusters, tokenizer):
        shown = plain(row)
        shown |= {span: text[:TEXT] for span, text in row.texts.items()}
        shown["cut"] = {span: len(text) - TEXT for span, text in row.texts.items() if len(text) > TEXT}
        rows[row.row] = shown
    taught = list(map(lesson_subject, lessons(analysis)))
    found = list(map(hypothesis_subject, analysis.hypotheses))
    most = {"lesson": NUMBERS // 10, "hypothesis": max(SHOWN, NUMBERS // max(1, len(found)))}
    return {
        "rows": rows,
        "shown": {"lesson": _shown(taught, kept), "hypothesis": _shown(found, kept)},
        "numbers": {
            kind: [subject.rows[: most[kind]].tolist() for subject in subjects]
            for kind, subjects in (("lesson", taught), ("hypothesis", found))
        },
    }


def _shown(subjects: list[Subject], kept: set[int]) -> list[list[list[float | None]]]:
    """Of each the rows whose texts the page holds, with how responsible each is."""
    return [
        [
            [row, rounded(value, 3)]
            for row, value in zip(s.rows[:SHOWN].tolist(), s.values[:SHOWN].tolist(), strict=True)
            if row in kept
        ]
        for s in subjects
    ]


def _kept(analysis: Analysis, exemplars: set[int]) -> set[int]:
    """Which rows' texts the page holds.

    Some that exemplify clusters and those of lessons, then the foremost row of each hypothesis, the strongest hypotheses first, then the
    second ones, and so on.
    """
    strongest = sorted(range(len(analysis.hypotheses)), key=_turn(analysis))
    turns = [lesson.evidence for lesson in lessons(analysis)] + [
        analysis.hypotheses[number].rows for number in strongest
    ]
    kept: set[int] = set(sorted(exemplars)[: ROWS // 3])
    for rank in range(SHOWN):
        for rows in turns:
            if rank < len(rows):
                if len(kept) >= ROWS:
                    return kept
                kept.add(int(rows[rank]))
    return kept


def _turn(analysis: Analysis) -> Any:
    """The views by turns, each from its strongest hypothesis on."""
    rank, seen = {}, dict.fromkeys(VIEWS, 0)
    for number, hypothesis in enumerate(analysis.hypotheses):
        rank[number] = seen[hypothesis.view]
        seen[hypothesis.view] += 1
    return rank.__getitem__
