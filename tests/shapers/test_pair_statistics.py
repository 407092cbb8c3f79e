"""Statistics of pairs, against slow references."""

from __future__ import annotations

import pytest
import torch

from shapedpo.shapers.pair_statistics import presence, recent_mean, robust_spread, typical_size
from tests.shapers.held import shown


class TestPresence:
    def test_nothing_of_the_small_and_all_of_the_large(self):
        deltas = torch.tensor([[1.8], [-1.8], [0.6], [6.0], [-60.0], [0.0]], dtype=torch.float64)
        found = presence(deltas, torch.tensor([6.0])).flatten().tolist()
        assert found == pytest.approx([0.5, -0.5, 0.0, 1.0, -1.0, 0.0], abs=1e-3)
        assert found[2] == pytest.approx(shown(0.6, 6.0))

    def test_overflow_is_a_whole_one(self):
        assert presence(torch.tensor([[1e30, -1e30]]), torch.tensor([1e-6, 1.0])).tolist() == [[1.0, -1.0]]

    def test_size_is_that_of_the_few_large_ones(self):
        """One pair in twenty shows it, by 6 sd, and the readout's noise is 0.3: the size is about 6."""
        deltas = 0.3 * torch.randn(4000, 1, generator=torch.Generator().manual_seed(0))
        deltas[::20] += 6
        assert typical_size(deltas).item() == pytest.approx(6, rel=0.05)

    def test_size_of_a_bell(self):
        """Of deltas without two kinds, the square root of the kurtosis times the sd."""
        deltas = torch.randn(100_000, 1, generator=torch.Generator().manual_seed(0))
        assert typical_size(deltas).item() == pytest.approx(3**0.5, rel=0.03)

    def test_spread(self):
        values = 3 * torch.randn(10_001, generator=torch.Generator().manual_seed(0))
        values[:100] = 1e6
        assert robust_spread(values) == pytest.approx(3, rel=0.05)
        assert robust_spread(values[:0]) == 0

    def test_size_of_nothing(self):
        assert typical_size(torch.zeros(5, 2)).tolist() == [1, 1]


class TestRecentMean:
    def test_of_all_where_nothing_moves(self):
        values = torch.randn(512, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        mean, error = recent_mean(values, 64)
        assert mean == pytest.approx(values.mean().item())
        assert error == pytest.approx(values.std(correction=0).item() / 512**0.5)

    def test_of_the_latest_where_it_moves(self):
        values = torch.randn(512, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        values[-100:] += 5
        assert recent_mean(values, 64)[0] == pytest.approx(values[-64:].mean().item())

    def test_a_rare_concept_is_looked_back_for(self):
        """One pair in fifty has it: nothing in the latest 64 must not read as exactly nothing."""
        values = torch.zeros(512, dtype=torch.float64)
        values[:448:40] = 1.0
        mean, error = recent_mean(values, 64)
        assert mean == pytest.approx(12 / 512)
        assert error > 0

    @pytest.mark.parametrize("n", [1, 5, 100])
    def test_of_what_there_is(self, n):
        values = torch.arange(n, dtype=torch.float64) % 2
        assert recent_mean(values, 64)[0] == pytest.approx(values.mean().item())

    def test_of_nothing(self):
        assert recent_mean(torch.zeros(0, dtype=torch.float64), 64) == (0, 0)
