"""Watching a run: running estimates, probe rollouts, and the records that dashboards are made of."""

from .access import Source, TrainerAccess, numbered
from .features import ExcitingReader
from .run import RunMonitor
from .settings import monitor_settings
from .sinks import make_sinks


__all__ = ["ExcitingReader", "RunMonitor", "Source", "TrainerAccess", "make_sinks", "monitor_settings", "numbered"]
