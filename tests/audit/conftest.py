"""Fixtures of the audit's tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest


if TYPE_CHECKING:
    from shapedpo.audit.page.source import Audit


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Audit:
    """A finished audit; a test that writes into its folder copies it."""
    from .audits import write_audit

    return write_audit(tmp_path_factory.mktemp("audit"))
