"""Who shows a run's records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .records import Sink
from .report import ReportSink


def make_sinks(args: Any) -> list[Sink]:
    """The sinks that the trainer's arguments ask for: the page in the output folder always, W&B if the run reports to it."""
    sinks: list[Sink] = [ReportSink(Path(args.output_dir) / "report.html")]
    if "wandb" in args.report_to:
        from .wandb import WandbSink

        sinks.append(WandbSink())
    return sinks
