"""The commands of recipes/README.md start the lab's recipe on two processes, and these train what one process trains."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from shapedpo import cli
from shapedpo.scripts.sources import model_source


REPO = Path(__file__).parents[2]
README = (REPO / "recipes" / "README.md").read_text()
MODULES = {"torchrun": "torch.distributed.run", "accelerate": "accelerate.commands.launch"}
PORT = {"torchrun": ["--rdzv-endpoint=localhost:0", "--rdzv-backend=c10d"], "accelerate": ["--main_process_port=0"]}
SHORT = [
    "--max_steps=2",
    "--calibration_size=16",
    "--dataset_name=lab:goblin_world?n=40",
    "--probe_steps=0",
    "--monitor=8",
]

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(900)]


def written(start: str) -> list[str]:
    """The command of the README that begins so."""
    (line,) = re.findall(rf"^{re.escape(start)}.*$", README, flags=re.MULTILINE)
    return shlex.split(line, comments=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process makes of the same pairs."""
    out = tmp_path_factory.mktemp("alone")
    recipe = str(REPO / "recipes" / "goblin_lab.yaml")
    assert (
        cli.main(["train", "--config", recipe, *SHORT, "--per_device_train_batch_size=4", f"--output_dir={out}"]) == 0
    )
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize(
    "start",
    [
        "torchrun --nproc_per_node 2",
        "accelerate launch --config_file accelerate_configs/cpu_ddp.yaml",
        "accelerate launch --config_file accelerate_configs/cpu_zero3.yaml",
    ],
    ids=["torchrun", "cpu_ddp", "cpu_zero3"],
)
def test_command_of_the_readme(start, alone, tmp_path):
    if "zero" in start and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    launcher, *words = written(start)
    words = words[1:] if launcher == "accelerate" else words  # `launch` is in the module's name
    short = [*SHORT, "--per_device_train_batch_size=2", f"--output_dir={tmp_path}", "--disable_tqdm=true"]
    command = [sys.executable, "-m", MODULES[launcher], *PORT[launcher], *words, *short]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("Model saved to") == 1  # one of them speaks
    two = load_file(tmp_path / "model.safetensors")
    start_weights = load_file(Path(model_source("lab")) / "model.safetensors")
    assert two.keys() == alone.keys()
    moved = max(float((alone[name] - start_weights[name]).abs().max()) for name in alone)
    apart = max(float((alone[name] - two[name]).abs().max()) for name in alone)
    assert moved > 1e-5
    assert apart < 0.1 * moved  # the sums are taken in another order, which Adam's first steps magnify
