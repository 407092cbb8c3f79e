"""What `benchmarks/scaling.py` measures: the cases, and which of them the model of cost may learn from."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from typing import Any


LAUNCHES = ["ddp1", "ddp2", "zero2-1", "zero2-2", "zero3-1", "zero3-2"]
"""Named for what runs the processes and how many they are; with GPUs also `ddp8` and the like."""
COLUMNS = 4
"""Features that a concept reads."""


@dataclass(frozen=True)
class Case:
    """What is trained, a process.

    Attributes:
        hidden, layers, vocabulary: The model's.
        tokens: Of a completion with its prompt, a quarter of it.
        pairs: Of a step.
        features: Width of the SAE.
        concepts: How many.
        action: `watch`, `suppress` (reward shaping), `hold`, `project` (pair space), or `text`: regular expressions that suppress.
        monitor: Whether all features of the SAE are watched.
    """

    hidden: int = 192
    tokens: int = 96
    features: int = 1024
    concepts: int = 4
    action: str = "suppress"
    monitor: bool = False
    layers: int = 2
    vocabulary: int = 2048
    pairs: int = 2

    @property
    def key(self) -> str:
        return "-".join(
            f"{name[:3]}{int(value) if isinstance(value, bool) else value}" for name, value in self.fields.items()
        )

    @property
    def fields(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def completion(self) -> int:
        """Tokens of a completion without its prompt."""
        return self.tokens - self.tokens // 4


BASES = {
    "quick": Case(hidden=64, tokens=32, features=256, vocabulary=512),
    "cpu": Case(),
    "cuda": Case(hidden=1536, tokens=512, features=16_384, layers=8, vocabulary=32_768, pairs=8),
}


def split_launch(launch: str) -> tuple[str, int]:
    """`ddp`, `zero2` or `zero3`, and the number of processes.

    Raises:
        ValueError: If the name is not that of a launch.
    """
    found = re.fullmatch(r"(ddp|zero[23](?=-))-?([1-9]\d*)", launch)
    if found is None:
        raise ValueError(
            f"Unknown launch {launch!r}. Name one as {', '.join(LAUNCHES)}, the number being that of processes."
        )
    return found[1], int(found[2])


def cases(scale: str, launch: str) -> list[Case]:
    """The cases of a launch, one quantity varied at a time, and then those that are held out."""
    return fitted(scale, launch) + held_out(scale, launch)


def fitted(scale: str, launch: str) -> list[Case]:
    """What the model of cost is fitted on."""
    base = BASES[scale]
    h, t, f = base.hidden, base.tokens, base.features
    main = [
        base,
        replace(base, hidden=2 * h),
        replace(base, concepts=16),
        replace(base, monitor=True, features=8 * f),
        replace(base, action="hold"),
        replace(base, layers=2 * base.layers),
    ]
    if scale == "quick":
        return [base, main[3], main[4]]
    more = [
        replace(base, hidden=h // 3 if scale == "cpu" else h // 2),
        replace(base, tokens=t // 2),
        replace(base, tokens=2 * t),
        replace(base, concepts=1),
        replace(base, concepts=32),
        replace(base, monitor=True),
        replace(base, monitor=True, features=2 * f, tokens=2 * t),
        replace(base, monitor=True, features=16 * f),
        replace(base, action="watch"),
        replace(base, action="project", concepts=1),
        replace(base, action="text"),
        replace(base, action="hold", concepts=1),
    ]
    return main + (more if launch.startswith("ddp") else [])


def held_out(scale: str, launch: str) -> list[Case]:
    """What it is tried on: several quantities changed at once, among them some that it has not seen change."""
    base = BASES[scale]
    h, t, f = base.hidden, base.tokens, base.features
    if scale == "quick":
        return [replace(base, concepts=8, tokens=2 * t)]
    main = [
        replace(base, hidden=4 * h // 3, tokens=3 * t // 2, concepts=8),
        replace(base, hidden=2 * h // 3, concepts=2, action="hold", monitor=True, features=4 * f),
        replace(base, layers=2 * base.layers, concepts=24, action="watch"),
    ]
    more = [
        replace(base, hidden=3 * h // 2, tokens=t // 2, concepts=12, monitor=True, features=4 * f),
        replace(base, tokens=3 * t, concepts=2, monitor=True, features=8 * f, action="watch"),
        replace(base, hidden=3 * h // 2, tokens=t // 2, pairs=2 * base.pairs, concepts=2, action="project"),
        replace(base, pairs=2 * base.pairs, tokens=t // 2, concepts=8, action="hold"),
        replace(base, layers=2 * base.layers, hidden=4 * h // 3, tokens=2 * t, concepts=3, action="text"),
    ]
    return main + (more if launch.startswith("ddp") else [])
