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

from shapedpo.monitor.records import read_records
from tests.helpers import model_path, pairs, sae_path


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
MONITOR = {"monitor": "30", "probe_steps": 2, "probe_prompts": 20, "probe_max_new_tokens": 8, "logging_steps": 1}
"""Features and rollouts too; more prompts than one process samples at once."""
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
    if "monitor" in settings:
        settings["monitor_sae"] = str(sae_path())
    words = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    command = [sys.executable, *start, "tests.distributed.steps", *paths, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=380)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    name = "adapter_model.safetensors" if settings.get("lora") else "model.safetensors"
    return json.loads((folder / "result.json").read_text()), load_file(folder / name), read_records(folder)


def assert_close(one, two, where):
    """Two plain values are equal, numbers nearly."""
    if isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            assert_close(one[key], two[key], f"{where}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(two), where
        for index, pair in enumerate(zip(one, two, strict=True)):
            assert_close(*pair, f"{where}[{index}]")
    elif isinstance(one, float):
        assert two == pytest.approx(one, rel=1e-3, abs=1e-4), where
    else:
        assert one == two, where


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
        ("ddp", MONITOR),
        ("ddp", {"lora": True, "gradient_accumulation_steps": 2, "precompute_ref_log_probs": True}),
        ("zero2", {}),
        ("zero3", MONITOR),
    ],
    ids=["ddp", "ddp-lora-accumulation-precompute", "zero2", "zero3"],
)
def test_two_processes_equal_one(alone, tmp_path, launcher, settings):
    if launcher.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    expected, parameters, records = alone(**settings)
    extra = {"zero3": True} if launcher == "zero3" else {}
    result, found, their_records = run(tmp_path / "out", launcher, **settings, **extra)
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
    # What the monitor wrote, rollouts and all, is that of one process.
    assert [record["type"] for record in records].count("probe") == (3 if settings is MONITOR else 0)
    assert_close(records[1:], their_records[1:], "records")
    assert found.keys() == parameters.keys()
    for name, value in parameters.items():
        torch.testing.assert_close(found[name].float(), value.float(), rtol=0, atol=1e-4, msg=name)
