"""What the page of readouts says of scores, against loops."""

from __future__ import annotations

import re

import numpy as np
import pytest

from benchmarks import readouts


def test_figures() -> None:
    dice = np.random.default_rng(0)
    shown = {name: dice.random(120) < share for name, share in (("cheer", 0.3), ("praise", 0.3), ("bold", 0.2))}
    scores = 3.0 * shown["cheer"] + 2.0 * shown["praise"] + dice.normal(size=120)
    area, hardest, truth, other, share = readouts.figures(scores, shown, "cheer")

    def wins(negatives: np.ndarray) -> float:
        return float(np.mean([[a > b for b in scores[negatives]] for a in scores[shown["cheer"]]]))

    assert float(area) == pytest.approx(wins(~shown["cheer"]), abs=6e-4)
    assert hardest.endswith("(praise)")
    assert float(hardest.split()[0]) == pytest.approx(wins(shown["praise"] & ~shown["cheer"]), abs=6e-4)

    deltas = [scores[i] - scores[i + 1] for i in range(0, 120, 2)]
    moved = {name: [float(rows[i]) - float(rows[i + 1]) for i in range(0, 120, 2)] for name, rows in shown.items()}
    assert float(truth) == pytest.approx(np.corrcoef(deltas, moved["cheer"])[0, 1], abs=6e-3)
    assert other.endswith("(praise)")
    assert float(other.split()[0]) == pytest.approx(np.corrcoef(deltas, moved["praise"])[0, 1], abs=6e-3)

    size = (sum(d**4 for d in deltas) / sum(d**2 for d in deltas)) ** 0.5
    pressure = []
    for d in deltas:
        x = (abs(d) / (0.3 * size)) ** 8
        pressure.append(np.sign(d) * x / (x + 1) * (abs(d) / size) ** 3)
    right = sum(p * m for p, m in zip(pressure, moved["cheer"], strict=True)) / sum(map(abs, pressure))
    assert float(re.fullmatch(r"(\d+)%", share)[1]) == pytest.approx(100 * right, abs=0.6)
