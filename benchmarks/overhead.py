"""What a step of `ShapedDPOTrainer` costs over a step of `DPOTrainer`, in time and in memory.

    python benchmarks/overhead.py [--quick] [--device cuda] [--variants "16 features" ...] [--out FOLDER]

**Time.** For each variant, both trainers run `train()` in one process, each in its own thread, on the same batches in the same
order. They take turns step by step (A B B A A B B A ...), one of them at a time, so that whatever else the machine does hits both alike.
A turn is a whole step: batch, forward passes, backward pass, optimiser, logging. The table gives the median over turns of the
ratio between neighbouring turns and its 95 % interval (order statistics; no assumption on the noise), of wall time and, on a
CPU, of the CPU time that the process used, which other processes disturb less.

**Memory.** Each variant trains alone in a process of its own: the peak of its resident memory, or of what torch allocated on a GPU.

The model is a Llama with the shape of GPT-2 small (12 layers, hidden size 768) and random weights; the SAE has 16,384 JumpReLU features and
random weights. `--quick` shrinks all of it to check that the benchmark runs; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Size:
    """The model, the SAE and the batches; tokens are counted a completion."""

    layers: int = 12
    hidden: int = 768
    heads: int = 12
    vocabulary: int = 8192
    features: int = 16_384
    pairs: int = 2
    prompt_tokens: int = 32
    completion_tokens: int = 96
    steps: int = 24


QUICK = Size(2, 32, 4, 256, 64, 2, 8, 16, 6)
WARM_UP = 3  # steps left out: the first allocate buffers and optimiser state
VARIANTS = (
    "no concepts",
    "16 features",
    "all features",
    "16 features, reward",
    "16 features, pair projection",
    "monitor all features",
)
RESULTS = Path(__file__).parent / "results"


# --- the set-up --------------------------------------------------------------------------------------------------------------------


def build(folder: Path, size: Size) -> None:
    """Writes a random model with a tokenizer of whole words, and a random JumpReLU SAE for its middle layer."""
    import torch
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
    from sae_lens.saes.sae import SAEMetadata
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    words = {"<s>": 0, "</s>": 1, "<unk>": 2} | {f"w{index}": index for index in range(3, size.vocabulary)}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=4 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")

    metadata = SAEMetadata(model_name="benchmark", hook_name=f"blocks.{size.layers // 2}.hook_resid_post")
    sae = JumpReLUSAE(
        JumpReLUSAEConfig(d_in=size.hidden, d_sae=size.features, dtype="float32", device="cpu", metadata=metadata)
    )
    with torch.no_grad():
        sae.W_enc.normal_(std=size.hidden**-0.5)
        sae.W_dec.copy_(torch.nn.functional.normalize(sae.W_enc.T, dim=1))
        sae.threshold.fill_(0.02)
    sae.save_model(folder / "sae")


def pairs(size: Size, processes: int = 1, seed: int = 0) -> Any:
    """Random pairs, one step's batch after another, of one length: padding would add noise."""
    from datasets import Dataset

    draw = random.Random(seed)

    def text(tokens: int) -> str:
        return " ".join(f"w{draw.randrange(3, size.vocabulary)}" for _ in range(tokens))

    row = lambda: {  # noqa: E731
        "prompt": text(size.prompt_tokens) + " ",
        "chosen": text(size.completion_tokens - 1) + " ",  # TRL adds EOS
        "rejected": text(size.completion_tokens - 1) + " ",
    }
    return Dataset.from_list([row() for _ in range(size.pairs * size.steps * processes)])


def concepts(variant: str, folder: Path, size: Size) -> list[Any]:
    """The concepts of one of [`VARIANTS`]."""
    from shapedpo import Concept, SAEFeatures

    sae = str(folder / "sae")
    some = [index * size.features // 16 for index in range(16)]
    return {
        "no concepts": lambda: [],
        "monitor all features": lambda: [],
        "16 features": lambda: [Concept("some", SAEFeatures(sae, some))],
        "all features": lambda: [Concept("all", SAEFeatures(sae, "all"))],
        "16 features, reward": lambda: [Concept("some", SAEFeatures(sae, some), action="suppress", strength=1.0)],
        "16 features, pair projection": lambda: [
            Concept("some", SAEFeatures(sae, some), action="suppress", method="project")
        ],
    }[variant]()


def make_trainer(variant: str | None, folder: Path, size: Size, device: str, output: Path) -> Any:
    """A trainer of a variant, or TRL's for `None`."""
    if variant is None:
        return train_on(folder, size, device, output)
    chosen = concepts(variant, folder, size)
    if variant != "monitor all features":
        return train_on(folder, size, device, output, concepts=chosen)
    return train_on(folder, size, device, output, concepts=chosen, monitor="all", monitor_sae=str(folder / "sae"))


def train_on(
    folder: Path,
    size: Size,
    device: str,
    output: Path,
    concepts: list[Any] | None = None,
    trainer_class: Any = None,
    **settings: Any,
) -> Any:
    """A trainer on what [`build`] wrote.

    Args:
        folder: Where it was written.
        size: The batches and how many.
        device: `cpu` or `cuda`.
        output: For what the trainer writes.
        concepts: The concepts, or `None` for TRL's own trainer.
        trainer_class: In place of `ShapedDPOTrainer` or `DPOTrainer`.
        **settings: Further arguments of the run.
    """
    from transformers import PrinterCallback
    from trl import DPOConfig, DPOTrainer

    from shapedpo import ShapedDPOConfig, ShapedDPOTrainer

    args = (DPOConfig if concepts is None else ShapedDPOConfig)(
        **{
            "output_dir": str(output),
            "per_device_train_batch_size": size.pairs,
            "max_steps": size.steps,
            "learning_rate": 1e-6,
            "gradient_checkpointing": False,  # it would add the same to both and so flatter the ratio
            "bf16": device == "cuda",
            "use_cpu": device == "cpu",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            **settings,
        }
    )
    chosen = {} if concepts is None else {"concepts": concepts}
    trainer_class = trainer_class or (DPOTrainer if concepts is None else ShapedDPOTrainer)
    rows = pairs(size, args.world_size)
    trainer = trainer_class(model=str(folder / "model"), args=args, train_dataset=rows, **chosen)
    trainer.remove_callback(PrinterCallback)
    return trainer


# --- time --------------------------------------------------------------------------------------------------------------------------


class Turns:
    """Lets threads run one at a time, in the order of a schedule, and times each turn.

    Args:
        schedule: Whose turn it is, turn after turn.
        device: `cuda` waits for the device at the end of a turn.
    """

    def __init__(self, schedule: Sequence[int], device: str) -> None:
        self._schedule = list(schedule)
        self._device = device
        self._turn = 0
        self._change = threading.Condition()
        self._holder: int | None = None  # the other thread may come for its first turn while this one has its own
        self._started = (0.0, 0.0)
        self.seconds: list[list[tuple[float, float]]] = [[], []]  # (wall, CPU) by thread
        self.failed = False

    def take(self, who: int) -> None:
        """Ends the turn that this thread has, if it has one, and waits for its next one."""
        self.end(who)
        with self._change:
            self._change.wait_for(lambda: self.failed or self._schedule[self._turn : self._turn + 1] == [who])
            if self.failed:
                raise RuntimeError("the other trainer failed")
            self._holder = who
            self._started = self._now()

    def end(self, who: int) -> None:
        """Ends the turn of this thread, if it has one."""
        with self._change:
            if self._holder != who:
                return
            wall, cpu = (now - then for now, then in zip(self._now(), self._started, strict=True))
            self.seconds[who].append((wall, cpu))
            self._holder = None
            self._turn += 1
            self._change.notify_all()

    def fail(self) -> None:
        with self._change:
            self.failed = True
            self._change.notify_all()

    def _now(self) -> tuple[float, float]:
        if self._device == "cuda":
            import torch

            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()


def interleave(trainers: Sequence[Any], steps: int, device: str) -> Turns:
    """Trains two trainers in turns, step by step."""
    from transformers import TrainerCallback

    turns = Turns(([0, 1, 1, 0] * steps)[: 2 * steps], device)

    class TakeTurns(TrainerCallback):
        def __init__(self, who: int) -> None:
            self.who = who

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            turns.take(self.who)

        def on_train_end(self, *_: Any, **__: Any) -> None:
            turns.end(self.who)

    errors: list[BaseException] = []

    def train(who: int) -> None:
        try:
            trainers[who].train()
        except BaseException as error:
            errors.append(error)
            turns.fail()

    for who, trainer in enumerate(trainers):
        trainer.add_callback(TakeTurns(who))
    threads = [threading.Thread(target=train, args=(who,)) for who in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return turns


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, and the order statistics that enclose the true median with 95 % probability."""
    ordered, n = sorted(values), len(values)
    below, rank = 0.0, 0
    while rank < n // 2 and (below := below + math.comb(n, rank) / 2**n) <= 0.025:
        rank += 1
    low = max(rank - 1, 0)
    return statistics.median(ordered), ordered[low], ordered[n - 1 - low]


def measure_time(variant: str, folder: Path, size: Size, device: str) -> dict[str, Any]:
    """One row of the table of times."""
    with tempfile.TemporaryDirectory() as output:
        trainers = [make_trainer(name, folder, size, device, Path(output)) for name in (None, variant)]
        turns = interleave(trainers, size.steps, device)
    plain, shaped = (seconds[WARM_UP:] for seconds in turns.seconds)
    row: dict[str, Any] = {"variant": variant, "steps": len(plain)}
    row["TRL, s"] = statistics.median(wall for wall, _ in plain)
    row["shaped, s"] = statistics.median(wall for wall, _ in shaped)
    for index, kind in enumerate(("wall", "CPU")):
        if kind == "CPU" and device == "cuda":
            continue
        ratios = [b[index] / a[index] for a, b in zip(plain, shaped, strict=True)]
        row |= dict(zip((f"{kind} ratio", f"{kind} low", f"{kind} high"), interval(ratios), strict=True))
    if all(not concept.shapes for concept in trainers[1].concepts):  # then it must be TRL's run, bit for bit
        losses = [[log["loss"] for log in trainer.state.log_history if "loss" in log] for trainer in trainers]
        row["same losses"] = "yes" if losses[0] == losses[1] else "NO"
    else:
        row["same losses"] = "-"
    return row


# --- memory ------------------------------------------------------------------------------------------------------------------------


def peak_memory(variant: str | None, folder: Path, size: Size, device: str) -> float:
    """Trains in this process and returns its peak memory in MiB. It never falls again: one call a process."""
    with tempfile.TemporaryDirectory() as output:
        make_trainer(variant, folder, size, device, Path(output)).train()
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    if (status := Path("/proc/self/status")).exists():
        # Not `ru_maxrss`: on Linux a process inherits that peak from the one that started it.
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def measure_memory(variant: str | None, folder: Path, size: Size, device: str) -> float:
    """[`peak_memory`] in a new process."""
    command = [sys.executable, __file__, "--peak-memory", variant or "", str(folder), json.dumps(asdict(size)), device]
    # glibc otherwise learns to keep freed tensors, and how many it keeps is chance: a noise of some per cent.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if process.returncode:
        raise RuntimeError(f"the memory run of {variant!r} failed:\n{process.stderr[-4000:]}")
    return float(process.stdout.split()[-1])


# --- the table ---------------------------------------------------------------------------------------------------------------------


def run(variants: Sequence[str], size: Size, device: str, memory: bool = True) -> Iterator[dict[str, Any]]:
    """Measures each variant; yields a row of the table as soon as it is known."""
    os.environ |= {"TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(folder, size)
        short = Size(**(asdict(size) | {"steps": WARM_UP}))
        base = measure_memory(None, folder, short, device) if memory else math.nan
        for variant in variants:
            row = measure_time(variant, folder, size, device)
            if memory:
                peak = measure_memory(variant, folder, short, device)
                row |= {"TRL, MiB": base, "shaped, MiB": peak, "memory ratio": peak / base}
            yield row


def write(rows: Sequence[dict[str, Any]], out: Path, device: str, size: Size) -> str:
    """Writes `overhead-<device>.csv` and `.md` into `out`; returns the Markdown."""
    import torch

    out.mkdir(parents=True, exist_ok=True)
    with (out / f"overhead-{device}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    lines = [
        f"Overhead of `ShapedDPOTrainer` over `DPOTrainer`: {size.layers} layers, hidden size {size.hidden}, {size.pairs} pairs of "
        f"{size.prompt_tokens} + {size.completion_tokens} tokens a step, SAE of {size.features} features; {where}, torch "
        f"{torch.__version__}. Ratios are medians with their 95 % interval.",
        "",
        "| variant | TRL, s | shaped, s | wall time | CPU time | peak memory | same losses |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        ratios = [
            f"{row[f'{kind} ratio']:.3f} ({row[f'{kind} low']:.3f} to {row[f'{kind} high']:.3f})"
            if f"{kind} ratio" in row
            else "-"
            for kind in ("wall", "CPU")
        ]
        peak = f"{row['memory ratio']:.3f} ({row['shaped, MiB']:.0f} MiB)" if "memory ratio" in row else "-"
        cells = [row["variant"], f"{row['TRL, s']:.3f}", f"{row['shaped, s']:.3f}", *ratios, peak, row["same losses"]]
        lines.append("| " + " | ".join(cells) + " |")
    text = "\n".join(lines) + "\n"
    (out / f"overhead-{device}.md").write_text(text)
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small model and few steps, to see that it runs")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--steps", type=int, help="steps of each trainer")
    parser.add_argument("--pairs", type=int, help="pairs a step")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    changes = {name: getattr(options, name) for name in ("steps", "pairs") if getattr(options, name) is not None}
    size = Size(**(asdict(QUICK if options.quick else Size()) | changes))
    rows = []
    for row in run(options.variants, size, options.device, memory=not options.no_memory):
        rows.append(row)
        print({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
    print(write(rows, options.out, options.device, size))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak-memory"]:
        name, folder_name, fields, device_name = sys.argv[2:]
        print(peak_memory(name or None, Path(folder_name), Size(**json.loads(fields)), device_name))
    else:
        main()
