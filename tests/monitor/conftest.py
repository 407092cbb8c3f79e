"""Fixtures of the monitor's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def wandb_offline(tmp_path, monkeypatch) -> Iterator[None]:
    """W&B writes under the test's folder only, and no run outlives the test."""
    import wandb

    wandb.teardown()  # W&B reads its environment once in a process, unless told to forget it
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
        (tmp_path / name.lower()).mkdir()
    monkeypatch.delenv("WANDB_DISABLED", raising=False)
    yield
    wandb.finish()
    wandb.teardown()
