"""Results of held runs count while the controller does what it did."""

import csv

import numpy as np
import pytest

from benchmarks import hold as hold_benchmark
from benchmarks.controller import fingerprint
from benchmarks.hold import Job, Kept, key
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


def test_earlier_lines_stay_until_they_are_replaced(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And while the controller does what it did."""
    lines = [
        {"world": "lab", "held": held, "learning rate": "x 1", "seed": 0, "hold": 5.0} for held in ("goblin", "bold")
    ]
    monkeypatch.setattr(hold_benchmark, "EARLIER", tmp_path / "earlier.csv")
    with hold_benchmark.EARLIER.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    assert [line["held"] for line in hold_benchmark.earlier([{**lines[0], "hold": 6.0}])] == ["bold"]
    monkeypatch.setattr(hold_benchmark.controller, "fingerprint", lambda corrected=False: "of another")
    assert hold_benchmark.earlier([]) == []


def test_what_is_kept_of_a_change_and_how_sure_that_is() -> None:
    """Against many draws of the rates."""
    before, plain, held, n = 0.1, 0.5, 0.42, 3000
    kept = Kept.of(before, plain, held, n)
    draw = np.random.default_rng(0)
    b, p, h = (draw.binomial(n, rate, 20_000) / n for rate in (before, plain, held))
    drawn = (h - b) / (p - b)
    assert kept.share == pytest.approx(0.8)
    assert kept.sd == pytest.approx(drawn.std(), rel=0.05)
    mean = Kept.mean([kept, Kept(1.0, 0.0)])
    assert (mean.share, mean.sd) == pytest.approx((0.9, kept.sd / 2))
    assert str(Kept(0.8, 0.05)) == "80 (70 to 90)"
