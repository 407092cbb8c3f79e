"""How the cost of shaping grows: overhead over TRL on 1 and 2 processes under DDP, ZeRO-2 and ZeRO-3, measured, modelled, and carried on to many GPUs.

    python -m benchmarks.scaling [--quick] [--device cuda] [--launches ddp1 ddp2 ...] [--steps 32] [--finished] [--out FOLDER]

Each launch measures its cases one after the other (`benchmarks/scaling_steps.py`); a case that is in the cache is not measured again. A model of cost is
fitted on some cases and tried on others that it has not seen (`benchmarks/scaling_model.py`), and then evaluated for 8B and 70B models on 8 to 512
GPUs (`benchmarks/scaling_gpus.py`). Written are `scaling-<device>.csv`, `scaling.md` and `scaling.png`.

With `--device cuda` the cases are larger and the ranks are GPUs (`--launches ddp8 zero3-8`); the table then has tokens per second.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from benchmarks import folders
from benchmarks.folders import REPOSITORY, add_out, out_folder
from benchmarks.scaling_cases import LAUNCHES, Case, cases, split_launch


CACHE = folders.CACHE / "scaling"
FEWEST = 12
"""Measured steps, so that among them are plain, shaped and logged ones."""


def command(launch: str, device: str) -> list[str]:
    """What starts a launch, without the script."""
    kind, processes = split_launch(launch)
    if kind == "ddp":
        return ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = REPOSITORY / "accelerate_configs" / f"{'cpu_' if device == 'cpu' else ''}{kind}.yaml"
    start = ["-m", "accelerate.commands.launch", f"--config_file={config}", f"--num_processes={processes}"]
    return [*start, f"--main_process_port={port}"]


def measure(launch: str, wanted: Sequence[Case], device: str, steps: int, cache: Path) -> None:
    """Measures the cases of a launch that the cache lacks."""
    missing = [case for case in wanted if not (cache / launch / f"{case.key}.json").exists()]
    if not missing:
        return
    cache.mkdir(parents=True, exist_ok=True)
    jobs = cache / f"{launch}.jobs.json"
    fields = {"launch": launch, "device": device, "steps": steps, "cache": str(cache)}
    jobs.write_text(json.dumps({**fields, "cases": [case.fields for case in missing]}))
    threads = {"OMP_NUM_THREADS": "1"} if device == "cpu" else {}
    environment = {
        **os.environ,
        **threads,
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
    }
    words = [sys.executable, *command(launch, device), str(REPOSITORY / "benchmarks" / "scaling_steps.py"), str(jobs)]
    log = cache / f"{launch}.log"
    with log.open("w") as file, tqdm(total=len(missing), desc=launch) as bar:
        process = subprocess.Popen(
            words, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=file, text=True
        )
        assert process.stdout is not None
        for line in process.stdout:
            bar.update(line.strip().endswith(".json"))
    if process.wait():
        raise RuntimeError(f"{launch} failed, see {log}:\n{log.read_text()[-3000:]}")


def load(cache: Path, launches: Sequence[str], wanted: Sequence[Case]) -> list[dict[str, Any]]:
    """What was measured, of the cases that were."""
    paths = [cache / launch / f"{case.key}.json" for launch in launches for case in wanted]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small cases and few steps, to see that it runs")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--launches", nargs="+", help=f"such as {', '.join(LAUNCHES)}, or ddp8 on GPUs")
    parser.add_argument("--steps", type=int, default=32, help="measured steps of a case, plain and shaped together")
    parser.add_argument("--finished", action="store_true", help="measure nothing, take what there is")
    parser.add_argument("--folder", type=Path, default=CACHE)
    add_out(parser)
    options = parser.parse_args(arguments)
    if options.steps < FEWEST:
        parser.error(f"--steps must be at least {FEWEST}: a case needs a step of every kind, got {options.steps}")
    scale = "quick" if options.quick else options.device
    cache = options.folder / scale
    launches = options.launches or (["ddp1", "ddp2"] if options.quick else LAUNCHES)
    if options.device == "cuda" and not options.finished:
        import torch

        gpus = torch.cuda.device_count()
        launches = [launch for launch in launches if split_launch(launch)[1] <= gpus]
        if not launches:
            parser.error(f"--device cuda: there are {gpus} GPUs, and no launch needs as few")
    wanted = {launch: cases(scale, launch) for launch in launches}
    if not options.finished:
        for launch in launches:
            measure(launch, wanted[launch], options.device, options.steps, cache)
    from benchmarks.scaling_report import write

    found = [one for launch in launches for one in load(cache, [launch], wanted[launch])]
    out = out_folder(options, cache)
    print(write(found, scale, options.device, out))


if __name__ == "__main__":
    main()
