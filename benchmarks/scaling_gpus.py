"""The model of cost on GPUs: what a step of 8B and 70B models takes on 8 to 512 of them, and what shaping adds.

The counts are those of `benchmarks/scaling_model.py`. What one of each takes is assumed, from public sources, and where an assumption is open it is
the one under which TRL's step is short and shaping's part long.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.scaling_cases import COLUMNS
from benchmarks.scaling_model import gathered


@dataclass(frozen=True)
class Machine:
    """H100 SXM in nodes of eight.

    Attributes:
        bf16, tf32, fp32: Peak, FLOP/s, dense (NVIDIA H100 datasheet).
        mfu: Share of the bf16 peak that a training step reaches: the upper end of the 38 to 43 % that "The Llama 3 Herd of Models"
            (arXiv 2407.21783, table 4) reports.
        efficiency: Share of the peak that a large product outside the model reaches. Assumed.
        memory: Bytes/s (datasheet).
        nvlink: Bytes/s of a GPU one way inside a node (datasheet: 900 GB/s both ways).
        network: Bytes/s of a GPU to other nodes: one 400 Gb/s port each (DGX H100 user guide).
        operator: Seconds until an operator of eager PyTorch is under way. Assumed; shaping's are small and wait for nothing else.
        message, hop: Seconds of a small collective inside a node, and more for each doubling of the nodes. Assumed.
    """

    bf16: float = 989e12
    tf32: float = 495e12
    fp32: float = 67e12
    mfu: float = 0.43
    efficiency: float = 0.7
    memory: float = 3.35e12
    nvlink: float = 450e9
    network: float = 50e9
    operator: float = 10e-6
    message: float = 40e-6
    hop: float = 20e-6

    def latency(self, gpus: int) -> float:
        """Of a small collective."""
        return self.message + self.hop * math.log2(max(gpus / 8, 1))

    def bandwidth(self, gpus: int) -> float:
        return self.nvlink if gpus <= 8 else self.network


@dataclass(frozen=True)
class Model:
    """A model by its published configuration."""

    name: str
    layers: int
    hidden: int
    vocabulary: int
    parameters: float

    @property
    def matrices(self) -> float:
        """Parameters of the layers; the rest is the embedding and the head."""
        return self.parameters - 2 * self.vocabulary * self.hidden


MODELS = (
    Model("Llama-3.1-8B", 32, 4096, 128_256, 8.03e9),
    Model("Llama-3.1-70B", 80, 8192, 128_256, 70.55e9),
)
GPUS = (8, 16, 32, 64, 128, 256, 512)
PAIRS, TOKENS, COMPLETION = 2, 2048, 1536
"""A GPU's pairs of a step, and tokens of a completion with and without its prompt."""
WIDTH = 65_536
"""Of the SAE."""
LOGGING = 10
"""Steps between logs: the default."""
SETTINGS = (
    "16 concepts, watched or suppressed",
    "16 concepts, held",
    "16 concepts, all features watched",
    "the same with `tf32: true`",
)


def trl_seconds(model: Model, gpus: int, machine: Machine) -> tuple[float, float, float]:
    """TRL's step under ZeRO-3: seconds in all, of computing, and of exchanging, which are taken to overlap perfectly."""
    n, scored = 2 * PAIRS * TOKENS, 2 * PAIRS * COMPLETION
    attention = 2 * n * TOKENS * model.hidden * model.layers * 9 / 2  # causal: half the square
    flops = 2 * n * model.matrices * 4 + 2 * scored * model.hidden * model.vocabulary * 5 + attention
    computing = flops / (machine.bf16 * machine.mfu)
    # bf16: the policy is gathered for forward and backward, the reference once, and gradients are scattered.
    exchanging = 4 * 2 * model.parameters * (1 - 1 / gpus) / machine.bandwidth(gpus)
    return max(computing, exchanging), computing, exchanging


def shaping_seconds(
    model: Model, setting: str, gpus: int, machine: Machine, host: dict[str, float]
) -> dict[str, float]:
    """What shaping adds to a step, part by part, seconds.

    Args:
        model: The model.
        setting: One of [`SETTINGS`].
        gpus: How many.
        machine: What one of everything takes.
        host: Operators of a step and of a concept, seconds of the host for the hold controller and for a log, as measured here.
    """
    concepts, n = (
        16,
        2 * PAIRS * TOKENS,
    )  # on a GPU all positions are read: to count the completions' would make the host wait
    everything = setting not in SETTINGS[:2]
    operators = host["operators of a step"] + concepts * host["operators of a concept"]
    operators += host["operators of the monitor"] * everything
    # Each concept gathers its tokens (read and written in bf16), which become float32 and are multiplied by a few columns.
    moved = concepts * n * model.hidden * (2 + 2 + 4 + 4)
    product = 2 * n * model.hidden * (COLUMNS * concepts) / (machine.fp32 * machine.efficiency)
    if everything:
        peak = machine.tf32 if "tf32" in setting else machine.fp32  # PyTorch leaves tf32 off
        product += 2 * n * model.hidden * WIDTH / (peak * machine.efficiency)
        moved += n * WIDTH * 4 * 2 + WIDTH * 12 * 4 * 2
    messages = 1 + (setting == SETTINGS[1])
    logged = 2 + (1 + len(gathered(WIDTH))) * everything
    sent = (6 * WIDTH * 4 * (2 + gpus)) * everything  # a sum of the windows, and everyone's table of top pairs
    log = (
        host["log"]
        + host["monitor's log"] * everything
        + logged * machine.latency(gpus)
        + sent / machine.bandwidth(gpus)
    )
    return {
        "operators": operators * machine.operator,
        "products": product,
        "memory": moved / machine.memory,
        "messages": messages * machine.latency(gpus),
        "hold": host["hold"] * (setting == SETTINGS[1]),
        "log": log / LOGGING,
    }


def evaluate(host: dict[str, float], machine: Machine | None = None) -> list[dict[str, Any]]:
    """All models, settings and numbers of GPUs, a row each."""
    machine = machine or Machine()
    rows = []
    for model in MODELS:
        for gpus in GPUS:
            step, computing, exchanging = trl_seconds(model, gpus, machine)
            for setting in SETTINGS:
                parts = shaping_seconds(model, setting, gpus, machine, host)
                extra = sum(parts.values())
                tokens = 2 * PAIRS * TOKENS * gpus
                rows.append(
                    {
                        "model": model.name,
                        "GPUs": gpus,
                        "setting": setting,
                        "TRL, s": step,
                        "computing, s": computing,
                        "exchanging, s": exchanging,
                        **{f"{name}, ms": 1e3 * value for name, value in parts.items()},
                        "added, ms": 1e3 * extra,
                        "overhead, %": 100 * extra / step,
                        "TRL, tokens/s": tokens / step,
                        "shaped, tokens/s": tokens / (step + extra),
                    }
                )
    return rows


def host_costs(rows: Sequence[dict[str, Any]], shaping: dict[str, float]) -> dict[str, float]:
    """What does not depend on the GPU, from what was measured: numbers of operators, and the host's own work.

    Args:
        rows: Measured cases.
        shaping: Milliseconds of each term of shaping.
    """
    some = [row for row in rows if row["action"] in ("watch", "suppress")]  # the controller's operators are the host's
    step, concept, monitor = _linear(some, "extra operators")
    log, log_concept, log_monitor = _linear(rows, "a log, ms")
    return {
        "operators of a step": step,
        "operators of a concept": concept,
        "operators of the monitor": monitor,
        "hold": 1e-3 * (shaping.get("hold", 0.0) + 16 * shaping.get("held concept", 0.0)),
        "log": 1e-3 * (log + 16 * log_concept),
        "monitor's log": 1e-3 * log_monitor,
    }


def _linear(rows: Sequence[dict[str, Any]], name: str) -> list[float]:
    """How much of a column is every case's, each concept's, and the monitor's: least squares."""
    table = [[1.0, row["concepts"], float(row["monitor"])] for row in rows]
    return np.linalg.lstsq(np.array(table), np.array([row[name] for row in rows], float), rcond=None)[0].tolist()
