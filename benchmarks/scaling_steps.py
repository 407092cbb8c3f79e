"""The steps that `benchmarks/scaling.py` measures, in every process of a launch.

    LAUNCHER benchmarks/scaling_steps.py JOBS.json

One trainer takes plain and shaped steps in turns (A B B A A B B A ...), so that whatever else the machine does hits both alike, and a GPU need
not hold two models. In a plain step the loss is `DPOTrainer`'s own code, called on the same model and batch. Measured are whole steps of
either kind (wall time, and CPU time of the process), and within the shaped ones the time that shapedpo's own code takes, section by section: what
TRL does inside it is left out. Counted, in one step of each kind and in one that is logged, are floating-point operations (by
`torch.utils.flop_counter`), operators, and every message handed to `torch.distributed` with its bytes.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch


os.environ |= {"TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

import torch
from trl import DPOTrainer

from benchmarks.overhead import Size, build, train_on
from benchmarks.scaling_cases import COLUMNS, Case
from benchmarks.scaling_turns import LOGGING, WARM_UP, Sections, Turns
from shapedpo import Concept, Regex, SAEFeatures, ShapedDPOTrainer, shaping
from shapedpo.collator import split_batch


WINDOW = 512
"""Pairs that the hold controller has seen before the first step, so that it solves at its full size."""


def size_of(case: Case, steps: int) -> Size:
    """The case in the words of `benchmarks/overhead.py`."""
    heads, prompt = max(case.hidden // 64, 2), case.tokens - case.completion
    return Size(
        case.layers, case.hidden, heads, case.vocabulary, case.features, case.pairs, prompt, case.completion, steps
    )


def make_concepts(case: Case, sae: Path) -> list[Concept]:
    """The concepts of a case: each a few features of its own, or a pattern of its own."""
    method = {"method": "project"} if case.action == "project" else {}
    action = case.action if case.action in ("watch", "hold") else "suppress"
    strength = {"strength": 1.0} if case.action in ("suppress", "text") else {}
    concepts = []
    for index in range(case.concepts):
        features = [(COLUMNS * index + column) * 7 % case.features for column in range(COLUMNS)]
        readout = Regex(rf"\bw\d*{index % 10}\b") if case.action == "text" else SAEFeatures(str(sae), features)
        concepts.append(Concept(f"concept {index}", readout, action=action, **strength, **method))
    return concepts


# --- the trainer ----------------------------------------------------------------------------------------------------


class _TRL(DPOTrainer):
    """What TRL does for the shaped trainer; stands between the two."""

    sections: Sections

    def _compute_loss(self, *args: Any) -> Any:
        return self.sections.timed(None, super()._compute_loss)(*args)

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
        return self.sections.timed(None, super().compute_ref_log_probs)(model, inputs)


class MeasuredTrainer(ShapedDPOTrainer, _TRL):
    """The shaped trainer, which says how long its own part of a step takes, and leaves it out when told to.

    Attributes:
        plain: Whether the step is to be TRL's.
        sections: Where the time went.
    """

    plain = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.sections = sections = Sections()
        super().__init__(*args, **kwargs)
        monitor, capture = self._monitor, self._reader.capture
        assert monitor is not None

        def timed_capture(*args: Any) -> Any:
            found = capture(*args)
            found._read = sections.timed("read", found._read)
            return found

        collator: Any = self.data_collator
        collator.inner = sections.timed(None, collator.inner)
        self.data_collator = sections.timed("collate", collator)
        self._reader.capture = timed_capture  # type: ignore[method-assign]
        monitor.update = sections.timed("monitor", monitor.update)  # type: ignore[method-assign]
        timed_log = sections.timed("log", monitor.on_log)
        monitor.on_log = lambda *args, **kwargs: None if self.plain else timed_log(*args, **kwargs)  # type: ignore[method-assign]
        self._shaping.observe = sections.timed("hold", self._shaping.observe)  # type: ignore[method-assign]
        for name in ("gather", "reduce"):
            setattr(self.accelerator, name, sections.timed("messages", getattr(self.accelerator, name), inside=True))

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        if self.plain:
            return DPOTrainer._compute_loss(self, model, split_batch(inputs)[1], return_outputs)
        return self.sections.timed("shaping", super()._compute_loss)(model, inputs, return_outputs)

    def _policy(self, model: Any, batch: Any) -> Callable[..., Any]:
        return self.sections.timed("shaping", super()._policy(self.sections.timed(None, model), batch))


# --- a case ------------------------------------------------------------------------------------------------------------------------


def held_bytes(trainer: Any) -> int:
    """What the reading of a trainer keeps: weights of readers, and the monitor's state."""
    monitor, readers = trainer._monitor, [*trainer._reader.readers, trainer._reader.monitored]
    tensors = [tensor for reader in readers if hasattr(reader, "_sae") for tensor in reader._sae.parameters()]
    for one in [monitor, *([monitor.features] if monitor.features is not None else [])]:
        tensors += [one.window.sums, one.window.squares, one.pairs.table]
    held = {tensor.data_ptr(): tensor for tensor in tensors}  # readers of one SAE share what they can
    return sum(tensor.numel() * tensor.element_size() for tensor in held.values())


def measure(case: Case, folder: Path, device: str, steps: int) -> dict[str, Any]:
    """Plain and shaped steps in turns, on the same kind of batches.

    Args:
        case: What is trained.
        folder: Where [`build`] has written.
        device: `cpu` or `cuda`.
        steps: How many are measured, of both kinds together.
    """
    settings: dict[str, Any] = {"logging_steps": LOGGING, "calibration_size": 16, "max_length": None}
    if case.monitor:
        settings |= {"monitor": "all", "monitor_sae": str(folder / "sae")}
    concepts = make_concepts(case, folder / "sae")
    with tempfile.TemporaryDirectory() as output:
        size = size_of(case, steps + WARM_UP)
        trainer = train_on(folder, size, device, Path(output), concepts, MeasuredTrainer, **settings)
        if trainer._shaping.hold is not None:
            fill_window(trainer._shaping.hold, case.concepts)
        turns = Turns(trainer, device)
        trainer.add_callback(turns)
        with patch.object(shaping, "project_pairs", trainer.sections.timed("shaping", shaping.project_pairs)):
            trainer.train()
        model = trainer.accelerator.unwrap_model(trainer.model)
        return {
            "case": case.fields,
            "device": device,
            "processes": trainer.accelerator.num_processes,
            "launched": trainer.accelerator.distributed_type.value,
            "parameters": sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters()),
            "turns": turns.turns,
            "logs": turns.logs,
            "counts": turns.counts,
            "held_bytes": held_bytes(trainer),
            "torch": torch.__version__,
            "machine": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        }


def fill_window(hold: Any, concepts: int) -> None:
    """Lets a hold controller have seen many pairs before the first step, so that it solves at its full size."""
    start, draw = hold.start, torch.Generator().manual_seed(0)

    def start_full(*args: torch.Tensor) -> None:
        start(*args)
        hold.observe(torch.randn(WINDOW, generator=draw), torch.randn(WINDOW, concepts, generator=draw))

    hold.start = start_full


def run(jobs: dict[str, Any]) -> Iterator[Path]:
    """Measures the cases of a launch that are not in the cache; yields each one's file."""
    cache, device = Path(jobs["cache"]), jobs["device"]
    rank = int(os.environ.get("RANK", "0"))
    for fields in jobs["cases"]:
        case = Case(**fields)
        path, folder = cache / jobs["launch"] / f"{case.key}.json", cache / "models" / case.key
        if rank == 0 and not (folder / "done").exists():
            build(folder, size_of(case, jobs["steps"]))
            (folder / "done").touch()
        while not (folder / "done").exists():
            time.sleep(0.1)
        found = {"launch": jobs["launch"], **measure(case, folder, device, jobs["steps"])}
        if rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(found))
            partial.replace(path)
        yield path


def main() -> None:
    jobs = json.loads(Path(sys.argv[1]).read_text())
    if jobs["device"] == "cpu":
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if "zero3" in jobs["launch"]:
        import deepspeed

        # `zero.Init` of the reference model asks for the world's size before the trainer has set it up.
        deepspeed.init_distributed("gloo" if jobs["device"] == "cpu" else "nccl")
    for path in run(jobs):
        if int(os.environ.get("RANK", "0")) == 0:
            print(path, flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
