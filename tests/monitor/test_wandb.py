"""The W&B sink with the real library, offline: what it wrote is read back from the run's own files."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import pytest
import wandb

from shapedpo.monitor.wandb import WandbSink
from shapedpo.monitor.wandb_tables import CELL, HISTORY, PAIR_COLUMNS, RANKED_COLUMNS, Latest, Z, number
from tests.monitor.records import synthetic
from tests.wandb_files import wandb_run


REPO = Path(__file__).parents[2]
TABLES = {"concepts/amplified", "concepts/suppressed", "concepts/pairs", "probe/rollouts"}
CHARTS = {"concepts/top", "concepts/heatmap", "probe/predicted_vs_observed"}
AXIS = {"train/global_step", "_step", "_timestamp", "_runtime"}
HOSTILE = "<script>alert(1)</script><a href='https://evil.example'>x</a> $a$ | \ud800 \x00 \U0001f47a"


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch) -> Iterator[None]:
    """W&B writes under the test's folder only, and no run outlives the test."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
        (tmp_path / name.lower()).mkdir()
    monkeypatch.delenv("WANDB_DISABLED", raising=False)
    yield
    wandb.finish()


def start(**kwargs: Any) -> Any:
    return wandb.init(project="tests", settings=wandb.Settings(silent=True, console="off"), **kwargs)


def feed(sink: WandbSink, records: list[Any]) -> None:
    """Records by step, as the monitor hands them over."""
    for _, together in groupby(records, key=lambda record: record["step"]):
        sink.write(list(together))


class Written:
    """What a finished run has on disk.

    Args:
        folder: The run's folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        records = wandb_run(next(self.folder.glob("run-*.wandb")))
        self.rows = [
            _nested(record.history.item) for record in records if record.WhichOneof("record_type") == "history"
        ]
        self.metrics = {
            record.metric.name or record.metric.glob_name: record.metric.step_metric
            for record in records
            if record.WhichOneof("record_type") == "metric"
        }
        self.config: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.artifacts: dict[str, list[Any]] = {}
        for record in records:
            for update in (record.run.config.update, record.config.update):
                self.config |= _nested(update)
            if record.WhichOneof("record_type") == "summary":
                for item in record.summary.update:
                    _put(self.summary, item)
            if record.WhichOneof("record_type") == "artifact":
                for entry in record.artifact.manifest.contents:
                    self.artifacts.setdefault(entry.path, []).append(json.loads(Path(entry.local_path).read_text()))

    def values(self, key: str) -> list[Any]:
        """The contents of a table or chart, each time that it was logged."""
        return [json.loads(self.file(row[key]).read_text()) for row in self.rows if key in row]

    def file(self, value: dict[str, Any]) -> Path:
        return self.folder / "files" / value["path"]

    def table(self, key: str, at: int = -1) -> list[dict[str, Any]]:
        """A table's rows, by column."""
        table = self.values(key)[at]
        return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]


def _put(into: dict[str, Any], item: Any) -> None:
    *path, last = item.nested_key or [item.key]
    for name in path:
        into = into.setdefault(name, {})
    into[last] = json.loads(item.value_json)


def _nested(items: Any) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for item in items:
        _put(result, item)
    return result


@pytest.fixture(scope="module")
def records() -> list[Any]:
    return synthetic(concepts=6, steps=40, features=12, samples=6, probes=5)


@pytest.fixture(scope="module")
def written(records, tmp_path_factory) -> Written:
    """A whole run of 400 steps."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
            patch.setenv(name, str(tmp_path_factory.mktemp(name.lower())))
        patch.setenv("WANDB_MODE", "offline")
        run, sink = start(), WandbSink()
        folder = run.sync_dir
        sink.open([])
        feed(sink, records)
        sink.close()
        wandb.finish()
    return Written(folder)


def latest(records: list[Any]) -> Latest:
    state = Latest()
    for record in records:
        state.update(record)
    return state


# --- what is in the run ------------------------------------------------------------------------------------------------------


def test_config_has_what_was_asked(records, written):
    asked, config = records[0], written.config["shapedpo"]
    assert list(config["concepts"]) == [concept["name"] for concept in asked["concepts"]]
    for concept in asked["concepts"]:
        assert config["concepts"][concept["name"]] | {"name": concept["name"]} == concept
    assert config["data"] == asked["data"]
    assert config["model"] == asked["model"]


def test_everything_is_plotted_against_the_step(written):
    assert "train/global_step" in written.metrics
    for group in ("concepts/*", "probe/*", "train/concepts/*", "train/probe/*"):
        assert written.metrics[group] == "train/global_step"
    steps = [row["train/global_step"] for row in written.rows]
    assert steps == sorted(set(steps))
    assert (steps[0], steps[-1]) == (0, 400)


def test_logs_tables_and_charts_and_no_scalar(written):
    assert {key for row in written.rows for key in row} == TABLES | CHARTS | AXIS
    assert set(written.summary) - {"_wandb"} == TABLES | CHARTS | AXIS


def test_summary_has_the_last_table_and_the_history_all(written):
    for key in TABLES | CHARTS:
        logged = [row[key] for row in written.rows if key in row]
        assert len({value["path"] for value in logged}) == len(logged)
        assert len(logged) > 3
        assert written.summary[key]["path"] == logged[-1]["path"]


def test_amplified_and_suppressed_are_ranked_together(records, written):
    last = {record["type"]: record for record in records}
    values = {concept["label"]: last["step"]["concepts"][concept["name"]] for concept in records[0]["concepts"]}
    features = {entry["feature"]: entry for entry in last["features"]["amplified"] + last["features"]["suppressed"]}
    seen = []
    for key, sign in (("concepts/amplified", 1), ("concepts/suppressed", -1)):
        assert written.values(key)[-1]["columns"] == list(RANKED_COLUMNS)
        table = written.table(key)
        assert [row["rank"] for row in table] == list(range(1, len(table) + 1))
        assert {row["kind"] for row in table} == {"concept", "SAE feature"}
        clear = [sign * (row["low"] if sign > 0 else row["high"]) > 0 for row in table]
        assert clear == sorted(clear, reverse=True)
        inside = [sign * row["amplification"] for row, ok in zip(table, clear, strict=True) if ok]
        assert inside == sorted(inside, reverse=True)
        for row in table:
            entry = values[row["label"]] if row["kind"] == "concept" else features[row["feature"]]
            value, error = entry["amplification"]
            assert (row["step"], row["amplification"], sign * value > 0) == (400, value, True)
            assert (row["low"], row["high"]) == pytest.approx((value - Z * error, value + Z * error))
            assert (row["pressure"], row["delta"]) == (entry["pressure"][0], entry["delta"][0])
            assert "row " in row["example rows"]
        seen += [(row["kind"], row["label"], row["feature"]) for row in table]
    assert len(seen) == len(set(seen)) == len(values) + len(features)


def test_columns_have_types(written):
    """W&B sorts and plots a column by its type."""
    types = written.artifacts["concepts/amplified.table.json"][-1]["column_types"]["params"]["type_map"]
    for name, kind in RANKED_COLUMNS.items():
        allowed = {entry["wb_type"] for entry in types[name]["params"]["allowed_types"]}
        assert allowed == {"none", "string" if kind is str else "number"}, name


def test_pairs(records, written):
    last = {record["type"]: record for record in records}["pairs"]["concepts"]
    table = written.table("concepts/pairs")
    assert list(table[0]) == list(PAIR_COLUMNS)
    for name, pairs in last.items():
        rows = [row for row in table if row["label"] == name]
        assert [row["row"] for row in rows] == [pair["row"] for pair in pairs]
        assert [row["contribution"] for row in rows] == [pair["contribution"] for pair in pairs]
        assert [row["chosen"] for row in rows] == [pair["chosen"][:CELL] for pair in pairs]
    assert any(row["kind"] == "SAE feature" for row in table)


def test_rollouts_before_and_now(records, written):
    first, *_, last = [record for record in records if record["type"] == "probe"]
    table = written.table("probe/rollouts")
    assert len(table) == len(last["samples"])
    for row, before, now in zip(table, first["samples"], last["samples"], strict=True):
        assert (row["prompt"], row["before"], row["now"]) == (now["prompt"], before["completion"], now["completion"])
        assert row["step"] == last["step"]
        for name, score in now["scores"].items():
            assert (row[f"{name} before"], row[f"{name} now"]) == (before["scores"][name], score)


def test_top_chart_has_intervals(records, written):
    chart = written.values("concepts/top")[-1]
    (bars,) = chart["data"]
    amplified, suppressed = latest(records).ranked()
    items = amplified[:15] + suppressed[:15][::-1]
    assert bars["x"] == pytest.approx([item.value for item in items], rel=1e-3)
    assert bars["error_x"]["array"] == pytest.approx([Z * item.error for item in items], rel=1e-3)
    assert chart["layout"]["yaxis"]["ticktext"] == [item.label for item in items]


def test_heatmap_is_concept_by_step(records, written):
    (cells,) = written.values("concepts/heatmap")[-1]["data"]
    steps = [record for record in records if record["type"] == "step"]
    assert cells["x"] == [record["step"] for record in steps]
    labels = written.values("concepts/heatmap")[-1]["layout"]["yaxis"]["ticktext"]
    for concept in records[0]["concepts"]:
        expected = [record["concepts"][concept["name"]]["amplification"][0] for record in steps]
        assert cells["z"][labels.index(concept["label"])] == pytest.approx(expected, rel=1e-3)
    assert cells["zmin"] == -cells["zmax"]
    assert any(None in row for row in cells["z"])  # features, at the steps where they were among the top


def test_predicted_against_observed(records, written):
    charts = written.values("probe/predicted_vs_observed")
    probes = [record for record in records if record["type"] == "probe"]
    assert len(charts) == len(probes) - 1  # at step 0 nothing is predicted
    last, chart = probes[-1], charts[-1]
    assert f"R² = {last['r2']:.2f}" in chart["layout"]["title"]["text"]
    assert last["estimator"] in chart["layout"]["xaxis"]["title"]["text"]
    points = {trace["name"]: trace for trace in chart["data"]}
    for name, entries in (("concepts", last["concepts"].values()), ("SAE features", last["features"])):
        entries = list(entries)
        for axis, key in (("x", "predicted"), ("y", "change")):
            assert points[name][axis] == pytest.approx([number(entry[key]) for entry in entries], rel=1e-3)
            errors = points[name][f"error_{axis}"]["array"]
            assert errors == pytest.approx([Z * number(entry[key], 1) for entry in entries], rel=1e-3)


# --- sizes and rate ----------------------------------------------------------------------------------------------------------


def test_a_large_run_stays_within_the_advised_sizes():
    """65k features watched, a hundred in each table, long texts: bounded rows, cells, values and charts."""
    run, sink = start(), WandbSink()
    folder = run.sync_dir
    feed(sink, synthetic(concepts=150, steps=4, features=150, samples=120, rows=4, words=160, probes=2))
    sink.close()
    wandb.finish()
    result = Written(folder)
    for key in TABLES:
        table = result.values(key)[-1]
        assert 50 < len(table["data"]) <= 250
        assert max(len(cell) for row in table["data"] for cell in row if isinstance(cell, str)) <= CELL
        assert result.file(result.summary[key]).stat().st_size < 1e6
    for key in CHARTS:
        assert result.file(result.summary[key]).stat().st_size < 1e5
    assert all(len(json.dumps(value)) < 2000 for row in result.rows for value in row.values())
    assert "bdata" not in "".join(path.read_text() for path in folder_charts(result))


def folder_charts(result: Written) -> list[Path]:
    return sorted((result.folder / "files/media/plotly").rglob("*.json"))


def test_a_long_run_logs_few_tables():
    """10,000 logging steps of a run of 100,000: frequent at first, then one for each twentieth of the run."""
    run, sink = start(), WandbSink()
    folder = run.sync_dir
    asked = synthetic(concepts=2, steps=1, features=0, probes=0)[0]
    asked["settings"]["max_steps"] = 100_000
    sink.write([asked])
    for step in range(10, 100_001, 10):
        entry = {"amplification": [1.0 + step, 0.1], "pressure": [0.1, 0.1], "delta": [0.1, 0.1], "strength": None}
        sink.write([{"type": "step", "step": step, "concepts": {"goblin": entry}}])
    sink.write([{"type": "end", "step": 100_000}])
    sink.close()
    wandb.finish()
    result = Written(folder)
    steps = [row["train/global_step"] for row in result.rows]
    assert 30 < len(steps) < 50
    assert (steps[0], steps[-1]) == (10, 100_000)
    assert max(later - step for step, later in pairwise(steps)) <= 5010
    (cells,) = result.values("concepts/heatmap")[-1]["data"]
    assert HISTORY / 2 <= len(cells["x"]) <= HISTORY
    assert (cells["x"][0], cells["x"][-1]) == (10, 100_000)


def test_hostile_text_and_unknown_values():
    """Text is shown, never markup; nothing that JSON or W&B cannot hold gets in their way."""
    run, sink = start(), WandbSink()
    folder = run.sync_dir
    nothing = {"amplification": [None, None], "pressure": None, "delta": [None, None], "strength": None}
    pair = {"row": 1, "prompt": HOSTILE, "chosen": None, "rejected": None, "delta": None, "margin": None}
    feature = {"feature": 7, "label": HOSTILE, "amplification": [0.5, None], "pressure": [0.1, None], "rows": [pair]}
    samples = [{"prompt": HOSTILE, "completion": HOSTILE, "scores": {}}, {"prompt": None, "completion": None}]
    sink.write(
        [
            {"type": "run", "step": 0, "concepts": [{"name": "a", "label": HOSTILE, "threshold": None}]},
            {"type": "step", "step": 1, "concepts": {"a": {"amplification": [-1.0, 0.1]}, "b": nothing}},
            {"type": "features", "step": 1, "amplified": [feature], "suppressed": []},
            {"type": "pairs", "step": 1, "concepts": {"a": [pair], "b": []}},
            {
                "type": "probe",
                "step": 1,
                "concepts": {"a": {"change": [1, 0.1], "predicted": None}},
                "samples": samples,
            },
            {"type": "tomorrow", "step": 1, "anything": object()},
        ]
    )
    sink.close()
    wandb.finish()
    result = Written(folder)
    assert [row["label"] for row in result.table("concepts/amplified")] == [HOSTILE]
    assert [row["high"] for row in result.table("concepts/amplified")] == [None]
    assert [row["low"] < -1 for row in result.table("concepts/suppressed")] == [True]
    assert [row["before"] for row in result.table("probe/rollouts")] == [HOSTILE, None]
    assert not result.values("probe/predicted_vs_observed")
    for path in folder_charts(result):
        text = path.read_text()
        assert "&lt;script&gt;" in text
        assert "<a" not in text
        assert "$" not in text


# --- failures ----------------------------------------------------------------------------------------------------------------


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("shapedpo")]


@pytest.mark.parametrize("mode", ["no run", "disabled"])
def test_without_a_run_nothing_happens(mode, records, tmp_path, caplog):
    if mode == "disabled":
        wandb.init(mode="disabled")
    sink = WandbSink()
    sink.open([])
    feed(sink, records)
    sink.close()
    assert warnings_of(caplog) == []
    assert not list((tmp_path / "wandb_dir").rglob("*.table.json"))


def test_a_run_that_starts_late_gets_everything(records):
    sink = WandbSink()
    sink.open([])
    feed(sink, records[:30])
    folder = start().sync_dir
    feed(sink, records[30:])
    sink.close()
    wandb.finish()
    result = Written(folder)
    assert result.config["shapedpo"]["data"] == records[0]["data"]
    assert result.table("probe/rollouts")[0]["before"] == records[1]["samples"][0]["completion"]


def test_a_run_finished_midway(records, caplog):
    """One warning; and a run that the user starts afterwards is used from then on."""
    sink = WandbSink()
    start()
    feed(sink, records[:20])
    wandb.finish()
    with caplog.at_level(logging.WARNING):
        feed(sink, records[20:40])
    (warning,) = warnings_of(caplog)
    assert "the run was finished before the training was" in warning
    assert "Training goes on" in warning

    folder = start().sync_dir
    feed(sink, records[40:])
    sink.close()
    wandb.finish()
    assert len(warnings_of(caplog)) == 1
    result = Written(folder)
    assert result.config["shapedpo"]["data"] == records[0]["data"]
    assert set(result.summary) >= TABLES | CHARTS


def test_a_folder_that_takes_no_files(records, caplog):
    """The run's folder cannot be written to for a while: one warning, then W&B is tried again, and has the latest of all."""
    run, sink = start(), WandbSink()
    folder = Path(run.sync_dir)
    feed(sink, records[:3])
    media = folder / "files/media"
    shutil.move(media, folder / "aside")
    media.write_text("in the way")
    with caplog.at_level(logging.WARNING):
        feed(sink, records[3:8])
    (warning,) = warnings_of(caplog)
    assert "logging the tables and charts failed" in warning
    media.unlink()
    shutil.move(folder / "aside", media)
    feed(sink, records[8:])
    sink.close()
    wandb.finish()
    assert len(warnings_of(caplog)) == 1
    assert Written(folder).summary["train/global_step"] == 400


def test_a_service_that_is_killed():
    """W&B's own process dies: one warning, no exception, no waiting. (In a process of its own, which loses its W&B.)"""
    code = """
        import logging, os, signal, subprocess, time
        import wandb
        from shapedpo.monitor.wandb import WandbSink
        from tests.monitor.records import synthetic

        logging.basicConfig(format="LOG %(name)s %(message)s")
        records = synthetic(steps=40)
        wandb.init(project="tests")
        sink = WandbSink()
        sink.open([])
        sink.write(records[:12])
        listed = subprocess.run(["ps", "-o", "pid=,comm=", "--ppid", str(os.getpid())], capture_output=True, text=True)
        (core,) = [int(line.split()[0]) for line in listed.stdout.splitlines() if "wandb" in line]
        os.kill(core, signal.SIGKILL)
        begin = time.perf_counter()
        for record in records[12:]:
            sink.write([record])
        sink.close()
        print(f"DONE {time.perf_counter() - begin:.3f}", flush=True)
        os._exit(0)
    """
    # A child would use this process's service, which W&B names in the environment.
    own = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120, cwd=REPO, env=own
    )
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("DONE")] or pytest.fail(done.stderr)
    assert float(line.split()[1]) < 5
    warnings = [line for line in done.stderr.splitlines() if line.startswith("LOG shapedpo")]
    assert len(warnings) == 1, done.stderr
    assert "ConnectionResetError" in warnings[0]


def test_a_resumed_run(records):
    """What is on disk is not logged again, but is known: the map goes back to the start, rollouts to before training."""
    half = next(index for index, record in enumerate(records) if record["step"] > 200)
    folder = start().sync_dir
    sink = WandbSink()
    sink.open(records[: half + 4])  # the crash came after the checkpoint at step 200
    feed(sink, records[half:])
    sink.close()
    wandb.finish()
    result = Written(folder)
    steps = [row["train/global_step"] for row in result.rows]
    assert steps[0] > 200
    (cells,) = result.values("concepts/heatmap")[-1]["data"]
    assert cells["x"] == list(range(10, 401, 10))
    assert result.table("probe/rollouts")[0]["before"] == records[1]["samples"][0]["completion"]
    assert result.config["shapedpo"]["concepts"]


# --- transformers' callback --------------------------------------------------------------------------------------------------

TRAINER = """
    import logging, os, signal, subprocess, sys
    import wandb
    from transformers import TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import CallbackHandler
    from transformers.integrations import WandbCallback
    from shapedpo.monitor.wandb import WandbSink
    from shapedpo.monitor.wandb_callback import GuardedWandbCallback, guard_wandb
    from tests.monitor.records import synthetic

    logging.basicConfig(format="LOG %(name)s %(message)s")
    args = TrainingArguments(sys.argv[1], report_to="none", run_name="tiny", use_cpu=True)
    handler = CallbackHandler([WandbCallback()], None, None, None, None)
    guard_wandb(handler)
    assert [type(callback) for callback in handler.callbacks if isinstance(callback, WandbCallback)] == [GuardedWandbCallback]
    state, control = TrainerState(), TrainerControl()
    handler.on_train_begin(args, state, control)
    folder, sink = wandb.run.sync_dir, WandbSink()
    sink.open([])
    for record in synthetic(steps=6, probes=3):
        state.global_step = record["step"]
        if record["type"] == "step":
            scalars = {f"concepts/{name}/amplification": entry["amplification"][0] for name, entry in record["concepts"].items()}
            handler.on_log(args, state, control, {"loss": 0.5, **scalars})
        sink.write([record])
        if record["step"] == 30 and sys.argv[2] == "finish":
            wandb.finish()
        if record["step"] == 30 and sys.argv[2] == "kill":
            listed = subprocess.run(["ps", "-o", "pid=,comm=", "--ppid", str(os.getpid())], capture_output=True, text=True)
            (core,) = [int(line.split()[0]) for line in listed.stdout.splitlines() if "wandb" in line]
            os.kill(core, signal.SIGKILL)
            sys.argv[2] = "killed"
    sink.close()
    handler.on_train_end(args, state, control)
    print("DONE", folder, flush=True)
    if sys.argv[2] == "killed":
        os._exit(0)
    wandb.finish()
"""


def trained(tmp_path: Path, event: str, **environment: str) -> tuple[Written | None, list[str]]:
    """A run with transformers' own callback and the sink, in a process of its own: what it wrote, and its warnings."""
    own = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"} | environment
    command = [sys.executable, "-c", textwrap.dedent(TRAINER), str(tmp_path / "out"), event]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=REPO, env=own)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("DONE")] or pytest.fail(done.stderr)
    warnings = [line for line in done.stderr.splitlines() if line.startswith("LOG shapedpo")]
    return None if event == "kill" else Written(line.split(maxsplit=1)[1]), warnings


def test_no_value_is_logged_twice(tmp_path):
    """With transformers' callback beside it: scalars from there, the rest from here, one axis."""
    result, warnings = trained(tmp_path, "")
    assert warnings == []
    scalars = [row for row in result.rows if "train/loss" in row]
    ours = [row for row in result.rows if "train/loss" not in row]
    assert {key for row in ours for key in row} == TABLES | CHARTS | AXIS
    assert not any(key in row for row in scalars for key in TABLES | CHARTS)
    assert [row["train/global_step"] for row in scalars] == [10, 20, 30, 40, 50, 60]
    assert [row["train/concepts/goblin/amplification"] for row in scalars] == [
        record["concepts"]["goblin"]["amplification"][0]
        for record in synthetic(steps=6, probes=3)
        if record["type"] == "step"
    ]
    assert result.metrics["train/concepts/*"] == "train/global_step"
    assert result.config["shapedpo"]["concepts"].keys() >= {"goblin"}
    assert "learning_rate" in result.config


@pytest.mark.parametrize("event", ["finish", "kill"])
def test_losing_wandb_does_not_stop_transformers_callback(event, tmp_path):
    _, warnings = trained(tmp_path, event)
    assert len(warnings) == 2
    assert all("Training goes on" in warning for warning in warnings)
    assert any("wandb_callback" in warning or "logging failed" in warning for warning in warnings)


def test_no_network_when_training_begins(tmp_path):
    """Nothing listens at that address: after W&B's own time limit the run goes on offline, with everything in it."""
    address = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40, "WANDB_INIT_TIMEOUT": "3"}
    result, warnings = trained(tmp_path, "", WANDB_MODE="online", **address)
    (warning,) = warnings
    assert "cannot be reached" in warning
    assert "wandb sync" in warning
    assert "offline-run" in result.folder.name
    assert set(result.summary) >= TABLES | CHARTS
    assert "learning_rate" in result.config
