"""What the policy reads and computes is the same on two processes as on one: DDP and ZeRO-3, each by its launcher, on CPUs."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import interventions
from tests.helpers import model_path, pairs


ROOT = Path(__file__).parents[2]
LAUNCHERS = {
    "ddp": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"],
    "zero3": [
        "-m",
        "accelerate.commands.launch",
        "--config_file=accelerate_configs/cpu_zero3.yaml",
        "--main_process_port={port}",
        "-m",
    ],
}
MIXED = ("way1/tokens", "goblin/tokens", "way2/steer", "way3/ablate", "fox/inoculate", "way4/residual", "cat/residual")
SHARES = {"full": MIXED, "lora-reentrant": MIXED, "projected": ("way3/projected", "way4/projected")}
"""What must not be 0 in each run, or it would show nothing."""
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(590)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "pairs"
    pairs(32, fruity=[index % 2 == 0 for index in range(32)]).save_to_disk(path)
    return path


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """All runs in this process."""
    output = tmp_path_factory.mktemp("alone")
    interventions.main(model_path(), data, output, list(interventions.RUNS))
    return output


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_equal_one(alone, data, tmp_path, launcher):
    if launcher == "zero3" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = [word.format(port=port) for word in LAUNCHERS[launcher]]
    runs = [name for name in interventions.RUNS if (launcher, name) != ("zero3", "projected")]  # which is refused
    words = [str(model_path()), str(data), str(tmp_path), *runs]
    command = [sys.executable, *start, "tests.distributed.interventions", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    for name in runs:
        one, two = (json.loads((folder / name / "result.json").read_text()) for folder in (alone, tmp_path))
        assert two["launched"] == ("MULTI_CPU 2" if launcher == "ddp" else "DEEPSPEED 2")
        assert two["thresholds"][0] == two["thresholds"][1] == pytest.approx(one["thresholds"][0], abs=1e-5)
        assert two["filtered"] == one["filtered"]
        assert (one["filtered"] is not None) == (name == "full")
        compared = 0
        for mine, theirs in zip(one["history"], two["history"], strict=True):
            for key, value in mine.items():
                if key == "loss" or key.startswith(("concepts/", "rewards/", "logps/")):
                    assert theirs[key] == pytest.approx(value, rel=1e-4, abs=1e-4), (name, key, mine["step"])
                    compared += 1
        assert compared > 3 * 15
        for key in SHARES[name]:
            assert any(entry.get(f"concepts/{key}") for entry in one["history"]), key
        file = "adapter_model.safetensors" if "lora" in name else "model.safetensors"
        mine, theirs = (load_file(folder / name / file) for folder in (alone, tmp_path))
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            torch.testing.assert_close(theirs[key].float(), value.float(), rtol=0, atol=1e-4, msg=f"{name} {key}")
