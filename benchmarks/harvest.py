"""What a harvest costs over the forward passes it needs, and how what is made of it grows with its rows.

    python -m benchmarks.harvest cost [--quick] [--files 12] [--device cuda]
    python -m benchmarks.harvest growth [--rows 1000 10000 50000 260000] [--folder FOLDER]

**cost.** A harvest of pairs of varied length by a Llama of GPT-2-small size with random weights and an SAE of 16,384 features, 64 active on a
token. For each file of pairs, in turns (A B B A ...) in one process: the whole harvest of the file (collation, layout, forward, SAE,
pooling, texts, Parquet on disk), and the bare forward passes that it needs, on batches made beforehand: each prompt once, and only
layers up to the hook. For scale, also the reference's pass as DPO makes it (both completions behind their prompts, all layers, no logits).
Ratios are medians over files with their 95 % interval, in CPU time (on a GPU in wall time).

**growth.** All that `shapedpo audit` does after the harvest (analysis, prediction, labels, summary, page) with made-up harvests of 65,536 features
(`benchmarks.synthetic_harvest` says what is realistic about them): time, CPU time and peak memory of a process of its own for each size. The
bound is 8 GB and 30 minutes on 2 cores at 260,000 pairs.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.overhead import QUICK, Size, build, interval


RESULTS = Path(__file__).parent / "results"
PAIRS = 4  # in a file
ACTIVE = 64  # features active on a token
ROWS = (1000, 10_000, 50_000, 260_000)
STAGES = ("analysis", "prediction", "labels, summary, page")


# --- cost --------------------------------------------------------------------------------------------------------------------------


def random_pairs(size: Size, n: int) -> Any:
    """Pairs of random words whose lengths spread as those of real ones do."""
    from datasets import Dataset

    draw = np.random.default_rng(0)

    def text(median: int) -> str:
        length = int(np.clip(draw.lognormal(np.log(median), 0.6), 3, 8 * median))
        return " ".join(f"w{word}" for word in draw.integers(3, size.vocabulary, length)) + " "

    p, c = size.prompt_tokens, size.completion_tokens
    return Dataset.from_list([{"prompt": text(p), "chosen": text(c), "rejected": text(c)} for _ in range(n)])


def measure_cost(size: Size, files: int, device: str) -> dict[str, Any]:
    """The table's figures."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from shapedpo import SAEFeatures
    from shapedpo.audit.harvesting.harvester import Harvester
    from shapedpo.audit.harvesting.layout import run, separate
    from shapedpo.audit.harvesting.pairs import Pairs
    from shapedpo.audit.harvesting.run import HarvestSettings

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(folder, size)
        model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).to(device)
        tokenizer = AutoTokenizer.from_pretrained(folder / "model")
        data = random_pairs(size, PAIRS * files)
        pairs = Pairs(data, tokenizer, max_length=1024, truncation_mode="keep_start")
        reader = SAEFeatures(str(folder / "sae"), "all").load()
        settings = HarvestSettings(shard_rows=PAIRS, batch_tokens=2048 if device == "cpu" else 8192)
        harvester = Harvester(model, reader, pairs, settings)
        quiet: Any = argparse.Namespace(update=lambda n: None)
        all_places = [np.arange(index * PAIRS, (index + 1) * PAIRS) for index in range(files)]
        # Random activations have no scale of their own: as many features are made active as an SAE has that was trained.
        example = harvester.layout(pairs.collated(all_places[0][:4]), harvester.config, pairs.tokens)
        before = reader._sae.process_sae_in(run(model, reader.hook_name, example)[0]) @ reader._sae.W_enc
        share = min(ACTIVE / size.features, 0.1)
        reader._sae.threshold.fill_(float(before.flatten()[:: max(1, before.numel() // 2**20)].quantile(1 - share)))

        def batches(places: np.ndarray, layout: Any) -> list[Any]:
            return [
                layout(pairs.collated(part), harvester.config, pairs.tokens)
                for part in pairs.batches(places, settings.batch_tokens)
            ]

        def bare(ready: list[Any]) -> None:
            for batch in ready:
                run(model, reader.hook_name, batch)

        @torch.no_grad()
        def as_dpo(ready: list[Any]) -> None:
            for batch in ready:
                model.model(use_cache=False, **{name: value.to(device) for name, value in batch.inputs.items()})

        seconds: dict[str, list[float]] = {"harvest": [], "bare": [], "DPO's": []}
        for index, places in enumerate([all_places[0], *all_places]):  # the first one warms up
            jobs: list[tuple[str, Callable[[], Any]]] = [
                ("harvest", partial(harvester._write_shard, folder, 0, places, quiet)),
                ("bare", partial(bare, batches(places, harvester.layout))),
                ("DPO's", partial(as_dpo, batches(places, separate))),
            ]
            for label, job in jobs if index % 2 else reversed(jobs):
                spent = _spent(job, device)
                if index:
                    seconds[label].append(spent)
                    print(f"file {index}: {label} {spent:.2f} s", flush=True)
        n_bytes = (folder / "shard-00000.parquet").stat().st_size / PAIRS
    ratio = lambda name: interval([a / b for a, b in zip(seconds["harvest"], seconds[name], strict=True)])  # noqa: E731
    return {
        "layout": harvester.layout.__name__,
        "pairs": PAIRS * files,
        "harvest, s": statistics.median(seconds["harvest"]),
        "bare, s": statistics.median(seconds["bare"]),
        "DPO's, s": statistics.median(seconds["DPO's"]),
        "over bare": ratio("bare"),
        "over DPO's": ratio("DPO's"),
        "bytes a pair": n_bytes,
    }


def _spent(job: Callable[[], Any], device: str) -> float:
    import torch

    clock = time.process_time if device == "cpu" else time.perf_counter
    started = clock()
    job()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - started


def write_cost(row: dict[str, Any], size: Size, device: str, out: Path) -> str:
    ratios = {name: "{:.3f} ({:.3f} to {:.3f})".format(*row[name]) for name in ("over bare", "over DPO's")}
    text = f"""\
Cost of a harvest: {size.layers} layers, hidden size {size.hidden}, hook after layer {size.layers // 2}, SAE of {size.features} features, {row["pairs"]} pairs of
about {size.prompt_tokens} + 2 x {size.completion_tokens} tokens in files of {PAIRS}; {device}. Medians over files; ratios with their 95 % interval.

| | s a file | harvest over it |
| --- | --- | --- |
| harvest | {row["harvest, s"]:.2f} | |
| the forward passes that it needs | {row["bare, s"]:.2f} | {ratios["over bare"]} |
| the reference's pass as DPO makes it | {row["DPO's, s"]:.2f} | {ratios["over DPO's"]} |

{row["bytes a pair"] / 1024:.1f} KiB a pair on disk.
"""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"harvest-cost-{device}.md").write_text(text)
    return text


# --- growth ------------------------------------------------------------------------------------------------------------------------


def measure_growth(n_rows: int, d_sae: int, folder: Path) -> dict[str, Any]:
    """One row of the table: makes the harvest, if it is not there, and audits it in a process of its own."""
    from benchmarks.synthetic_harvest import Synthetic

    harvest = Synthetic(n_rows, d_sae).write(folder / f"synthetic-{n_rows}-{d_sae}")
    command = [sys.executable, "-m", "benchmarks.harvest", "--audit", str(harvest.folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the audit of {n_rows} pairs failed:\n{done.stderr[-4000:]}")
    size = sum(path.stat().st_size for path in harvest.folder.glob("*.parquet"))
    return {"pairs": n_rows, "harvest, GB": size / 1e9, **json.loads(done.stdout.splitlines()[-1])}


def audit_alone(folder: Path) -> dict[str, Any]:
    """What `shapedpo audit` makes of a harvest, in this process; its time and the peak of its memory."""
    from shapedpo.audit import Harvest
    from shapedpo.audit.analysis.hypotheses import FILES
    from shapedpo.audit.folder import ANALYSIS, PAGE
    from shapedpo.audit.prediction.run import FILE
    from shapedpo.cli import build_parser
    from shapedpo.scripts.audit import run_analysis

    started, cpu = time.time(), time.process_time()
    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        named = ["--model", "lab", "--sae", "lab", "--dataset", "made-up"]
        run_analysis(build_parser().parse_args(["audit", *named, "--out", name]), Harvest.open(folder), {})
        moments = [(out / path).stat().st_mtime for path in (Path(ANALYSIS, FILES[-1]), Path(ANALYSIS, FILE), PAGE)]
        found = json.loads((out / ANALYSIS / FILES[-1]).read_text())["hypotheses"]
    minutes = np.diff([started, *moments]) / 60
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]
    return {
        "wall, min": (time.time() - started) / 60,
        **{f"{stage}, min": float(spent) for stage, spent in zip(STAGES, minutes, strict=True)},
        "CPU, min": (time.process_time() - cpu) / 60,
        "peak, GB": peak / 1e9,
        "hypotheses": len(found),
    }


def write_growth(rows: Sequence[dict[str, Any]], d_sae: int, out: Path) -> str:
    out.mkdir(parents=True, exist_ok=True)
    with (out / "harvest-growth.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    lines = [
        f"All that `shapedpo audit` does after the harvest, with made-up harvests of {d_sae} features (`benchmarks/synthetic_harvest.py`). CPU time is "
        "that of all threads; it is what the wall time would be on one idle core. The bound at 260,000 pairs: 30 minutes on two cores, 8 GB.",
        "",
        f"| pairs | harvest on disk, GB | wall time, min | {' | '.join(f'of it {stage}' for stage in STAGES)} | CPU time, min | peak memory, GB | hypotheses |",
        "| ---: |" + " ---: |" * 8,
    ]
    names = ("harvest, GB", "wall, min", *(f"{stage}, min" for stage in STAGES), "CPU, min", "peak, GB")
    for row in rows:
        figures = " | ".join(f"{row[name]:.2f}" for name in names)
        lines.append(f"| {row['pairs']:,} | {figures} | {row['hypotheses']} |")
    text = "\n".join(lines) + "\n"
    (out / "harvest-growth.md").write_text(text)
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["cost", "growth"], nargs="?")
    parser.add_argument("--quick", action="store_true", help="cost: a small model, to see that it runs")
    parser.add_argument("--files", type=int, default=12, help=f"cost: how many files of {PAIRS} pairs")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS), help="growth: numbers of pairs")
    parser.add_argument("--features", type=int, default=65_536, help="growth: features of the SAE")
    parser.add_argument("--folder", type=Path, help="growth: where harvests are kept (some 50 KB a pair)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--audit", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.audit:
        print(json.dumps(audit_alone(options.audit)))
    elif options.what == "cost":
        size = QUICK if options.quick else Size()
        print(write_cost(measure_cost(size, options.files, options.device), size, options.device, options.out))
    elif options.what == "growth":
        with tempfile.TemporaryDirectory() as temporary:
            rows = []
            for n_rows in options.rows:
                rows.append(measure_growth(n_rows, options.features, options.folder or Path(temporary)))
                print(rows[-1], flush=True)
                text = write_growth(sorted(rows, key=lambda row: row["pairs"]), options.features, options.out)
        print(text)
    else:
        parser.error("say what to measure: cost or growth")


if __name__ == "__main__":
    main()
