"""Runs on an emulated accelerator find what they find on the CPU, with nothing left on the wrong device."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


ROOT = Path(__file__).parents[2]
RUNS = (
    "pair_methods",
    "hold_and_monitor",
    "edits",
    "inoculate",
    "parameters",
    "precomputed",
    "long",
    "audited",
    "fitted",
)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("accelerator") / "found.json"
    words = [sys.executable, "-m", "tests.accelerator.runs", str(out)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(out.read_text())
    assert tuple(result) == RUNS
    return result


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_as_on_the_cpu(found: dict[str, Any], name: str) -> None:
    run = found[name]
    assert "error" not in run, run["error"]
    assert run["cpu"].keys() == run["device"].keys() != set()
    for key, expected in run["cpu"].items():
        assert run["device"][key] == pytest.approx(expected, rel=2e-3, abs=1e-5, nan_ok=True), key


@pytest.mark.slow
def test_a_step_waits_for_the_host_only_where_it_must(found: dict[str, Any]) -> None:
    """A batch's numbers are copied once, and once more for the controller of held concepts: nine steps in which nothing is logged."""
    assert found["long"]["copies"] == {"metrics.py:concept_metrics": 9, "shapers/hold.py:observe": 9}
