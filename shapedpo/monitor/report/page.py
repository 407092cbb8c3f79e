"""`report.html`: one self-contained page that says what a run is amplifying and suppressing, readable at any time.

The page holds everything it needs, its charts' library too, and its Content-Security-Policy lets it reach nothing else: no
network, no script or style but the ones written here, by their hashes. Texts of the dataset are escaped by Jinja where the
template shows them and read with `textContent` where the script does.
"""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import jinja2

from ...pages import PLOT, json_for_script, template, write_whole
from .digest import Digest, Record
from .view import view


SCRIPTS = ("page.js", "charts.js", "rollouts.js")


def render(records: Iterable[Record]) -> str:
    """The page of these records.

    Args:
        records: As read from `concepts.jsonl`, in the order in which they were written. Records of unknown types, unknown keys
            and values that are missing or `null` are all right.

    Returns:
        The HTML, which can be written as UTF-8.
    """
    return render_digest(Digest(records))


def render_digest(digest: Digest, written: float | None = None) -> str:
    """The page of a digest.

    Args:
        digest: Of the records.
        written: When, in seconds since 1970, so that the page can say how old it is.
    """
    values = view(digest)
    values["data"]["written"] = written
    return _template().render(values, data_json=json_for_script(values.pop("data")))


class ReportSink:
    """Keeps `report.html` up to date while a run goes.

    The page is written whole or not at all. Writing it takes at most a two-hundredth of the time: after a page that took a second to
    make, the next one waits for two hundred, unless a probe came or the run has ended.

    Args:
        path: Where the page goes.
        interval: Seconds between two pages at least.
    """

    SHARE = 200

    def __init__(self, path: str | Path, interval: float = 5.0) -> None:
        self.path = Path(path)
        self.interval = interval
        self._digest = Digest()
        self._next = 0.0

    def open(self, records: Sequence[Record]) -> None:
        """Start with the records that are on the disk already, and write a first page."""
        self._digest = Digest(records)
        self._write()

    def write(self, records: Sequence[Record]) -> None:
        """Take in new records, and write the page where it is time to."""
        self._digest.add(records)
        if time.monotonic() >= self._next or any(record.get("type") in ("probe", "end") for record in records):
            self._write()

    def close(self) -> None:
        """Write the last page."""
        self._write()

    def _write(self) -> None:
        began = time.monotonic()
        try:
            write_whole(self.path, render_digest(self._digest, time.time()))
        except (
            Exception
        ) as error:  # no page is worth a run: the records have the numbers, and `shapedpo report` remakes it
            warnings.warn(
                f"{self.path} could not be written ({type(error).__name__}: {error}). Training goes on; "
                f"`shapedpo report {self.path.parent}` makes the page from concepts.jsonl.",
                RuntimeWarning,
                stacklevel=2,
            )
        now = time.monotonic()
        self._next = now + max(self.interval, self.SHARE * (now - began))


@functools.cache
def _template() -> jinja2.Template:
    filters = {
        "signed": _signed,
        "plain": _plain,
        "percent": _percent,
        "whole": _whole,
        "index": _index,
        "exact": _exact,
    }
    return template(__package__, SCRIPTS, shared=PLOT, filters=filters)


# --- numbers as text -------------------------------------------------------------------------------------------------


def _plain(value: float | None, digits: int = 2) -> str:
    """`0.31`, `0.004`, `2.9e−05`; with a true minus sign."""
    if value is None:
        return "–"
    size = abs(value)
    small = 0 < size < 0.0995
    text = f"{value:.1e}" if 0 < size < 0.00095 or size >= 1e5 else f"{value:.{digits + small}f}"
    return text.replace("-", "\N{MINUS SIGN}")


def _signed(value: float | None, digits: int = 2) -> str:
    """The same with a plus sign."""
    text = _plain(value, digits)
    return f"+{text}" if value is not None and value > 0 else text


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _whole(value: float | None) -> str:
    """`5,000`"""
    return "–" if value is None else f"{value:,.0f}"


def _index(value: float | None) -> str:
    """`5000`"""
    return "–" if value is None else f"{value:.0f}"


def _exact(value: float | None) -> str:
    """What a column is sorted by; empty where unknown."""
    return "" if value is None else repr(float(value))
