"""The benchmark of the audit's page, on a small audit."""

from __future__ import annotations

import pytest

from benchmarks.audit_page import ACTIONS, Sizes, audit_page
from tests.browser import missing


@pytest.mark.skipif(missing() is not None, reason=f"no browser for the page: {missing()}")
def test_every_action_is_timed_on_both_pages(tmp_path) -> None:
    times, facts = audit_page(tmp_path, Sizes(rows=60, hypotheses=300, clusters=24), repeats=2)
    assert set(times) == {"`shapedpo view`", "`audit.html`"}
    for of in times.values():
        assert set(of) == {"open the page", *ACTIONS}
        assert all(0 < time < 10_000 for time in of.values())  # milliseconds, on a machine with other things to do
    assert len(facts) == 2
