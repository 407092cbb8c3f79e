"""What holds for every test: no network, no account, as many threads as the test command gives each process; in which order, and where."""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser import Opened, browser


# Set before torch, the hub client or W&B are imported, here and in the processes that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("WANDB_DIR", tempfile.mkdtemp(prefix="shapedpo-wandb-"))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests run in several processes, and their models are tiny
# accelerate asks some thirty times a run whether peft and deepspeed are installed, and each time their metadata are read anew.
# In runs of three steps that is a tenth of the time.
importlib.metadata.metadata = functools.cache(importlib.metadata.metadata)

LONG = ("distributed", "recipes", "lab", "benchmarks", "audit", "monitor")
"""The folders that take longest, which come first: what comes last should be short, as some workers then have nothing to do."""
TOGETHER = "tests/distributed"
"""One worker runs all of this folder, whose files share what takes long to start; otherwise each file goes to one."""


BUILD_MINUTES = 10
"""A lock that is older is of a build that was killed."""


def pytest_sessionstart() -> None:
    # Where a run was killed while DeepSpeed compiled for it, its lock stays, and every later run would wait for it without end.
    extensions = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions"))
    for lock in extensions.glob("**/lock"):
        if time.time() - lock.stat().st_mtime > 60 * BUILD_MINUTES:
            lock.unlink(missing_ok=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        return LONG.index(folder) if folder in LONG else len(LONG)

    items.sort(key=place)


def pytest_collection_finish() -> None:
    # Each training ends with a full garbage collection, which need not look through every library that is imported.
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return TOGETHER if nodeid.startswith(f"{TOGETHER}/") else super()._split_scope(nodeid)

    config.option.loadscopereorder = False
    return Scheduling(config, log)


# Of a module, not of the session: while Playwright runs, nothing else in the process can run an event loop.
@pytest.fixture(scope="module")
def started() -> Iterator[Any]:
    """A browser."""
    with browser() as running:
        yield running


@pytest.fixture
def opened(started: Any) -> Iterator[Callable[..., Opened]]:
    """Opens a page: a file, or an address. When the test is over, it must not have complained or asked another server for anything."""
    pages: list[Opened] = []

    def open_page(where: Any, **options: Any) -> Opened:
        pages.append(Opened(started, where, **options))
        pages[-1].open()
        return pages[-1]

    yield open_page
    for page in pages:
        page.check()
        page.close()
