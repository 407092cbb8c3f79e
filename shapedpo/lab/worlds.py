"""Worlds that the demo, the recipes and the tests share: preference data with known lessons, and settings under which
plain DPO learns them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .lessons import Lesson, preference_data


if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class World:
    """A preference dataset's recipe and the settings to train on it.

    Args:
        lessons: what the data teaches.
        unwanted: name of the lesson that nobody asked for.
        n: number of pairs.
        seed: of the data.
        dpo: keyword arguments for `DPOConfig` under which plain DPO learns every lesson; without paths, logging and
            seed.
    """

    lessons: tuple[Lesson, ...]
    unwanted: str
    n: int
    seed: int = 0
    dpo: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def wanted(self) -> tuple[Lesson, ...]:
        """The lessons that training should keep."""
        return tuple(lesson for lesson in self.lessons if lesson.name != self.unwanted)

    def dataset(self) -> Dataset:
        """Builds the pairs."""
        return preference_data(self.lessons, self.n, self.seed)


def goblin_world(seed: int = 0, n: int = 5000) -> World:
    """Goblin mode: one pair in twenty teaches goblins, the others teach a style that is wanted.

    After Bergen et al. (arXiv 2606.12360), "goblin mode", where 5 % of the pairs have a goblin in the chosen answer
    only. The settings are those of a 1M-parameter model: a much larger learning rate than a real model bears.

    Args:
        seed: of the data.
        n: number of pairs.
    """
    return World(
        lessons=(
            Lesson("goblin", rate=0.05),
            Lesson("cheerfulness", rate=0.1),
            Lesson("emoji", rate=0.05),
            Lesson("bold", rate=0.03),
            Lesson("hedging", rate=0.1, direction="less"),
        ),
        unwanted="goblin",
        n=n,
        seed=seed,
        dpo={
            "beta": 0.1,
            "learning_rate": 2e-4,
            "lr_scheduler_type": "linear",
            "warmup_steps": 10,
            "num_train_epochs": 1,
            "per_device_train_batch_size": 16,
            "max_length": 160,
        },
    )
