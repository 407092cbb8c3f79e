"""Where the time of a training step goes, and what is counted in it: for `benchmarks/scaling_steps.py`."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from transformers import TrainerCallback


class Sections:
    """Gives each stretch of a thread's time to the innermost section that is open: seconds of CPU and of wall time.

    Attributes:
        spent: By section.
        synchronised: Whether to wait for the GPU wherever a section begins or ends, so that its work counts for the section that gave it.
    """

    synchronised = False

    def __init__(self) -> None:
        self._open: list[str | None] = [None]
        self._since = self._now()
        self.spent: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def timed(self, section: str | None, function: Callable[..., Any], inside: bool = False) -> Callable[..., Any]:
        """The function, its time a section's; `None` is for what TRL does.

        Args:
            section: Its name.
            function: Any.
            inside: Whether it counts only where it is called from another section.
        """

        def run(*args: Any, **kwargs: Any) -> Any:
            if inside and self._open[-1] is None:
                return function(*args, **kwargs)
            self._switch()
            self._open.append(section)
            try:
                return function(*args, **kwargs)
            finally:
                self._switch()
                self._open.pop()

        return run

    def _switch(self) -> None:
        now = self._now()
        if (section := self._open[-1]) is not None:
            for kind, (before, after) in enumerate(zip(self._since, now, strict=True)):
                self.spent[section][kind] += after - before
        self._since = now

    def _now(self) -> tuple[float, float]:
        if self.synchronised:
            torch.cuda.synchronize()
        return time.process_time(), time.perf_counter()


def _like(known: Any) -> Callable[..., int]:
    """Counts an operator as the counter does one that it knows."""

    def count(*args: Any, **kwargs: Any) -> int:
        return flop_registry[known](*args, **kwargs)

    count._get_raw = True  # type: ignore[attr-defined]
    return count


ATEN = torch.ops.aten
# What the counter does not know: the products that TRL's fused head accumulates in place, and a CPU's attention.
FLOPS = {
    ATEN.addmm_: _like(ATEN.addmm),
    ATEN._scaled_dot_product_flash_attention_for_cpu: _like(ATEN._scaled_dot_product_flash_attention),
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _like(ATEN._scaled_dot_product_flash_attention_backward),
}


class Messages(TorchDispatchMode):
    """Counts operators (views left out), and the messages of this process with the bytes that it hands in."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = 0
        self.messages: dict[str, list[int]] = defaultdict(lambda: [0, 0])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            # What comes out stands first, except where it is the input too.
            given = args[0] if func._opname in ("allreduce_", "broadcast_", "reduce_", "barrier") else args[1]
            sizes = [
                leaf.numel() * leaf.element_size() for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor)
            ]
            entry = self.messages[func._opname.strip("_")]
            entry[0] += 1
            entry[1] += sum(sizes)
        elif not any(value.alias_info and not value.alias_info.is_write for value in func._schema.returns):
            self.operators += 1
        return func(*args, **(kwargs or {}))


COUNTED = {2: "plain", 3: "shaped", 5: "shaped, logged", 11: "plain, logged"}
"""Steps that are counted, and so not measured: not the first ones, in which ZeRO-3 learns the order of the modules. The last two are logged."""
WARM_UP = 6
LOGGING = 6
"""Steps between logs."""


class Turns(TrainerCallback):
    """Tells a trainer which kind of step is next; takes its time, or counts it.

    Attributes:
        turns: Of each measured step: whether it was plain; on a GPU, whether it waited between sections, as every other shaped one does;
            its wall and CPU time; the sections' times; how fast the machine was; and how many bytes a GPU held at most above what it held when the step
            began.
        logs: CPU and wall time of the monitor at each log.
        counts: By kind of step.
    """

    def __init__(self, trainer: Any, device: str) -> None:
        self.trainer, self.cuda = trainer, device == "cuda"
        self.turns: list[dict[str, Any]] = []
        self.logs: list[list[float]] = []
        self.counts: dict[str, dict[str, Any]] = {}
        self._begun: tuple[float, float] | None = None
        self._flops: Any = None
        self._held = 0
        self._a, self._b, self._c = torch.randn(256, 256), torch.randn(256, 1024), torch.randn(2**20)

    def on_step_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        self._end()
        step = state.global_step
        kind, self._logged = COUNTED.get(step), (step + 1) % LOGGING == 0
        self.trainer.plain = (step - WARM_UP) % 4 in (0, 3) and not self._logged
        if kind is not None:
            self.trainer.plain = kind.startswith("plain")
        if step in COUNTED:
            self._kind, self._open = COUNTED[step], ExitStack()
            self._flops = self._open.enter_context(FlopCounterMode(display=False, custom_mapping=FLOPS))
            self._messages = self._open.enter_context(Messages())
        elif step >= WARM_UP:
            self._pace = self.pace()
            self.trainer.sections.synchronised = self.cuda and (step - WARM_UP) % 4 == 1
            self.trainer.sections.spent.clear()
            if self.cuda:
                torch.cuda.reset_peak_memory_stats()
                self._held = torch.cuda.memory_allocated()
            self._begun = self._now()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._end()

    def _end(self) -> None:
        if self._flops is not None:
            self._open.close()
            found = {"flops": self._flops.get_total_flops(), "operators": self._messages.operators}
            self.counts[self._kind] = {**found, "messages": dict(self._messages.messages)}
            self._flops = None
        if self._begun is None:
            return
        wall, cpu = (now - then for now, then in zip(self._now(), self._begun, strict=True))
        self._begun = None
        spent = {name: list(times) for name, times in self.trainer.sections.spent.items()}
        log = spent.pop("log", None)
        if self._logged:  # not a step like the others
            self.logs += [log] if log is not None else []
            return
        peak = torch.cuda.max_memory_allocated() - self._held if self.cuda else None
        turn = {
            "plain": self.trainer.plain,
            "synchronised": self.trainer.sections.synchronised,
            "wall": wall,
            "cpu": cpu,
            "sections": spent,
            "pace": self._pace,
            "peak": peak,
        }
        self.turns.append(turn)

    def pace(self) -> float:
        """A fixed piece of work of the host, timed: how fast the machine is just now. Milliseconds of CPU."""
        start = time.process_time()
        for _ in range(2):
            self._a @ self._b
            self._c + 1
        return 1e3 * (time.process_time() - start)

    def _now(self) -> tuple[float, float]:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()
