"""Results of held runs count while the controller does what it did."""

import pytest

from benchmarks.controller import fingerprint
from benchmarks.hold import Job, key
from shapedpo.shapers import hold, pair_statistics


def test_a_key_follows_what_the_controller_does(monkeypatch: pytest.MonkeyPatch) -> None:
    held, plain = Job("lab", "goblin"), Job("lab")
    before = fingerprint.__wrapped__(), key(held), key(plain)
    assert before[0] == fingerprint.__wrapped__() != fingerprint.__wrapped__(corrected=True)
    for module, name in ((hold, "LARGEST"), (pair_statistics, "LEAST"), (pair_statistics, "RIDGE")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, 2 * getattr(module, name))
            assert fingerprint.__wrapped__() != before[0], name
    fingerprint.cache_clear()
    monkeypatch.setattr(hold, "LARGEST", 3.0)
    assert key(held) != before[1]
    assert key(plain) == before[2]
    monkeypatch.undo()
    fingerprint.cache_clear()
    assert key(held) == before[1]
