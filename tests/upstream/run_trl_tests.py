"""Runs TRL's own DPO test file twice, with TRL's trainer and with ours, and compares test by test.

    python -m tests.upstream.run_trl_tests --trl PATH [--revision v1.16.0] [--trainer theirs ours ours+config]

With `SHAPEDPO_TRL_TESTS=PATH` (and `SHAPEDPO_TRL_REVISION`) in the environment, our own suite does the same.

`PATH` is a checkout of TRL, its `tests` folder, the test file itself, or a git directory (a bare clone will do) from
which `--revision` is exported. Nothing of TRL's tests is kept in this repository. The models and data sets that the
tests load from the hub are replaced by local stand-ins (see [`tests.upstream.hub`]), so no network is needed; tests
whose models have none (vision) or whose packages are not installed are skipped for every trainer and counted.

Exits with 1 when a test passes with TRL's trainer and not with ours.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from tests.upstream.hub import build_hub


TEST_FILE = "test_dpo_trainer.py"
# What the test file imports from its own folder.
_SUPPORT = ("__init__.py", "conftest.py", "testing_utils.py", "testing_constants.py")
_REPOSITORY = Path(__file__).resolve().parents[2]

Results = dict[str, dict[str, str | float]]


def export_tests(source: Path, destination: Path, revision: str = "HEAD") -> None:
    """Copies TRL's DPO tests and what they import from `source` (see the module) to the folder `destination`.

    Raises:
        FileNotFoundError: `source` is none of the forms that the module lists.
    """
    folders = [source / "tests", source, source.parent]
    found = next((folder for folder in folders if (folder / TEST_FILE).is_file()), None)
    destination.mkdir(parents=True)
    if found is not None:
        for name in (*_SUPPORT, TEST_FILE):
            if (found / name).exists():
                shutil.copy(found / name, destination / name)
        return
    git_dir = source / ".git" if (source / ".git").exists() else source
    archive = subprocess.run(
        ["git", f"--git-dir={git_dir}", "archive", revision, "tests"], capture_output=True, check=False
    )
    if archive.returncode:
        raise FileNotFoundError(
            f"Found no tests/{TEST_FILE} in {source}: pass a checkout of TRL, its tests folder, the file, or a git "
            f"directory that has the revision {revision}. git says: {archive.stderr.decode().strip()}"
        )
    with tarfile.open(fileobj=BytesIO(archive.stdout)) as tar:
        for name in (*_SUPPORT, TEST_FILE):
            if f"tests/{name}" in tar.getnames() and (member := tar.extractfile(f"tests/{name}")) is not None:
                (destination / name).write_bytes(member.read())


def run(tests: Path, trainer: str, environment: dict[str, str], extra: Sequence[str] = ()) -> Results:
    """Runs the exported test file in a new process.

    Args:
        tests: Folder that [`export_tests`] filled.
        trainer: `theirs`, `ours`, or `ours+config` (`ShapedDPOConfig` in place of `DPOConfig` as well).
        environment: Variables from [`build_hub`].
        extra: More arguments for pytest (`-k`, `-n`).

    Returns:
        For each test: `outcome` (`passed`, `failed`, `skipped`), `reason`, `seconds`.
    """
    results = tests.parent / f"{trainer}.json"
    results.unlink(missing_ok=True)
    # TRL's own pytest settings are not exported; its markers are declared here so that an unknown one stays an error.
    (tests.parent / "pytest.ini").write_text("[pytest]\nmarkers =\n    slow: slow test\n    low_priority: rarely run\n")
    command = [sys.executable, "-m", "pytest", str(tests / TEST_FILE), "-q", "-m", "not slow", "--strict-markers"]
    command += ["-p", "tests.upstream.plugin", "--trainer", trainer, "--results", str(results)]
    command += [
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tests.parent),
        "-c",
        str(tests.parent / "pytest.ini"),
        *extra,
    ]
    path = os.pathsep.join(filter(None, [str(_REPOSITORY), os.environ.get("PYTHONPATH")]))
    # TQDM_DISABLE keeps the log of a failure readable.
    process = subprocess.run(
        command,
        cwd=tests.parent,
        env={**os.environ, **environment, "PYTHONPATH": path, "TQDM_DISABLE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if not results.exists():
        raise RuntimeError(f"pytest did not run with {trainer}:\n{process.stdout[-4000:]}\n{process.stderr[-4000:]}")
    (tests.parent / f"{trainer}.log").write_text(process.stdout + process.stderr)
    outcome: Results = json.loads(results.read_text())
    if not outcome:
        raise RuntimeError(f"pytest found no test with {trainer}:\n{process.stdout[-4000:]}\n{process.stderr[-4000:]}")
    return outcome


def regressions(theirs: Results, ours: Results) -> list[str]:
    """Tests that pass with TRL's trainer and not with ours."""
    return [
        test
        for test, result in theirs.items()
        if result["outcome"] == "passed" and ours.get(test, {"outcome": "absent"})["outcome"] != "passed"
    ]


def report(columns: dict[str, Results]) -> str:
    """A Markdown table of outcomes by test and trainer, the counts, and why tests were skipped."""
    trainers = list(columns)
    lines = [f"| test | {' | '.join(trainers)} |", f"| --- |{' --- |' * len(trainers)}"]
    for test in next(iter(columns.values())):
        outcomes = " | ".join(str(columns[trainer].get(test, {}).get("outcome", "absent")) for trainer in trainers)
        lines.append(f"| {test.split('::', 1)[1]} | {outcomes} |")
    lines.append("")
    for trainer, results in columns.items():
        counts = Counter(str(result["outcome"]) for result in results.values())
        seconds = sum(float(result["seconds"]) for result in results.values())
        counted = ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped"))
        lines.append(f"{trainer}: {counted} ({seconds:.0f} s)")
        for test, result in results.items():
            if result["outcome"] == "failed":
                lines.append(f"  failed {test.split('::', 1)[1]}: {str(result['reason']).splitlines()[0][:200]}")
    reasons = Counter(
        str(result["reason"]) for result in next(iter(columns.values())).values() if result["outcome"] == "skipped"
    )
    lines += [f"  skipped {count}: {reason}" for reason, count in reasons.most_common()]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.upstream.run_trl_tests", description=__doc__.split("\n")[0])
    parser.add_argument("--trl", type=Path, required=True, help="checkout, tests folder, test file or git directory")
    parser.add_argument("--revision", default="HEAD", help="git revision when --trl is a git directory")
    parser.add_argument("--trainer", nargs="+", default=["theirs", "ours"], choices=["theirs", "ours", "ours+config"])
    parser.add_argument("--hub", type=Path, help="folder of the stand-ins, kept between runs (default: temporary)")
    parser.add_argument("--keep", type=Path, help="folder for the logs and outcomes (default: temporary)")
    options, extra = parser.parse_known_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        work = options.keep or Path(scratch) / "run"
        shutil.rmtree(work / "trl_tests", ignore_errors=True)
        export_tests(options.trl.resolve(), work / "trl_tests", options.revision)
        environment = build_hub((options.hub or Path(scratch) / "hub").resolve())
        tests = (work / "trl_tests").resolve()
        columns = {trainer: run(tests, trainer, environment, extra) for trainer in options.trainer}
    print(report(columns))
    worse = [
        f"{trainer}: {test}"
        for trainer, results in columns.items()
        if "theirs" in columns
        for test in regressions(columns["theirs"], results)
    ]
    if worse:
        print("\npasses with TRL's trainer and not with ours:", *worse, sep="\n  ")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
