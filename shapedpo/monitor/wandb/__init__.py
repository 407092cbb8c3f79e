"""Weights & Biases: tables, charts and config of a run's concepts, and a run that goes on without W&B."""

from .callback import GuardedWandbCallback, guard_wandb
from .sink import WandbSink, config


__all__ = ["GuardedWandbCallback", "WandbSink", "config", "guard_wandb"]
