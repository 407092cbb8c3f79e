"""Watching a run: running estimates, probe rollouts, and the records that dashboards are made of."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any


# Loaded on first use: `shapedpo report` makes a page from records, and needs none of torch.
_HOME = {
    "ExcitingReader": "features",
    "RunMonitor": "run",
    "Source": "access",
    "TrainerAccess": "access",
    "make_sinks": "sinks",
    "monitor_settings": "settings",
    "numbered": "access",
}

if TYPE_CHECKING:
    from .access import Source, TrainerAccess, numbered
    from .features import ExcitingReader
    from .run import RunMonitor
    from .settings import monitor_settings
    from .sinks import make_sinks

__all__ = ["ExcitingReader", "RunMonitor", "Source", "TrainerAccess", "make_sinks", "monitor_settings", "numbered"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
