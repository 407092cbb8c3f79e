"""SIGKILL at a random moment, and on from the last whole checkpoint: as if it had never happened."""

from __future__ import annotations

import importlib.util
import os
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from shapedpo.checkpoints import last_whole_checkpoint
from shapedpo.monitor.records import read_records
from tests.distributed import jobs
from tests.distributed.launches import EVERYTHING
from tests.distributed.test_ranks import assert_close
from tests.helpers import assert_same_tensors


pytestmark = [pytest.mark.distributed, pytest.mark.timeout(590)]
SEED = os.environ.get("SHAPEDPO_KILL_SEED", "0")


@pytest.fixture(scope="module")
def start():
    with jobs.server() as started:
        yield started


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """A run of one process that was never stopped."""
    output = tmp_path_factory.mktemp("whole") / "run"
    start(jobs.train, 1, output).finish()
    return output


@pytest.mark.parametrize("trial", range(2))
def test_one_process(start, whole, tmp_path, trial):
    """Parameters, `concepts.jsonl`, calibration, controller: to the last byte."""
    dice = random.Random(f"{SEED} {trial}")
    output = tmp_path / "run"
    # The second time it goes on, and is killed again.
    job = start(jobs.train, 1, output)
    for step in sorted(dice.sample(range(jobs.EVERY + 1, jobs.STEPS + 1), 2)):
        job.kill(step, dice.uniform(0, 0.2))
        assert last_whole_checkpoint(output) is not None
        job = start(jobs.train, 1, output, "ddp", True)
    job.finish()
    assert (output / "concepts.jsonl").read_bytes() == (whole / "concepts.jsonl").read_bytes()
    for name in ("model.safetensors", "concepts.safetensors", f"checkpoint-{jobs.STEPS}/monitor.safetensors"):
        assert_same_tensors([load_file(whole / name)], [load_file(output / name)])


def test_after_the_last_checkpoint(start, whole, tmp_path):
    """Killed between the last checkpoint and the end: what the end writes is written once."""
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    records = (output / "concepts.jsonl").read_bytes()
    (output / "concepts.jsonl").write_bytes(records[: -len(records.splitlines()[-1]) - 1])
    start(jobs.train, 1, output, "ddp", True).finish()
    assert (output / "concepts.jsonl").read_bytes() == (whole / "concepts.jsonl").read_bytes()
    assert_same_tensors([load_file(whole / "model.safetensors")], [load_file(output / "model.safetensors")])


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3", *(["fsdp2"] if EVERYTHING else [])])
def test_two_processes(start, tmp_path, strategy):
    """Parameters and records to 1e-5: what ranks had summed up by themselves is one's when they go on."""
    if strategy.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    dice = random.Random(f"{SEED} {strategy}")
    whole, output = tmp_path / "whole", tmp_path / "run"
    start(jobs.train, 2, whole, strategy).finish()
    start(jobs.train, 2, output, strategy).kill(dice.randint(jobs.EVERY + 1, jobs.STEPS), dice.uniform(0, 0.3))
    assert last_whole_checkpoint(output) is not None
    start(jobs.train, 2, output, strategy, True).finish()
    one, other = (load_file(path / "model.safetensors") for path in (whole, output))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-5, msg=name)
    # A checkpoint is a model too, in plain transformers.
    saved = AutoModelForCausalLM.from_pretrained(output / f"checkpoint-{jobs.STEPS}").state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in other.items())
    one, other = (load_file(path / "concepts.safetensors") for path in (whole, output))
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    assert_close(read_records(whole)[1:], read_records(output)[1:], "records")
