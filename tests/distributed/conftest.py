"""Fixtures of the tests on several processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def together(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[dict[str, Any], Path]]:
    """The runs of a launcher, all in one launch: by name the result and the folder. With one process only where it is asked for."""
    from .launches import INTERVENTIONS, cases, launch

    done: dict[tuple[str, int], Path] = {}

    def run_together(launcher: str, name: str, processes: int = 2) -> tuple[dict[str, Any], Path]:
        if (launcher, processes) not in done:
            output = done[launcher, processes] = tmp_path_factory.mktemp(f"{launcher}-{processes}")
            names = [*cases(launcher), *INTERVENTIONS.get(launcher, ())] if processes > 1 else [name]
            launch(launcher, output, names, processes)
        output = done[launcher, processes] / name
        return json.loads((output / "result.json").read_text()), output

    return run_together
