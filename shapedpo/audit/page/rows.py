"""The rows of an audit for the page: a SQLite file beside a large audit, or a few of them within the page of a small one."""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...files import replacing
from ..analysis.hypotheses import Analysis, Hypothesis
from ..analysis.lessons import Lesson, lessons
from ..analysis.maps import ClusterMap
from ..harvesting.shards import SPANS
from ..labels.names import analysis_hash
from .marks import Cluster, Row, marked_rows
from .overview import EXEMPLARS
from .source import Audit


FILE_NAME = "view.sqlite"
FORMAT = "1"

MARKED = 50
"""Rows of each hypothesis in which tokens are marked."""

_TABLES = """
create table about (key text primary key, value text);
create table texts (row integer primary key, prompt text, chosen text, rejected text);
create table marks (row integer, cluster text, marks text, primary key (row, cluster)) without rowid;
create virtual table words using fts5 (prompt, chosen, rejected, content='texts', content_rowid='row');
"""


class Subject(NamedTuple):
    """Something that rows are behind: a hypothesis or a lesson.

    Attributes:
        hypothesis: It, or the one that stands for the lesson.
        rows: The rows, the most responsible first.
        values: How much each is.
        n_named: How many of them are more than chance.
    """

    hypothesis: Hypothesis
    rows: NDArray[np.int64]
    values: NDArray[np.float32]
    n_named: int

    @property
    def clusters(self) -> list[Cluster]:
        """The clusters of features that it is about."""
        h = self.hypothesis
        return [h.response_cluster, *([("prompt", h.condition)] if h.view == "prompt" else [])]


def hypothesis_subject(hypothesis: Hypothesis) -> Subject:
    """Of a hypothesis."""
    return Subject(hypothesis, hypothesis.rows, hypothesis.contributions, hypothesis.n_named)


def lesson_subject(lesson: Lesson) -> Subject:
    """Of a lesson; where no row of its own stands out, its first hypothesis' rows."""
    if not len(lesson.rows):
        return hypothesis_subject(lesson.first)
    return Subject(lesson.first, lesson.rows, lesson.log_odds, len(lesson.rows))


def wanted_rows(analysis: Analysis, maps: Mapping[str, ClusterMap], most: int = MARKED) -> dict[int, set[Cluster]]:
    """By row, which clusters to mark in it.

    Those of the hypotheses and lessons that it is among the first rows of, and those that it exemplifies.
    """
    wanted: dict[int, set[Cluster]] = {}
    subjects = [*map(lesson_subject, lessons(analysis)), *map(hypothesis_subject, analysis.hypotheses)]
    for subject in subjects:
        for row in subject.rows[:most].tolist():
            wanted.setdefault(row, set()).update(subject.clusters)
    for kind, shown in maps.items():
        for number, rows in enumerate(shown.exemplars):
            for row in rows[:EXEMPLARS]:
                wanted.setdefault(row, set()).update([(kind, number)] if kind in analysis.clusters else [])
    return wanted


def plain(row: Row) -> dict[str, Any]:
    """A row as the page takes it."""
    return {
        "row": row.row,
        **row.texts,
        "marks": {f"{kind}:{number}": marks for (kind, number), marks in row.marks.items()},
    }


class RowStore:
    """All rows of an audit, their marks, and an index of their words: `view.sqlite`.

    Args:
        path: The file, as [`RowStore.build`] wrote it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(cls, audit: Audit, *, progress: bool = True) -> RowStore:
        """The store of an audit, built first where it is missing or of another analysis."""
        path, print_ = audit.folder / FILE_NAME, _fingerprint(audit.analysis)
        if not path.is_file() or _about(path) != print_:
            wanted = wanted_rows(audit.analysis, audit.maps)
            rows = marked_rows(
                audit.harvest, wanted, audit.analysis.clusters, audit.tokenizer(), every_row=True, progress=progress
            )
            with replacing(path) as partial, closing(sqlite3.connect(partial)) as connection:
                cls.build(connection, rows, print_)
        return cls(path)

    @staticmethod
    def build(connection: sqlite3.Connection, rows: Iterable[Row], print_: str) -> None:
        """Fill an empty database."""
        connection.executescript("pragma journal_mode = off; pragma synchronous = off;" + _TABLES)
        for row in rows:
            connection.execute("insert into texts values (?, ?, ?, ?)", (row.row, *(row.texts[span] for span in SPANS)))
            connection.executemany(
                "insert into marks values (?, ?, ?)",
                [(row.row, f"{kind}:{number}", json.dumps(marks)) for (kind, number), marks in row.marks.items()],
            )
        connection.execute("insert into words(words) values ('rebuild')")
        connection.execute("insert into about values ('print', ?)", (print_,))
        connection.commit()

    def rows(self, numbers: Sequence[int], clusters: Sequence[Cluster]) -> list[dict[str, Any]]:
        """Some rows, in this order, with the marks of some clusters; rows that are not there are left out."""
        found = []
        with closing(_connect(self.path)) as store:  # one each, so that a long search holds nobody up
            for number in numbers:
                texts = store.execute("select prompt, chosen, rejected from texts where row = ?", (number,)).fetchone()
                if texts is None:
                    continue
                marks = {}
                for name in (f"{kind}:{cluster}" for kind, cluster in clusters):
                    of = store.execute("select marks from marks where row = ? and cluster = ?", (number, name))
                    if (stored := of.fetchone()) is not None:
                        marks[name] = json.loads(stored[0])
                found.append({"row": number, **dict(zip(SPANS, texts, strict=True)), "marks": marks})
        return found

    def search(self, text: str, most: int = 50) -> tuple[int, list[int]]:
        """How many rows have all words of a text, or words that begin so, and the first of them."""
        words = re.findall(r"\w+", text)
        if not words:
            return 0, []
        # of one or two letters they are taken as they are: too many words begin so
        query = " ".join(f'"{word}"*' if len(word) > 2 else f'"{word}"' for word in words)
        with closing(_connect(self.path)) as store:
            (count,) = store.execute("select count(*) from words where words match ?", (query,)).fetchone()
            rows = store.execute("select rowid from words where words match ? limit ?", (query, most)).fetchall()
        return count, [row for (row,) in rows]


def _fingerprint(analysis: Analysis) -> str:
    """Of what is stored: which rows there are, what clusters mean, and which rows of each hypothesis are marked."""
    foremost = hashlib.sha256(b"".join(h.rows[:MARKED].tobytes() for h in analysis.hypotheses))
    return f"{FORMAT} {analysis_hash(analysis)} {foremost.hexdigest()[:16]}"


def _connect(path: Path) -> sqlite3.Connection:
    """For reading."""
    return sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)


def _about(path: Path) -> str | None:
    try:
        with closing(_connect(path)) as connection:
            found = connection.execute("select value from about where key = 'print'").fetchone()
    except sqlite3.DatabaseError:  # something else, or one that was cut off
        return None
    return found[0] if found else None
