"""Runs on two processes by the real launchers. A launch takes long to come up, so each launcher is started once, for all of its runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import yaml

from tests.distributed import interventions, jobs, runs
from tests.helpers import model_path, sae_path


ROOT = Path(__file__).parents[2]
EVERYTHING = bool(os.environ.get("SHAPEDPO_ALL_RANKS"))
"""Whether every run goes by every launcher (`make test-ranks`), or each only where it can go wrong in its own way."""
CASES = {
    "ddp": list(runs.RUNS),
    "zero1": ["accumulation"],
    "zero2": ["monitor", "lora-accumulation-precompute"],
    "zero3": ["monitor", "checkpointing", "lora-reentrant", "evaluation"],
    "zero3_offload": [],  # its optimiser is compiled on first use, which takes minutes
    "fsdp2": ["monitor", "checkpointing", "lora-accumulation-precompute", "evaluation"],
}
INTERVENTIONS = {
    "ddp": list(interventions.RUNS),
    "zero3": [name for name in interventions.RUNS if not name.endswith("projected")],  # which is refused
}


def cases(launcher: str) -> list[str]:
    """The launcher's runs of [`runs`]."""
    if not EVERYTHING:
        return CASES[launcher]
    # With offloading accelerate takes DeepSpeed's Adam in SGD's place. Its first steps are the gradients' signs, and in bf16 what is rounded
    # away decides those.
    return [name for name in runs.RUNS if (launcher, name) != ("zero3_offload", "bf16")]


def command(launcher: str, tmp_path: Path, processes: int, on_gpus: bool) -> list[str]:
    """How a launcher is told to start processes: for ZeRO by the configuration that GPUs get, but for the processor."""
    if launcher == "ddp" and not on_gpus:
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
    config = yaml.safe_load((ROOT / "accelerate_configs" / f"{launcher}.yaml").read_text())
    config |= {"use_cpu": not on_gpus, "num_processes": processes, "mixed_precision": "no"}
    path = tmp_path / f"{launcher}.yaml"
    path.write_text(yaml.safe_dump(config))
    launch = [sys.executable, "-m", "accelerate.commands.launch", f"--config_file={path}"]
    return [*launch, f"--main_process_port={jobs.free_port()}", "-m"]


def launch(launcher: str, output: Path, names: list[str], processes: int = 2, on_gpus: bool = False) -> None:
    """Runs of [`runs`] or [`interventions`] in one launch; each leaves its result in a folder of its name."""
    # On disk, as precomputed reference log-probabilities are cached beside the data, where all ranks must find them.
    data = output / "data"
    runs.data().save_to_disk(data / "runs")
    interventions.data().save_to_disk(data / "interventions")
    if launcher == "fsdp2" and not on_gpus:  # which accelerate does not launch without a GPU: see `runs.build`
        with jobs.server() as start:
            return start(jobs.shard, processes, output, names).finish()
    words = [
        *command(launcher, output, processes, on_gpus),
        "tests.distributed.steps",
        str(model_path()),
        str(data),
        str(output),
        *names,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TINY_SAE": str(sae_path())}
    environment |= {"RANKS_ON_GPUS": "1"} if on_gpus else {}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
