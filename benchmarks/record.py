"""Results of finished runs, one JSON object a line: small enough to be committed, so that a study that was cut off goes on on any machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import folders


def key_of(settings: Any) -> str:
    """A name for what a run depends on: sixteen hex digits of its JSON."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


class Record:
    """The results of a study's runs, by key.

    Several processes may add to it: each line is written at once, and lines that another has added are read.

    Args:
        path: A file of JSON lines, made with the first result. Where a key comes twice, the later line counts.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read = 0
        self._results: dict[str, dict[str, Any]] = {}

    def find(self, key: str) -> dict[str, Any] | None:
        """What was kept under a key; `None` if nothing was."""
        return self.results().get(key)

    def results(self) -> dict[str, dict[str, Any]]:
        """All that was kept, by key."""
        size = self.path.stat().st_size if self.path.exists() else 0
        if size < self._read:  # somebody wrote the file anew
            self._read, self._results = 0, {}
        if size > self._read:
            with self.path.open("rb") as file:
                file.seek(self._read)
                new = file.read(size - self._read)
            whole = new[: new.rfind(b"\n") + 1]  # a line may be half written
            self._read += len(whole)
            for line in whole.splitlines():
                result = json.loads(line)
                self._results[result.pop("key")] = result
        return self._results

    def keep(self, key: str, result: dict[str, Any]) -> None:
        """Adds a result, which has to be JSON."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"key": key, **result}, ensure_ascii=False).encode() + b"\n"
        with self.path.open("ab", buffering=0) as file:
            file.write(line)

    def made(self, key: str, make: Callable[[], dict[str, Any]], fresh: bool = False) -> dict[str, Any]:
        """What was kept under a key, or else, or if `fresh`, what `make` returns, which is kept."""
        found = None if fresh else self.find(key)
        if found is None:
            found = make()
            self.keep(key, found)
        return found


def record_of(study: str, quick: bool = False) -> Record:
    """The record of a study: beside its results, or, of quick runs, which mean nothing, in the cache."""
    return Record((folders.CACHE / "quick" if quick else folders.RESULTS / "runs") / f"{study}.jsonl")
