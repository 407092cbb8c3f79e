"""The rows of an audit for the page: a SQLite file beside a large audit, or a few of them within the page of a small one."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from ...files import replacing
from ..hypotheses import Analysis, Hypothesis
from ..labels import analysis_hash
from ..maps import ClusterMap
from ..store import SPANS
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


def clusters_of(hypothesis: Hypothesis) -> list[Cluster]:
    """The clusters of features that a hypothesis is about."""
    response = ("response" if hypothesis.view == "prompt" else "feature", hypothesis.response)
    return [response, ("prompt", hypothesis.condition)] if hypothesis.view == "prompt" else [response]


def wanted_rows(analysis: Analysis, maps: Mapping[str, ClusterMap], most: int = MARKED) -> dict[int, set[Cluster]]:
    """By row, which clusters to mark in it: those of the hypotheses that it is among the first rows of, and of the clusters that it exemplifies."""
    wanted: dict[int, set[Cluster]] = {}
    for hypothesis in analysis.hypotheses:
        clusters = clusters_of(hypothesis)
        for row in hypothesis.rows[:most].tolist():
            wanted.setdefault(row, set()).update(clusters)
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
        self._connection = _connect(path)

    @classmethod
    def open(cls, audit: Audit, *, progress: bool = True) -> RowStore:
        """The store of an audit, built first where it is missing or of another analysis."""
        path, print_ = audit.folder / FILE_NAME, f"{FORMAT} {analysis_hash(audit.analysis)}"
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

    def rows(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Some rows, in this order; those that are not there are left out."""
        found = []
        for number in numbers:
            texts = self._connection.execute(
                "select prompt, chosen, rejected from texts where row = ?", (number,)
            ).fetchone()
            if texts is not None:
                marks = self._connection.execute("select cluster, marks from marks where row = ?", (number,)).fetchall()
                found.append(
                    {
                        "row": number,
                        **dict(zip(SPANS, texts, strict=True)),
                        "marks": {cluster: json.loads(places) for cluster, places in marks},
                    }
                )
        return found

    def search(self, text: str, most: int = 50) -> tuple[int, list[int]]:
        """How many rows have all words of a text, or words that begin so, and the first of them."""
        words = re.findall(r"\w+", text)
        if not words:
            return 0, []
        query = " ".join(f'"{word}"*' for word in words)
        (count,) = self._connection.execute("select count(*) from words where words match ?", (query,)).fetchone()
        rows = self._connection.execute("select rowid from words where words match ? limit ?", (query, most)).fetchall()
        return count, [row for (row,) in rows]

    def close(self) -> None:
        self._connection.close()


def _connect(path: Path) -> sqlite3.Connection:
    """For reading, also by the threads of a server, one at a time."""
    return sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, check_same_thread=False)


def _about(path: Path) -> str | None:
    try:
        with closing(_connect(path)) as connection:
            found = connection.execute("select value from about where key = 'print'").fetchone()
    except sqlite3.DatabaseError:  # something else, or one that was cut off
        return None
    return found[0] if found else None
