"""W&B fails, really: the training goes on, with one warning. And W&B with the trainer, and without trouble."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import wandb

from shapedpo.monitor.wandb import WandbSink
from tests.monitor.records import synthetic
from tests.wandb_files import AXIS, CHARTS, TABLES, Written, feed, start


pytestmark = pytest.mark.usefixtures("wandb_offline")
REPO = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def records() -> list[Any]:
    return synthetic(concepts=6, steps=40, features=12, samples=6, probes=5)


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


# --- the trainer ---------------------------------------------------------------------------------------------------------


def test_a_training_run(tmp_path):
    """The trainer from end to end: what it logs of its concepts, its features and its rollouts is in the run."""
    from shapedpo import Concept, Regex, SAEFeatures
    from tests.helpers import sae_path, shaped, train

    concepts = [
        Concept("goblin", Regex("goblin"), "suppress", strength=1.0),
        Concept("f", SAEFeatures(str(sae_path()), [3, 17])),
    ]
    probe = {"probe_steps": 2, "probe_prompts": 4, "probe_max_new_tokens": 8}
    settings = {"report_to": "wandb", "monitor": "all", "max_steps": 5, "logging_steps": 1}
    train(shaped(*concepts, output_dir=str(tmp_path / "out"), **settings, **probe))
    folder = wandb.run.sync_dir
    wandb.finish()
    result = Written(folder)
    assert set(result.summary) >= TABLES | CHARTS
    for key in TABLES | CHARTS:
        assert [row["train/global_step"] for row in result.rows if key in row][-1] == 5
    for step in range(1, 6):
        rows = [row for row in result.rows if row.get("train/global_step") == step]
        keys = [key for row in rows for key in row if key not in {*AXIS, "train/epoch"}]
        assert len(keys) == len(set(keys))  # nothing twice
        assert {"train/concepts/goblin/amplification", "train/loss"} <= set(keys)
    kinds = {row["kind"] for key in ("concepts/amplified", "concepts/suppressed") for row in result.table(key)}
    assert "SAE feature" in kinds
    rollouts = result.table("probe/rollouts")
    assert {"goblin before", "goblin now", "f now"} <= rollouts[0].keys()
    assert all(row["before"] is not None and row["now"] is not None for row in rollouts)
    assert result.config["shapedpo"]["concepts"]["goblin"]["strength"] == 1.0
    assert result.config["shapedpo"]["data"]["fingerprint"]
