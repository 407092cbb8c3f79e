"""Who shows a run's records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate.logging import get_logger

from .records import FILE_NAME, Sink
from .report import ReportSink


logger = get_logger(__name__)


def make_sinks(args: Any) -> list[Sink]:
    """The sinks that the trainer's arguments ask for: the page in the output folder always, W&B if the run reports to it."""
    if args.push_to_hub and getattr(args, "monitor_texts", True):
        logger.warning(
            f"`push_to_hub` uploads {FILE_NAME} and report.html with the model, and they quote pairs of the training data and rollouts. "
            "Set `monitor_texts=False` to keep these texts out of them, or `hub_private_repo=True`."
        )
    elif (
        args.push_to_hub and getattr(args, "probe_steps", 0) and args.hub_strategy in ("checkpoint", "all_checkpoints")
    ):
        logger.warning(
            f"`hub_strategy={args.hub_strategy.value!r}` uploads checkpoints, and they hold the token ids of the probe's rollouts, with which a "
            "resumed run goes on. Choose another strategy, or `hub_private_repo=True`, to keep these texts private."
        )
    sinks: list[Sink] = [ReportSink(Path(args.output_dir) / "report.html")]
    if "wandb" in args.report_to:
        from .wandb import WandbSink

        sinks.append(WandbSink())
    return sinks
