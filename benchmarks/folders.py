"""Where the studies keep their runs and put their results."""

from __future__ import annotations

import argparse
from pathlib import Path


REPOSITORY = Path(__file__).resolve().parents[1]
CACHE = REPOSITORY / "benchmarks" / "cache"
RESULTS = REPOSITORY / "benchmarks" / "results"


def add_out(parser: argparse.ArgumentParser) -> None:
    """Adds `--out`, for [`out_folder`]."""
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of tables and pictures (default: benchmarks/results; of a quick run, in the cache)",
    )


def out_folder(options: argparse.Namespace, cache: Path) -> Path:
    """Where results go: those of a `--quick` run, which mean nothing, not over the others."""
    return Path(options.out or (cache if options.quick else RESULTS))
