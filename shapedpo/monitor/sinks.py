"""Who shows a run's records."""

from __future__ import annotations

from typing import Any

from .records import Sink


def make_sinks(args: Any) -> list[Sink]:
    """The sinks that the trainer's arguments ask for."""
    sinks: list[Sink] = []
    if "wandb" in args.report_to:
        from .wandb import WandbSink

        sinks.append(WandbSink())
    return sinks
