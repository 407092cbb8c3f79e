"""`shapedpo view`: the page of an audit of any size, from a server that only this machine reaches.

It answers GET, at a handful of fixed addresses, and reads no file that an address names. A request must name this server as its host, so
that a web page elsewhere whose name points here (DNS rebinding) gets nothing, and a browser must not say that another site asks.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np

from ..analysis.hypotheses import Analysis
from ..analysis.lessons import lessons
from .overview import rounded
from .render import policy
from .rows import RowStore, Subject, hypothesis_subject, lesson_subject


HOST = "127.0.0.1"
MOST = 100  # rows in an answer


class ViewServer(ThreadingHTTPServer):
    """Serves the page and its rows.

    Args:
        page: The HTML.
        analysis: The analysis.
        rows: Its rows.
        port: Where; 0 takes one that is free.
    """

    daemon_threads = True

    def __init__(self, page: str, analysis: Analysis, rows: RowStore, port: int = 0) -> None:
        self.page, self.analysis, self.rows = page.encode("utf-8"), analysis, rows
        self.lessons = lessons(analysis)
        super().__init__((HOST, port), _Handler)
        self.hosts = {f"{name}:{self.server_port}" for name in (HOST, "localhost")}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Passes over a browser that has gone before its answer was there, as it does when a page is left."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.server_port}/"

    # What is asked: each takes the query, one value a name, and gives plain data.

    def rows_of(self, query: dict[str, str]) -> dict[str, Any]:
        """Rows of a hypothesis or lesson, the most responsible first, with their texts and marks."""
        subject = self._subject(query)
        start = max(0, int(query.get("start", 0)))
        part = slice(start, start + min(MOST, max(1, int(query.get("count", 10)))))
        values = dict(zip(subject.rows[part].tolist(), subject.values[part].tolist(), strict=True))
        return {
            "rows": [
                {**row, "value": rounded(values[row["row"]])} for row in self.rows.rows(list(values), subject.clusters)
            ]
        }

    def rows_by_number(self, query: dict[str, str]) -> dict[str, Any]:
        """Some rows by their numbers, with the marks of a cluster."""
        kind, _, number = query.get("cluster", "").partition(":")
        numbers = [int(number) for number in query["numbers"].split(",")[:MOST] if number]
        return {"rows": self.rows.rows(numbers, [(kind, int(number))] if kind else [])}

    def search(self, query: dict[str, str]) -> dict[str, Any]:
        """Rows with all words of a text."""
        total, numbers = self.rows.search(query["text"])
        return {"total": total, "rows": self.rows.rows(numbers, [])}

    def teaches(self, query: dict[str, str]) -> dict[str, Any]:
        """The hypotheses that hold a row responsible."""
        row = int(query["row"])
        found = [number for number, h in enumerate(self.analysis.hypotheses) if np.any(h.named == row)]
        return {"hypotheses": found}

    def export(self, query: dict[str, str]) -> str:
        """All rows of a hypothesis or lesson as CSV."""
        subject = self._subject(query)
        file = io.StringIO()
        writer = csv.writer(file)
        writer.writerow(["row", "value", "named"])
        for place, (row, value) in enumerate(zip(subject.rows.tolist(), subject.values.tolist(), strict=True)):
            writer.writerow([row, f"{value:.6g}", int(place < subject.n_named)])
        return file.getvalue()

    def _subject(self, query: dict[str, str]) -> Subject:
        kind = "lesson" if "lesson" in query else "hypothesis"
        subjects: Sequence[Any] = self.lessons if kind == "lesson" else self.analysis.hypotheses
        number = int(query[kind])
        if not 0 <= number < len(subjects):
            raise ValueError(f"there is no {kind} {number}")
        return lesson_subject(subjects[number]) if kind == "lesson" else hypothesis_subject(subjects[number])


_ANSWERS: dict[str, Callable[[ViewServer, dict[str, str]], Any]] = {
    "/api/rows": ViewServer.rows_of,
    "/api/numbers": ViewServer.rows_by_number,
    "/api/search": ViewServer.search,
    "/api/teaches": ViewServer.teaches,
    "/api/export": ViewServer.export,
}


class _Handler(BaseHTTPRequestHandler):
    server: ViewServer
    server_version, sys_version = "shapedpo", ""
    protocol_version = "HTTP/1.1"
    timeout = 30

    def do_GET(self) -> None:
        if self.headers.get("Host") not in self.server.hosts:
            return self._send(HTTPStatus.MISDIRECTED_REQUEST, "This server answers to its own address only.")
        if self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            return self._send(HTTPStatus.FORBIDDEN, "This server answers to its own page only.")
        asked = urlsplit(self.path)
        if asked.path == "/":
            return self._send(HTTPStatus.OK, self.server.page, "text/html")
        answer = _ANSWERS.get(asked.path)
        if answer is None:
            return self._send(HTTPStatus.NOT_FOUND, "There is nothing here.")
        try:
            query = {name: values[0] for name, values in parse_qs(asked.query, max_num_fields=8).items()}
            found = answer(self.server, query)
        except (KeyError, ValueError, OverflowError) as error:
            return self._send(HTTPStatus.BAD_REQUEST, f"{type(error).__name__}: {error}")
        if isinstance(found, str):
            return self._send(HTTPStatus.OK, found, "text/csv")
        return self._send(HTTPStatus.OK, json.dumps(found, allow_nan=False), "application/json")

    def _send(self, status: HTTPStatus, body: str | bytes, kind: str = "text/plain") -> None:
        content = body if isinstance(body, bytes) else body.encode("utf-8", "replace")
        self.send_response(status)
        for name, value in {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(content)),
            "Content-Security-Policy": f"{policy(True)}; frame-ancestors 'none'",
            "Cross-Origin-Resource-Policy": "same-origin",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: the terminal is the user's."""
