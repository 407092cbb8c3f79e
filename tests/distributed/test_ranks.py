"""Two processes do what one does, on the same global batch: DDP, ZeRO-2 and ZeRO-3, by the real launchers, on CPUs."""

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

from tests.helpers import model_path, pairs


ROOT = Path(__file__).parents[2]
LAUNCHERS = {
    "ddp": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"],
    "zero2": [
        "-m",
        "accelerate.commands.launch",
        "--config_file=accelerate_configs/cpu_zero2.yaml",
        "--main_process_port={port}",
        "-m",
    ],
    "zero3": [
        "-m",
        "accelerate.commands.launch",
        "--config_file=accelerate_configs/cpu_zero3.yaml",
        "--main_process_port={port}",
        "-m",
    ],
}
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(400)]


def run(folder: Path, launcher: str | None, **settings):
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = ["-m"] if launcher is None else [word.format(port=port) for word in LAUNCHERS[launcher]]
    # On disk, as precomputed reference log-probabilities are cached beside the data, where all ranks must find them.
    data = folder.parent / "data"
    pairs(24, weight=[0.5 + (i % 3) / 2 for i in range(24)], fruity=[i % 2 == 0 for i in range(24)]).save_to_disk(data)
    paths = [str(model_path()), str(data), str(folder)]
    words = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    command = [sys.executable, *start, "tests.distributed.steps", *paths, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=380)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    name = "adapter_model.safetensors" if settings.get("lora") else "model.safetensors"
    return json.loads((folder / "result.json").read_text()), load_file(folder / name)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same settings in one process, each once."""
    done = {}

    def run_alone(**settings):
        key = json.dumps(settings, sort_keys=True)
        if key not in done:
            done[key] = run(tmp_path_factory.mktemp("alone") / "out", None, **settings)
        return done[key]

    return run_alone


@pytest.mark.parametrize(
    ("launcher", "settings"),
    [
        ("ddp", {}),
        ("ddp", {"lora": True, "gradient_accumulation_steps": 2, "precompute_ref_log_probs": True}),
        ("zero2", {}),
        ("zero3", {}),
    ],
    ids=["ddp", "ddp-lora-accumulation-precompute", "zero2", "zero3"],
)
def test_two_processes_equal_one(alone, tmp_path, launcher, settings):
    if launcher.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    expected, parameters = alone(**settings)
    extra = {"zero3": True} if launcher == "zero3" else {}
    result, found = run(tmp_path / "out", launcher, **settings, **extra)
    assert result["launched"] == ("MULTI_CPU 2" if launcher == "ddp" else "DEEPSPEED 2")
    assert result["calibration"][0] == result["calibration"][1]
    assert result["calibration"][0] == pytest.approx(expected["calibration"][0], abs=1e-4)
    compared = 0
    for one, two in zip(expected["history"], result["history"], strict=True):
        for name in one:
            if name == "loss" or name.startswith(("concepts/", "rewards/", "logps/")):
                assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-4), (name, one["step"])
                compared += 1
    assert compared > 3 * 15
    assert found.keys() == parameters.keys()
    for name, value in parameters.items():
        torch.testing.assert_close(found[name].float(), value.float(), rtol=0, atol=1e-4, msg=name)
