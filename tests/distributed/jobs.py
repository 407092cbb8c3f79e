"""Runs in processes that can be killed, forked from a server that has imported everything: they start in no time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests import helpers
from tests.distributed import runs


STEPS, EVERY = 6, 2
"""Steps of a run, and how often it saves."""
PRELOAD = ["shapedpo.trainer", "sae_lens", "deepspeed", "tests.distributed.jobs"]
"""What takes seconds to import; what is not installed is passed over."""


def train(
    rank: int, world: int, port: int, stage: int | None, output: Path, folders: dict[str, str], resume: bool
) -> None:
    """One process of a run; its log is beside its output."""
    import torch
    from transformers import TrainerCallback

    log = os.open(output.with_suffix(f".{rank}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    helpers.sae_path = lambda: Path(folders["sae"])
    fields: dict[str, Any] = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": EVERY}
    if stage is not None:
        import deepspeed

        deepspeed.init_distributed("gloo")
        auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
        fields["deepspeed"] = {"zero_optimization": {"stage": stage}, **dict.fromkeys(auto, "auto")}

    class Steps(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if rank == 0:
                output.with_suffix(".step").write_text(str(state.global_step + 1))

    trainer = runs.build("monitor", output, Path(folders["model"]), runs.data(), **fields)
    trainer.add_callback(Steps())
    trainer.train(resume_from_checkpoint=resume or None)
    trainer.save_model()


class Job:
    """A run that goes on in other processes."""

    def __init__(self, processes: list[Any], output: Path) -> None:
        self.processes, self.output = processes, output

    def finish(self) -> None:
        """Wait for its end, which must be a good one."""
        for rank, process in enumerate(self.processes):
            process.join(timeout=280)
            assert process.exitcode == 0, self.output.with_suffix(f".{rank}.log").read_text()[-6000:]

    def kill(self, step: int, delay: float) -> None:
        """SIGKILL a while after a step has begun."""
        marker = self.output.with_suffix(".step")
        end = time.monotonic() + 200
        while not (
            marker.is_file() and (marker.read_text() or "0").isdecimal() and int(marker.read_text() or 0) >= step
        ):
            assert self.processes[0].is_alive(), self.output.with_suffix(".0.log").read_text()[-6000:]
            assert time.monotonic() < end, f"step {step} has not come"
            time.sleep(0.002)
        time.sleep(delay)
        for process in self.processes:
            os.kill(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.join()
        marker.unlink()


@contextmanager
def server() -> Iterator[Any]:
    """Starts jobs: a function of the number of processes, ZeRO's stage or `None`, the output folder, and whether to resume."""
    folders = {"model": str(helpers.model_path()), "sae": str(helpers.sae_path())}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    started = []

    def start(world: int, stage: int | None, output: Path, resume: bool = False) -> Job:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = []
        for rank in range(world):
            process = context.Process(target=train, args=(rank, world, port, stage, output, folders, resume))
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
