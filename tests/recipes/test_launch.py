"""The commands of recipes/README.md start the lab's recipe on two processes, and these train what one process trains."""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from shapedpo import cli
from shapedpo.sources import model_source


REPO = Path(__file__).parents[2]
README = (REPO / "recipes" / "README.md").read_text()
SHORT = ["--max_steps=2", "--calibration_size=16", "--dataset_name=lab:goblin_world?n=40", "--probe_steps=0"]


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


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "start",
    [
        "accelerate launch --config_file accelerate_configs/cpu_ddp.yaml",
        "accelerate launch --config_file accelerate_configs/cpu_zero3.yaml",
    ],
    ids=["cpu_ddp", "cpu_zero3"],
)
def test_command_of_the_readme(start, alone, tmp_path):
    if "zero" in start and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    _, _, *words = written(start)
    short = [*SHORT, "--per_device_train_batch_size=2", f"--output_dir={tmp_path}", "--disable_tqdm=true"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port=0"]
    command = [*launch, *words, *short]
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


def test_torchrun_starts_the_same():
    """By torchrun's own parser: two processes of what accelerate, which calls torchrun's code, starts above."""
    from torch.distributed.run import parse_args

    args = parse_args(written("torchrun --nproc_per_node 2")[1:])
    accelerates = written("accelerate launch --config_file accelerate_configs/cpu_ddp.yaml")
    started = [args.training_script, *args.training_script_args]
    assert (args.nproc_per_node, args.module) == ("2", True)
    assert started == accelerates[accelerates.index("-m") + 1 :]


# What a cluster has and this machine has not: each node of the job runs its command, one after the other.
STUBS = {
    "scontrol": 'printf "node-a\\nnode-b\\n"',
    "srun": 'while [[ $1 == --* ]]; do shift; done; for node in 0 1; do SLURM_NODEID=$node "$@"; done',
    "accelerate": 'printf "%s|" "$@"; echo',
}


def test_launch_slurm(tmp_path):
    """On two nodes of four GPUs: what each node starts, and that a job that is put back goes on."""
    for name, script in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "activate").touch()
    environment = {
        **{"PATH": f"{tmp_path}:/usr/bin:/bin", "VENV": str(tmp_path), "SLURM_SUBMIT_DIR": str(REPO)},
        **{"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_JOB_NUM_NODES": "2"},
        **{"SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "32"},
    }

    def submit(*words: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(REPO / "recipes" / "launch.slurm"), *words]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

    out = tmp_path / "out"
    done = submit("recipes/tulu3_70b.yaml", "--output_dir", str(out), "--run_name", "a b")
    assert done.returncode == 0, done.stderr
    lines = [line.strip("|").split("|") for line in done.stdout.splitlines()]
    for rank, words in enumerate(lines):
        assert words[:3] == ["launch", "--config_file", "accelerate_configs/zero3.yaml"]
        given = dict(itertools.pairwise(words))
        assert (given["--num_machines"], given["--num_processes"]) == ("2", "8")
        assert (given["--machine_rank"], given["--main_process_ip"]) == (str(rank), "node-a")
        tail = [
            "-m",
            "shapedpo",
            "train",
            "--config",
            "recipes/tulu3_70b.yaml",
            "--output_dir",
            str(out),
            "--run_name",
            "a b",
        ]
        assert words[-len(tail) :] == tail
    assert len(lines) == 2

    (out / "checkpoint-20").mkdir(parents=True)
    (out / "checkpoint-20" / "trainer_state.json").write_text("{}")
    assert "--resume_from_checkpoint|true|" in submit("recipes/tulu3_70b.yaml", f"--output_dir={out}").stdout
    assert "--resume_from_checkpoint" not in submit("recipes/tulu3_70b.yaml").stdout
    assert "there is no recipe 'nowhere.yaml'" in submit("nowhere.yaml").stderr
