"""Who shows a run's records."""

from __future__ import annotations

from typing import Any

from .records import Sink


def make_sinks(args: Any) -> list[Sink]:
    """The sinks that the trainer's arguments ask for."""
    return []
