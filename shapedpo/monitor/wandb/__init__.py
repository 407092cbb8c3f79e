"""Weights & Biases: tables, charts and config of a run's concepts, and a run that goes on without W&B."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ... import lazy


# Loaded on first use: `shapedpo wandb-report` needs none of transformers, which prints a line where it is imported under WANDB_MODE=offline.
_HOME = {
    "GuardedWandbCallback": "callback",
    "WandbSink": "sink",
    "config": "sink",
    "guard_wandb": "callback",
}

if TYPE_CHECKING:
    from .callback import GuardedWandbCallback, guard_wandb
    from .sink import WandbSink, config

__all__ = ["GuardedWandbCallback", "WandbSink", "config", "guard_wandb"]


__getattr__ = lazy.attributes(__name__, _HOME)
