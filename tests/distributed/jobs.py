"""Runs in processes that can be killed, forked from a server that has imported everything: they start in no time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from shapedpo import cli
from tests import helpers
from tests.distributed import failing, runs, steps


STEPS, EVERY = 6, 2
"""Steps of a run, and how often it saves."""
PRELOAD = ["shapedpo.trainer", "sae_lens", "deepspeed", "tests.distributed.jobs"]
"""What takes seconds to import; what is not installed is passed over."""


FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
"""What `accelerate launch` tells the processes of `fsdp2.yaml`."""


def train(output: Path, strategy: str = "ddp", resume: bool = False) -> None:
    """A run that saves checkpoints; `strategy` is `ddp`, `zero2`, `zero3` or `fsdp2`."""
    from transformers import TrainerCallback

    fields: dict[str, Any] = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": EVERY}
    if strategy == "fsdp2":
        os.environ |= FSDP
    elif strategy != "ddp":
        import deepspeed

        deepspeed.init_distributed("gloo")
        auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
        zero = {"stage": int(strategy[-1]), "stage3_gather_16bit_weights_on_model_save": True}
        fields["deepspeed"] = {"zero_optimization": zero, **dict.fromkeys(auto, "auto")}

    class Steps(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if args.process_index == 0:
                output.with_suffix(".step").write_text(f"{state.global_step + 1}")

    trainer = runs.build("monitor", output, helpers.model_path(), runs.data(), **fields)
    trainer.add_callback(Steps())
    trainer.train(resume_from_checkpoint=resume or None)
    trainer.save_model()


def shard(output: Path, names: list[str]) -> None:
    """Runs under FSDP2."""
    os.environ |= FSDP
    steps.main(helpers.model_path(), output / "data", output, names)


def command(output: Path, words: list[str]) -> None:
    """`shapedpo` with these arguments; `output` is where its log is kept."""
    assert cli.main(words) == 0


def fail(output: Path, kind: str) -> None:
    """A run in which the second process fails."""
    failing.main(kind, helpers.model_path(), output)


class Job:
    """Something that goes on in other processes."""

    def __init__(self, processes: list[Any], output: Path) -> None:
        self.processes, self.output = processes, output

    def log(self, rank: int = 0) -> str:
        """What a process has said."""
        return self.output.with_suffix(f".{rank}.log").read_text()

    def finish(self) -> None:
        """Wait for its end, which must be a good one."""
        for rank, process in enumerate(self.processes):
            process.join(timeout=280)
            assert process.exitcode == 0, self.log(rank)[-6000:]

    def kill(self, step: int, delay: float) -> None:
        """SIGKILL a while after a step has begun."""
        marker = self.output.with_suffix(".step")
        end = time.monotonic() + 200
        while not (marker.is_file() and int(marker.read_text() or 0) >= step):
            assert self.processes[0].is_alive(), self.log()[-6000:]
            assert time.monotonic() < end, f"step {step} has not come"
            time.sleep(0.002)
        time.sleep(delay)
        for process in self.processes:
            os.kill(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.join()
        marker.unlink()


@contextmanager
def server() -> Iterator[Callable[..., Job]]:
    """Starts jobs: a function of a job, its number of processes, its output folder (a log is beside it) and further arguments."""
    folders = helpers.model_path(), helpers.sae_path()
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    started = []

    def start(job: Callable[..., None], world: int, output: Path, *args: Any) -> Job:
        port = free_port()
        processes = []
        for rank in range(world):
            process = context.Process(target=_process, args=(rank, world, port, folders, job, output, *args))
            process.start()
            processes.append(process)
        started.extend(processes)
        return Job(processes, output)

    try:
        yield start
    finally:
        for process in started:
            if process.is_alive():
                process.kill()


def _process(
    rank: int, world: int, port: int, folders: tuple[Path, Path], job: Callable[..., None], output: Path, *args: Any
) -> None:
    """As a launcher starts it."""
    log = os.open(output.with_suffix(f".{rank}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if world > 1 or job is shard:  # which is sharded on one process too
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    helpers.model_path, helpers.sae_path = (lambda: folders[0]), (lambda: folders[1])
    job(output, *args)


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
