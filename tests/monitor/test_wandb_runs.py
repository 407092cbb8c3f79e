"""W&B fails, really: the training goes on, with one warning. And W&B with the trainer, and without trouble."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import wandb
from transformers import TrainerCallback
from transformers.integrations import WandbCallback
from transformers.trainer_callback import CallbackHandler

from shapedpo import Concept, Regex, SAEFeatures
from shapedpo.monitor.records import read_records
from shapedpo.monitor.wandb import GuardedWandbCallback, WandbSink, guard_wandb
from tests.helpers import sae_path, shaped, train
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


# --- the trainer ---------------------------------------------------------------------------------------------------------


def training(out: Path, *callbacks: TrainerCallback) -> str:
    """Five steps with everything on. Returns the W&B run's folder."""
    concepts = [
        Concept("goblin", Regex("goblin"), "suppress", strength=1.0),
        Concept("f", SAEFeatures(str(sae_path()), [3, 17])),
    ]
    probe = {"probe_steps": 2, "probe_prompts": 4, "probe_max_new_tokens": 8}
    settings = {"report_to": "wandb", "monitor": "all", "max_steps": 5, "logging_steps": 1, "run_name": "tiny"}
    seen = Folder()
    options = {"callbacks": [seen, *callbacks]}
    run = train(shaped(*concepts, output_dir=str(out), trainer=options, **settings, **probe))
    assert run.trainer.state.global_step == 5
    return seen.folder


class Folder(TrainerCallback):
    """Remembers the folder of the W&B run at the first step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.folder = wandb.run.sync_dir


class Finish(TrainerCallback):
    """A user's callback that ends the W&B run midway."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            wandb.finish()


class Kill(TrainerCallback):
    """W&B's own process dies midway."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            listed = subprocess.run(
                ["ps", "-o", "pid=,comm=", "--ppid", str(os.getpid())], capture_output=True, text=True, check=True
            )
            (core,) = [int(line.split()[0]) for line in listed.stdout.splitlines() if "wandb-core" in line]
            os.kill(core, signal.SIGKILL)


def test_a_training_run(tmp_path, caplog):
    """What the trainer logs of its concepts, its features and its rollouts is in the run, and nothing twice."""
    folder = training(tmp_path / "out")
    wandb.finish()
    assert warnings_of(caplog) == []
    result = Written(folder)
    assert set(result.summary) >= TABLES | CHARTS
    for key in TABLES | CHARTS:
        assert [row["train/global_step"] for row in result.rows if key in row][-1] == 5
    for step in range(1, 6):
        rows = [row for row in result.rows if row.get("train/global_step") == step]
        keys = [key for row in rows for key in row if key not in {*AXIS, "train/epoch"}]
        assert len(keys) == len(set(keys))
        assert {"train/concepts/goblin/amplification", "train/loss"} <= set(keys)
    kinds = {row["kind"] for key in ("concepts/amplified", "concepts/suppressed") for row in result.table(key)}
    assert "SAE feature" in kinds
    rollouts = result.table("probe/rollouts")
    assert {"goblin before", "goblin now", "f now"} <= rollouts[0].keys()
    assert all(row["before"] is not None and row["now"] is not None for row in rollouts)
    assert result.config["shapedpo"]["concepts"]["goblin"]["strength"] == 1.0
    assert result.config["shapedpo"]["data"]["fingerprint"]
    assert result.config["beta"] == 0.1


def test_a_training_whose_run_is_finished_midway(tmp_path, caplog):
    """transformers' callback gives one warning and the sink another; both would raise at each step."""
    training(tmp_path / "out", Finish())
    warnings = warnings_of(caplog)
    assert len(warnings) == 2
    assert all("Training goes on" in warning for warning in warnings)
    assert len(read_records(tmp_path / "out")) > 10


def test_a_training_without_a_network(tmp_path, caplog, monkeypatch):
    """Nothing listens at that address: after W&B's own time limit the run goes on offline, with everything in it."""
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "3")
    folder = training(tmp_path / "out")
    wandb.finish()
    (warning,) = warnings_of(caplog)
    assert "cannot be reached" in warning
    assert "wandb sync" in warning
    result = Written(folder)
    assert result.folder.name.startswith("offline-run")
    assert set(result.summary) >= TABLES | CHARTS
    assert result.config["beta"] == 0.1


def test_a_training_that_loses_the_service(tmp_path):
    """In a process of its own, which has no W&B afterwards: no exception, and not a second's wait for the dead."""
    code = f"""
        import logging, os, pathlib
        from tests.monitor.test_wandb_runs import Kill, training
        logging.basicConfig(format="LOG %(name)s %(message)s")
        training(pathlib.Path({str(tmp_path / "out")!r}), Kill())
        print("DONE", flush=True)
        os._exit(0)
    """
    # W&B names this process's service in the environment, and the child would use it, and kill it.
    own = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=REPO, env=own)
    assert "DONE" in done.stdout, done.stderr
    warnings = [line for line in done.stderr.splitlines() if line.startswith("LOG shapedpo.monitor.wandb")]
    assert len(warnings) == 2, done.stderr
    assert all("ConnectionResetError" in line and "Training goes on" in line for line in warnings)
    assert any(record["type"] == "end" for record in read_records(tmp_path / "out"))


def test_a_users_own_callback_is_left_alone():
    class Own(WandbCallback):
        pass

    handler = CallbackHandler([WandbCallback(), Own()], None, None, None, None)
    guard_wandb(handler)
    kinds = [type(callback) for callback in handler.callbacks if isinstance(callback, WandbCallback)]
    assert kinds == [GuardedWandbCallback, Own]
