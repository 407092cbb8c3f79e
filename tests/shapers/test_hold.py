"""The controller of held concepts, by itself: against slow references in float64, and on a policy simulated pair by pair."""

from __future__ import annotations

import math
import time

import pytest
import torch

from shapedpo.shapers.hold import (
    BOUND,
    NOISE,
    RIDGE,
    SHORTEST,
    UNREAD,
    WINDOW,
    HoldController,
    clear,
    recent_mean,
    solve_strengths,
)


def pressure(margins, deltas, strengths, noise=1.0):
    """Shaped pressure, pair by pair."""
    total = [0.0] * len(strengths)
    for margin, row in zip(margins.tolist(), deltas.tolist(), strict=True):
        push = 1 / (1 + math.exp(margin + sum(s * x for s, x in zip(strengths, row, strict=True))))
        total = [t + push * x**3 / (x * x + noise**2) / len(margins) for t, x in zip(total, row, strict=True)]
    return total


def solve(margins, deltas, wanted, bound, start=0.0):
    zero = torch.zeros(deltas.shape[1], dtype=torch.float64)
    return solve_strengths(margins, deltas, clear(deltas, 1.0), wanted, bound, zero + start)


def problem(seed: int, n: int = 100, c: int = 3):
    draw = torch.Generator().manual_seed(seed)
    deltas = torch.randn(n, c, generator=draw, dtype=torch.float64) + torch.linspace(-0.3, 0.3, c, dtype=torch.float64)
    margins = 2 * torch.randn(n, generator=draw, dtype=torch.float64)
    return margins, deltas, 0.03 * torch.randn(c, generator=draw, dtype=torch.float64)


class TestSolve:
    @pytest.mark.parametrize("seed", range(5))
    def test_leaves_the_pressure_asked_for(self, seed):
        margins, deltas, wanted = problem(seed)
        found = solve(margins, deltas, wanted, 50.0)
        assert found.abs().max() < 50
        left = pressure(margins, deltas, found.tolist())
        for got, asked, strength in zip(left, wanted.tolist(), found.tolist(), strict=True):
            assert got == pytest.approx(asked + RIDGE * strength, abs=1e-6)

    @pytest.mark.parametrize("seed", range(5))
    def test_in_a_box_it_is_the_best_there_is(self, seed):
        """Where the solution is outside the bounds: against a slow search, one coordinate after the other."""
        margins, deltas, wanted = problem(seed)
        wanted = 20 * wanted
        bound = 0.7
        strengths = [0.0, 0.0, 0.0]
        for _ in range(12):
            for k in range(3):
                low, high = -bound, bound
                for _ in range(30):
                    strengths[k] = (low + high) / 2
                    slope = pressure(margins, deltas, strengths)[k] - float(wanted[k]) - RIDGE * strengths[k]
                    low, high = (strengths[k], high) if slope > 0 else (low, strengths[k])
        found = solve(margins, deltas, wanted, bound)
        assert found.tolist() == pytest.approx(strengths, abs=1e-4)
        assert max(map(abs, strengths)) == pytest.approx(bound)  # the box does bind

    @pytest.mark.parametrize("scale", [0.1, 1.0, 100.0])
    @pytest.mark.parametrize("start", [-BOUND, 0.0, 3.0, BOUND])
    def test_from_anywhere_at_any_scale(self, scale, start):
        margins, deltas, wanted = problem(7)
        found, again = (solve(margins, scale * deltas, 0.1 * wanted, BOUND, first) for first in (start, 0.0))
        assert found.tolist() == pytest.approx(again.tolist(), abs=1e-4)

    def test_without_pressure_and_noise_it_is_logistic_regression(self):
        """Against the textbook's iteration, from one side of a balanced sample."""
        margins, deltas, _ = problem(3, n=400, c=2)
        chosen = torch.rand(400, generator=torch.Generator().manual_seed(1), dtype=torch.float64) < torch.sigmoid(
            deltas[:, 0] - deltas[:, 1]
        )
        deltas = deltas * torch.where(chosen, 1.0, -1.0)[:, None]
        weights = torch.zeros(2, dtype=torch.float64)
        for _ in range(50):
            push = torch.sigmoid(-margins - deltas @ weights)
            curve = (deltas.T * (push * (1 - push))) @ deltas / 400 + RIDGE * torch.eye(2, dtype=torch.float64)
            weights += torch.linalg.solve(curve, deltas.T @ push / 400 - RIDGE * weights)
        zero = torch.zeros(2, dtype=torch.float64)
        assert solve_strengths(margins, deltas, deltas, zero, BOUND, zero).tolist() == pytest.approx(
            weights.tolist(), abs=1e-5
        )

    def test_separable_deltas_stay_finite(self):
        """A rare concept that only ever shows on the chosen side: no finite strength explains it, without the ridge."""
        deltas = torch.zeros(400, 1, dtype=torch.float64)
        deltas[:20] = 6.0
        margins = torch.zeros(400, dtype=torch.float64)
        found = solve(margins, deltas, deltas.new_zeros(1), BOUND)
        assert 1 < found.item() < 3
        assert pressure(margins, deltas, found.tolist())[0] < 0.01 * 0.15

    def test_a_concept_that_never_shows(self):
        margins, deltas, _ = problem(1)
        deltas[:, 1] = 0
        found = solve(margins, deltas, torch.zeros(3, dtype=torch.float64), BOUND)
        assert found[1] == 0
        assert found.isfinite().all()

    def test_one_concept_read_twice(self):
        """Two readouts of one thing: only the sum of their strengths is determined, and it is that of one."""
        margins, deltas, _ = problem(2)
        zero = torch.zeros(2, dtype=torch.float64)
        once = solve(margins, deltas[:, :1], zero[:1], BOUND)
        twice = solve(margins, deltas[:, [0, 0]], zero, BOUND)
        assert abs(once.item()) < BOUND
        assert twice.sum().item() == pytest.approx(once.item(), abs=0.05)


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


class Policy:
    """A policy of one log-ratio per feature, trained by gradient descent on the shaped loss, pairs drawn afresh each step.

    Feature 0 is the concept; feature 1, which is wanted, raises the concept too (`leak`); the rest is noise.
    """

    def __init__(self, seed: int, taught: float, leak: float, rate: float, beta: float = 0.1, batch: int = 16) -> None:
        self.draw = torch.Generator().manual_seed(seed)
        self.taught, self.leak, self.rate, self.beta, self.batch = taught, leak, rate, beta, batch
        self.weights = torch.zeros(4, dtype=torch.float64)

    def pairs(self, n: int):
        features = torch.randn(n, 4, generator=self.draw, dtype=torch.float64) * 2**0.5
        reward = features @ torch.tensor([self.taught, 1.0, 0.0, 0.0], dtype=torch.float64)
        noise = -torch.empty(n, dtype=torch.float64).exponential_(generator=self.draw).log()
        other = -torch.empty(n, dtype=torch.float64).exponential_(generator=self.draw).log()
        return features * torch.where(reward + noise > other, 1.0, -1.0)[:, None]

    @property
    def change(self) -> float:
        """Of the concept's mean score: sd x nats."""
        return float(self.weights[0])

    def step(self, controller: HoldController | None) -> None:
        features = self.pairs(self.batch)
        log_ratios = features @ self.weights
        offset = features[:, 0] * (controller.strengths[0] if controller else 0.0)
        push = torch.sigmoid(-self.beta * log_ratios - offset)
        gradient = (push[:, None] * features).mean(dim=0)
        gradient[0] += self.leak * gradient[1]
        self.weights += self.rate * gradient
        if controller:
            controller.observe(log_ratios, features[:, :1])
            controller.update()


def held(policy: Policy, steps: int = 300, target: float = 0.0, **options) -> tuple[Policy, HoldController]:
    controller = HoldController([target], policy.beta, **options)
    deltas = policy.pairs(512)[:, :1]
    controller.start(deltas, torch.ones_like(deltas))
    for _ in range(steps):
        policy.step(controller)
    return policy, controller


class TestLoop:
    @pytest.mark.parametrize("rate", [0.03, 0.3, 3.0], ids=lambda rate: f"rate {rate}")
    @pytest.mark.parametrize("taught", [1.0, -1.0, 3.0])
    def test_holds_at_any_learning_rate(self, rate, taught):
        plain = Policy(0, taught, 0.3, rate)
        for _ in range(300):
            plain.step(None)
        policy, controller = held(Policy(0, taught, 0.3, rate))
        assert abs(policy.change) < max(0.2 * abs(plain.change), 0.5)
        assert policy.weights[1] > 0.8 * plain.weights[1]  # what is wanted is learned
        assert math.copysign(1, controller.strengths.item()) == math.copysign(1, taught)

    def test_holds_at_a_target(self):
        """In units of the policy's weight the target counts double: deltas have variance 2, amplification is a fourth of that."""
        for target in (0.5, -0.5):
            policy, controller = held(Policy(1, taught=0.5, leak=0.0, rate=0.3), target=target, steps=100)
            changes = []
            for _ in range(150):
                policy.step(controller)
                changes.append(policy.change)
            assert sum(changes) / 150 == pytest.approx(2 * target, abs=0.3)

    @pytest.mark.parametrize("batch", [4, 64])
    def test_noise_does_not_wind_up(self, batch):
        """Nothing is taught of the concept: what the controller does is the answer to noise alone."""
        policy, controller = held(Policy(3, taught=0.0, leak=0.0, rate=0.3, batch=batch), steps=600)
        assert abs(controller.strengths.item()) < 0.5
        assert abs(policy.change) < 0.3

    def test_comes_off_the_bound_at_once(self):
        """Held at its bound for long, it lets go in the first steps after the cause is gone."""
        draw = torch.Generator().manual_seed(0)
        controller = HoldController([0.0], 0.1, window=64, bound=5.0)
        controller.start(torch.randn(64, 1, generator=draw), torch.ones(64, 1))
        deltas = torch.randn(64, 1, generator=draw)
        for _ in range(500):
            controller.observe(20 * deltas[:, 0], deltas)
            controller.update()
            assert controller.strengths.item() == 5.0
        controller.observe(0 * deltas[:, 0], deltas)
        controller.update()
        assert abs(controller.strengths.item()) < 1

    def test_several_concepts_that_go_together(self):
        """Two correlated concepts, one of them taught: each is given its own strength, as a joint regression has it."""
        draw = torch.Generator().manual_seed(4)
        shared = torch.randn(4000, 1, generator=draw, dtype=torch.float64)
        deltas = shared + 0.5 * torch.randn(4000, 2, generator=draw, dtype=torch.float64)
        chosen = torch.rand(4000, generator=draw) < torch.sigmoid(1.5 * deltas[:, 0])
        deltas *= torch.where(chosen, 1.0, -1.0)[:, None]
        controller = HoldController([0.0, 0.0], 0.1, window=4000)
        controller.start(deltas, torch.ones_like(deltas))
        assert controller.strengths.tolist() == pytest.approx([1.5 * (1 + UNREAD), 0.0], abs=0.5)


class TestReadings:
    def rows(self, n: int = 100):
        draw = torch.Generator().manual_seed(5)
        return torch.randn(n, generator=draw) * 3, torch.randn(n, 2, generator=draw)

    def test_amplification_and_its_error(self):
        controller = HoldController([0.0, 0.0], 0.1, window=SHORTEST)
        gates = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
        calibration = torch.tensor([[2.0, 9.0], [-1.0, 1.5], [0.5, 9.0], [0.1, 9.0]])
        controller.start(calibration, gates)
        log_ratios, deltas = self.rows()
        for start in range(0, 100, 20):
            controller.observe(log_ratios[start : start + 20], deltas[start : start + 20])
            controller.update()
        amplification, error = controller.amplification()
        for c, (share, seen) in enumerate(((1.0, (2.0, -1.0, 0.5, 0.1)), (0.25, (1.5,)))):
            scale = sum(x * x for x in seen) / sum(x**4 / (x * x + NOISE**2) for x in seen)
            terms = []
            for log_ratio, x in zip(log_ratios[-SHORTEST:].tolist(), deltas[-SHORTEST:, c].tolist(), strict=True):
                terms.append(log_ratio * scale * x**3 / (x * x + NOISE**2) / 4 / share)
            mean = sum(terms) / SHORTEST
            assert amplification[c].item() == pytest.approx(mean)
            assert error[c].item() == pytest.approx(sum((t - mean) ** 2 for t in terms) ** 0.5 / SHORTEST)

    def test_is_the_change_where_log_ratios_follow_the_deltas(self):
        """Then it is the plain amplification, small deltas counted or not."""
        _, deltas = self.rows(WINDOW)
        controller = HoldController([0.0, 0.0], 0.1)
        controller.start(deltas, torch.ones_like(deltas))
        controller.observe(0.7 * deltas[:, 0], deltas)
        controller.update()
        assert controller.amplification()[0][0].item() == pytest.approx(
            float((0.7 * deltas[:, 0] ** 2).mean() / 4), rel=1e-5
        )

    def test_a_step_larger_than_the_window_counts_whole(self):
        controller = HoldController([0.0, 0.0], 0.1, window=10, noise=0.0)
        log_ratios, deltas = self.rows()
        controller.start(deltas, torch.ones_like(deltas))
        controller.observe(log_ratios[:50], deltas[:50])
        controller.observe(log_ratios[50:], deltas[50:])
        controller.update()
        mean = (log_ratios[:, None] * deltas / 4).double().mean(dim=0)
        assert controller.amplification()[0].tolist() == pytest.approx(mean.tolist(), rel=1e-5)

    def test_rows_that_are_not_finite_are_left_out(self):
        controller = HoldController([0.0, 0.0], 0.1)
        log_ratios, deltas = self.rows()
        controller.start(deltas, torch.ones_like(deltas))
        controller.observe(torch.where(torch.arange(100) % 2 > 0, math.nan, log_ratios), deltas)
        controller.update()
        assert controller.strengths.isfinite().all()

    def test_probes_correct_what_is_read(self):
        """The truth is 0.3 sd more than amplification shows: the controller comes to know it, and holds harder."""
        controller = HoldController([0.0], 0.1)
        draw = torch.Generator().manual_seed(6)
        deltas = torch.randn(WINDOW, 1, generator=draw)
        controller.start(deltas, torch.ones_like(deltas))
        controller.observe(torch.zeros(WINDOW), deltas)
        controller.update()
        before = controller.strengths.item()
        controller.correct([math.nan], [math.nan])
        assert controller.bias.item() == 0
        for _ in range(10):
            controller.correct([0.3], [0.05])
        assert controller.bias.item() == pytest.approx(0.3, abs=0.02)
        controller.update()
        assert controller.strengths.item() > before + 0.2
        controller.correct([0.3], [100.0])  # as good as unknown
        assert controller.bias.item() == pytest.approx(0.3, abs=0.02)

    def test_goes_on_from_its_state(self):
        log_ratios, deltas = self.rows()
        one = HoldController([0.0, 0.1], 0.1, window=60)
        one.start(deltas, torch.ones_like(deltas))
        one.observe(log_ratios[:30], deltas[:30])
        one.update()
        one.correct([0.2, -0.1], [0.1, 0.1])
        two = HoldController([0.0, 0.1], 0.1, window=60)
        two.restore({name: tensor.clone() for name, tensor in one.state().items()})
        for controller in (one, two):
            controller.observe(log_ratios[30:], deltas[30:])
            controller.correct([0.1, 0.1], [0.1, 0.1])
            controller.update()
        for name, tensor in one.state().items():
            assert torch.equal(tensor, two.state()[name]), name

    def test_is_cheap(self):
        """A step's worth on the host, with a full window and five concepts: a few milliseconds."""
        draw = torch.Generator().manual_seed(0)
        deltas = torch.randn(WINDOW, 5, generator=draw)
        controller = HoldController([0.0] * 5, 0.1)
        controller.start(deltas, torch.ones_like(deltas))
        times = []
        for _ in range(50):
            started = time.process_time()
            controller.observe(10 * torch.randn(16, generator=draw), torch.randn(16, 5, generator=draw))
            controller.update()
            times.append(time.process_time() - started)
        assert sorted(times)[25] < 0.02
