"""Running estimates and the pairs behind them, against slow references in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from shapedpo.monitor.estimates import Window
from shapedpo.monitor.features import Exciting
from shapedpo.monitor.pairs import TopPairs
from shapedpo.monitor.sae import FeatureMonitor, FeatureStatistics, ranked


BETA, SIZE = 0.3, 40
CPU = torch.device("cpu")


def batches(n: int, b: int = 4, f: int = 3, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(3 * torch.randn(b, generator=generator), torch.randn(b, f, generator=generator) + 0.5) for _ in range(n)]


def slow(stream: list[tuple[torch.Tensor, torch.Tensor]], world: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Weighted mean and standard error, pair by pair."""
    terms, weights = [], []
    for age, (apart, delta) in enumerate(reversed(stream)):
        decay = math.exp(-age * len(apart) * world / SIZE)
        for a, row in zip(apart.double().tolist(), delta.double().numpy(), strict=True):
            terms.append(np.stack([a * row / 4, row / (1 + math.exp(BETA * a)), row]))
            weights.append(decay)
    x, w = np.stack(terms), np.array(weights)[:, None, None]
    mean = (w * x).sum(0) / w.sum()
    n = w.sum() ** 2 / (w**2).sum()
    se = np.sqrt((w**2 * x**2).sum(0) - mean**2 * (w**2).sum()) / w.sum() * math.sqrt(n / (n - 1))
    return mean, se


class TestWindow:
    @pytest.mark.parametrize("n", [1, 5, 60])
    def test_against_pair_by_pair(self, n):
        window, stream = Window(3, SIZE, CPU), batches(n)
        for apart, delta in stream:
            window.update(apart, BETA, delta)
        estimates = Window.estimates(window.state())
        mean, se = slow(stream)
        np.testing.assert_allclose(estimates.value, mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(estimates.se, se, rtol=1e-3, atol=1e-5)

    def test_processes_add_up(self):
        """Two processes, each with half of every batch, have the estimates of one."""
        one, halves, stream = Window(3, SIZE, CPU), [Window(3, SIZE, CPU) for _ in range(2)], batches(9)
        for apart, delta in stream:
            one.update(apart, BETA, delta)
            for window, a, d in zip(halves, apart.chunk(2), delta.chunk(2), strict=True):
                window.update(a, BETA, d, world_size=2)
        expected = Window.estimates(one.state())
        found = Window.estimates(halves[0].state() + halves[1].state())
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)

    def test_state_goes_on(self):
        stream, whole, parts = batches(8), Window(3, SIZE, CPU), Window(3, SIZE, CPU)
        for i, (apart, delta) in enumerate(stream):
            whole.update(apart, BETA, delta)
            if i == 4:
                again = Window(3, SIZE, CPU)
                again.load_state(parts_state := parts.state())
                assert torch.equal(again.state(), parts_state)
                parts = again
            parts.update(apart, BETA, delta)
        assert torch.equal(whole.state(), parts.state())

    def test_interval_covers(self):
        """Of independent pairs, 95 % intervals hold the truth 95 % of the time."""
        generator = torch.Generator().manual_seed(1)
        window = Window(4000, 200, CPU)
        for _ in range(100):
            window.update(torch.zeros(8), BETA, torch.randn(8, 4000, generator=generator) + 1)
        value, se = (tensor[2] for tensor in Window.estimates(window.state())[:2])
        assert ((value - 1).abs() < 1.96 * se).float().mean() == pytest.approx(0.95, abs=0.015)

    def test_what_is_not_finite_is_left_out_and_counted(self):
        """Of one batch that overflowed: the rest is as if it had not been there."""
        window, stream = Window(3, SIZE, CPU), batches(20)
        clean = [(apart.clone(), delta.clone()) for apart, delta in stream]
        stream[12][0][:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
        terms = [(math.exp(-4 * (19 - i) / SIZE), pair) for i in range(20) for pair in zip(*clean[i], strict=True)]
        kept = [term for i, term in enumerate(terms) if i not in (48, 49, 50)]
        for apart, delta in stream:
            window.update(apart, BETA, delta)
        value, se, left_out = Window.estimates(window.state())
        total = sum(weight for weight, _ in kept)
        expected = sum(weight * float(apart) * delta.double() for weight, (apart, delta) in kept) / total / 4
        np.testing.assert_allclose(value[0], expected, rtol=1e-4, atol=1e-5)
        assert se.isfinite().all()
        assert left_out == pytest.approx(1 - total / sum(weight for weight, _ in terms), rel=1e-5)

    def test_a_policy_that_stays_broken_has_no_estimates(self):
        """Until more of the window is known again than not."""
        window, (apart, delta) = Window(3, SIZE, CPU), batches(1)[0]
        for broken in (False, True, False):
            for _ in range(5):
                window.update(apart * torch.nan if broken else apart, BETA, delta)
            assert Window.estimates(window.state()).value.isnan().all() == broken

    def test_nothing_seen(self):
        value, se, _ = Window.estimates(Window(2, SIZE, CPU).state())
        assert torch.equal(value, torch.zeros(3, 2))
        assert torch.isinf(se).all()


class TestTopPairs:
    @pytest.mark.parametrize("k", [1, 4])
    def test_against_sorting_everything(self, k):
        pairs, generator, seen = TopPairs(3, k, SIZE, CPU), torch.Generator().manual_seed(2), []
        for step, (apart, delta) in enumerate(batches(30, b=5)):
            rows = torch.randint(0, 60, (5,), generator=generator)
            rows = torch.arange(5) * 60 + rows  # distinct within a batch
            pairs.update(rows, apart, BETA, delta)
            seen.append((step, rows.tolist(), apart.tolist(), delta.tolist()))
        for c in range(3):
            last: dict[int, tuple[float, float, float]] = {}
            for step, rows, apart, delta in seen:
                for row, a, d in zip(rows, apart, delta, strict=True):
                    contribution = d[c] / (1 + math.exp(BETA * a))
                    key = abs(contribution) * math.exp(-(29 - step) * 5 / SIZE)
                    if k == 1 and row in last:  # of one pair there is no second one to drop
                        key = max(key, last[row][0])
                    last[row] = (key, contribution, d[c])
            best = sorted(last, key=lambda row: -last[row][0])[:k]
            found = pairs.table[c][pairs.table[c][:, 0].argsort(descending=True)]
            assert found[:, 1].int().tolist() == best
            if k > 1:
                np.testing.assert_allclose(found[:, 4], [last[row][1] for row in best], rtol=1e-4)
                np.testing.assert_allclose(found[:, 2], [last[row][2] for row in best], rtol=1e-4)

    def test_fewer_pairs_than_places(self):
        pairs = TopPairs(1, 8, SIZE, CPU)
        for _ in range(3):  # the same row each time
            pairs.update(torch.tensor([7]), torch.zeros(1), BETA, torch.ones(1, 1))
        real = pairs.table[0][pairs.table[0][:, 0] > 0]
        assert real[:, 1].tolist() == [7]

    @pytest.mark.parametrize("k", [1, 3])
    def test_what_is_not_finite_takes_no_place(self, k):
        pairs, (apart, delta) = TopPairs(3, k, SIZE, CPU), batches(1)[0]
        pairs.update(torch.arange(4), apart, BETA, delta)
        before = pairs.table[:, :, 1].clone()
        pairs.update(torch.arange(4, 8), torch.tensor([torch.nan, torch.inf, -torch.inf, torch.nan]), BETA, 9 * delta)
        assert torch.equal(pairs.table[:, :, 1], before)

    @pytest.mark.parametrize("k", [1, 3])
    def test_processes_merge(self, k):
        one, two = TopPairs(2, k, SIZE, CPU), [TopPairs(2, k, SIZE, CPU) for _ in range(2)]
        for i, (apart, delta) in enumerate(batches(6, f=2)):
            rows = torch.arange(4) + 4 * i
            one.update(rows, apart, BETA, delta)
            for pairs, r, a, d in zip(two, rows.chunk(2), apart.chunk(2), delta.chunk(2), strict=True):
                pairs.update(r, a, BETA, d, world_size=2)
        merged = one.merged(torch.stack([pairs.table for pairs in two]))
        for c in range(2):
            assert set(merged[c, :, 1].tolist()) == set(one.table[c, :, 1].tolist())

    def test_of_two_processes_the_later_one_counts(self):
        """A row that both have met: what it was like at the last time, whichever process saw it then."""
        two = [TopPairs(1, 3, SIZE, CPU) for _ in range(2)]
        for step, (process, apart) in enumerate([(1, 1.0), (0, 2.0)]):
            for i, pairs in enumerate(two):
                row = 7 if i == process else 10 * step + i
                pairs.update(torch.tensor([row]), torch.tensor([apart]), BETA, torch.ones(1, 1), world_size=2)
        merged = two[0].merged(torch.stack([pairs.table for pairs in two]))
        assert [float(pair[3]) for pair in merged[0] if pair[1] == 7 and pair[0] > 0] == [2.0]


def test_a_feature_that_overflows_counts_as_unchanged():
    """Once: its own sums and those of the others stay finite."""
    (apart, _), scores = batches(1)[0], torch.randn(8, 3, generator=torch.Generator().manual_seed(3))
    ones, exciting = torch.ones(3), Exciting.none(3, CPU)
    found = []
    for value in (torch.inf, float(scores[4, 1])):  # of the first pair's chosen completion: as the rejected one has it
        scores[0, 1] = value
        monitor = FeatureMonitor(None, FeatureStatistics(torch.arange(3), ones, ones, ones, exciting), SIZE)
        monitor.update(scores, torch.arange(4), apart, torch.ones(4, dtype=torch.bool), BETA, 1)
        found.append((monitor.window.state(), monitor.pairs.table))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
        assert one.isfinite().all()


def test_ranked_by_what_is_sure():
    value, se = torch.tensor([5.0, 1.0, -2.0, 0.1, torch.nan]), torch.tensor([4.0, 0.1, 0.2, 0.2, 1.0])
    assert ranked(value, se, 3) == ([1], [2])  # 5 +- 8 may be nothing
