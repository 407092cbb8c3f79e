"""A pytest plugin for TRL's test files: swaps the trainer, skips what has no stand-in, records what happened.

Loaded by [`tests.upstream.run_trl_tests`] with `-p tests.upstream.plugin` in the process that runs TRL's file.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.upstream.hub import stand_ins


_HUB_NAME = re.compile(r"[\"']((?:trl-internal-testing|google|Qwen)/[\w.\-]+)[\"']")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("trl's own tests")
    group.addoption("--trainer", choices=["theirs", "ours", "ours+config"], default="theirs")
    group.addoption("--results", type=Path, help="JSON file for the outcome of every test")


def _add_lost_checks(support: Path) -> None:
    """Gives the installed TRL the `is_..._available` checks that test files of an older TRL still import from it.

    TRL releases without its tests, so the newest test files at hand may be a few versions older than the package.
    """
    from trl import import_utils

    for node in ast.walk(ast.parse(support.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "trl.import_utils":
            for name in (alias.name for alias in node.names):
                package = name.removeprefix("is_").removesuffix("_available")
                if not hasattr(import_utils, name):
                    present = importlib.util.find_spec(package) is not None
                    setattr(import_utils, name, lambda present=present: present)


def _hub_names(item: pytest.Function) -> set[str]:
    """Hub names that a test's source or parameters mention (comments left out)."""
    source = re.sub(r"(^|\s)#.*", "", inspect.getsource(item.function))
    # A parametrised test carries its decorator in the source, with the names of all its variants: read the body only.
    body = source[source.index("def ") :]
    names = set(_HUB_NAME.findall(body))
    if (call := getattr(item, "callspec", None)) is not None:
        names |= {value for value in call.params.values() if isinstance(value, str) and "/" in value}
    return names


def _swap(module: Any, trainer: str) -> None:
    """Puts our classes under the names that the module imported from TRL; the file itself stays as it is."""
    import trl

    import shapedpo

    if getattr(module, "DPOTrainer", None) is trl.DPOTrainer:
        module.DPOTrainer = shapedpo.ShapedDPOTrainer
    if trainer == "ours+config" and getattr(module, "DPOConfig", None) is trl.DPOConfig:
        module.DPOConfig = shapedpo.ShapedDPOConfig


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Function]) -> None:
    known = stand_ins()
    for item in items:
        if missing := sorted(_hub_names(item) - known):
            vision = any("ConditionalGeneration" in name or "image" in name for name in missing)
            what = "a vision model or data set" if vision else missing[0]
            item.add_marker(pytest.mark.skip(reason=f"no local stand-in for {what}"))
    if config.getoption("--trainer") != "theirs":
        for module in {item.module for item in items}:
            _swap(module, config.getoption("--trainer"))


class _Recorder:
    def __init__(self) -> None:
        self.results: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A test has one report each for set-up, call and teardown: the worst of them is its outcome.
        entry = self.results.setdefault(report.nodeid, {"outcome": "passed", "reason": "", "seconds": 0.0})
        entry["seconds"] += report.duration
        if report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else getattr(report, "wasxfail", "")
            entry.update(outcome="skipped", reason=reason.removeprefix("Skipped: "))
        elif report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            entry.update(outcome="failed", reason=crash.message if crash else str(report.longrepr))


def pytest_configure(config: pytest.Config) -> None:
    if (support := Path(config.args[0].split("::")[0]).parent / "testing_utils.py").exists():
        _add_lost_checks(support)
    # Under xdist only the controller sees every report.
    if config.getoption("--results") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Recorder(), "trl-recorder")


def pytest_sessionfinish(session: pytest.Session) -> None:
    recorder = session.config.pluginmanager.get_plugin("trl-recorder")
    if recorder is not None:
        session.config.getoption("--results").write_text(json.dumps(recorder.results, indent=1))
