"""Watching a run: running estimates, probe rollouts, and the records that dashboards are made of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import lazy


# Loaded on first use: `shapedpo report` makes a page from records, and needs none of torch.
_HOME = {
    "ExcitingReader": "features",
    "RecentRows": "recent",
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
    from .recent import RecentRows
    from .run import RunMonitor
    from .settings import monitor_settings
    from .sinks import make_sinks

__all__ = [
    "ExcitingReader",
    "RecentRows",
    "RunMonitor",
    "Source",
    "TrainerAccess",
    "make_sinks",
    "monitor_settings",
    "numbered",
]


__getattr__ = lazy.attributes(__name__, _HOME)
