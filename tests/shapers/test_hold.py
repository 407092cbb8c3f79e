"""The controller of held concepts, by itself: against slow references in float64, and on a policy simulated pair by pair."""

from __future__ import annotations

import math
import statistics
import time

import numpy as np
import pytest
import torch

from shapedpo.shapers.correction import DRIFT
from shapedpo.shapers.hold import LARGEST, SHORTEST, SPREADS, UNREAD, WINDOW, HoldController
from shapedpo.shapers.pair_statistics import LEAST, RIDGE, presence, recent_mean, robust_spread, typical_size


def shown(x: float, size: float) -> float:
    """[`presence`] of one delta."""
    power = (x / (0.3 * size)) ** 8
    return math.copysign(power / (1 + power), x)


def started(deltas, **options) -> HoldController:
    controller = HoldController([0.0] * deltas.shape[1], 0.1, **options)
    controller.start(deltas, torch.ones_like(deltas))
    return controller


def saturated(x: float, values: list[float]) -> float:
    """A log-ratio as it counts beside others."""
    middle = statistics.median_low(values)
    bound = max(LARGEST, SPREADS * 1.4826 * statistics.median_low(abs(value - middle) for value in values))
    return bound * math.tanh(x / bound)


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


class TestStart:
    """The strengths before the first step, against the normal equations written out."""

    @pytest.mark.parametrize("seed", range(3))
    def test_no_pressure_is_left(self, seed):
        draw = torch.Generator().manual_seed(seed)
        deltas = torch.randn(WINDOW, 2, generator=draw) + torch.tensor([0.4, -0.2])
        controller = started(deltas, unread=0.0)
        size, weights = typical_size(deltas).tolist(), []
        scale = [
            sum(x * x for x in column) / sum(x * shown(x, size[c]) for x in column)
            for c, column in enumerate(deltas.T.tolist())
        ]
        for row in deltas.tolist():
            weights.append([scale[c] * shown(x, size[c]) for c, x in enumerate(row)])
        torch.testing.assert_close(controller.weights(deltas), torch.tensor(weights), rtol=0, atol=1e-4)
        pulls = [
            0.5 - sum(s * w / 4 for s, w in zip(controller.strengths.tolist(), row, strict=True)) for row in weights
        ]
        for c in range(2):
            left, whole = 0.0, 0.0
            for pull, weight, row in zip(pulls, weights, deltas.tolist(), strict=True):
                loudness = sum(abs(x / s) ** 3 for x, s in zip(row, size, strict=True))
                left += loudness * pull * weight[c]
                whole += loudness * weight[c] / 2
            assert abs(left) < 2 * RIDGE * abs(whole)

    def test_what_reads_half_as_loud_by_chance_takes_little_off_it(self):
        """One pair in twenty shows the concept; three read half as loud, as often on one side as on the other, and are something else. A
        strength that left no pressure on the weights themselves would silence the pairs that show it by a fourth only.
        """
        deltas = torch.zeros(400, 1)
        deltas[:20] = 4.0
        deltas[20:50], deltas[50:80] = 2.0, -2.0
        controller = started(deltas, unread=0.0)
        weights = controller.weights(deltas.double())[:, 0]
        own = (0.5 * weights.mean() / weights.square().mean() * weights[0]).item()
        assert own == pytest.approx(0.5 / 4, rel=0.05)
        # 60 pairs of half the size, which count an eighth.
        pull = (controller.strengths * weights[0] / 4).item()
        assert pull == pytest.approx(0.5 * 20 / (20 + 60 / 8), rel=0.05)

    def test_a_rare_concept_that_shows_on_one_side_only(self):
        """Its pairs are silenced, and no strength at its bound is needed for it."""
        deltas = torch.zeros(400, 1)
        deltas[:20] = 6.0
        controller = started(deltas)
        pull = (controller.strengths * controller.weights(deltas)[0] / 4).item()
        assert pull == pytest.approx(0.5 * (1 + UNREAD), rel=0.01)

    def test_a_concept_that_never_shows(self):
        deltas = torch.randn(100, 2, generator=torch.Generator().manual_seed(0)) + 0.5
        deltas[:, 1] = 0
        strengths = started(deltas).strengths
        assert strengths[1] == 0 < strengths[0]

    def test_one_concept_read_twice(self):
        """Two readouts of one thing: they share the work that one would do."""
        deltas = torch.randn(WINDOW, 1, generator=torch.Generator().manual_seed(0)) + 0.5
        once, twice = started(deltas).strengths, started(deltas[:, [0, 0]]).strengths
        assert twice.tolist() == pytest.approx([once.item() / 2] * 2, rel=0.01)


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


class TestSpare:
    """A held concept and two others that the same pairs teach."""

    CHOSEN = torch.tensor(
        [[True, False], [True, True]]
    )  # the first held concept spares both of the others, the second the last

    def drawn(self, n: int = WINDOW):
        draw = torch.Generator().manual_seed(8)
        common = torch.randn(n, 1, generator=draw)
        deltas, others = (2 * torch.randn(n, 2, generator=draw) + common + 0.5 for _ in range(2))
        gates = (torch.rand(n, 2, generator=draw) < torch.tensor([0.6, 1.0])).float()
        return deltas, gates, others

    def test_what_is_left_against_the_normal_equations(self):
        deltas, gates, others = self.drawn()
        controller = HoldController([0.0, 0.0], 0.1, spared=self.CHOSEN)
        controller.start(deltas, gates, others)
        along = controller.along(*(x.double() for x in (deltas * gates, gates, others)))
        weights = controller.weights((deltas * gates).double()).numpy()
        shows = np.stack(
            [
                [shown(x, size) for x in column]
                for column, size in zip(others.T.tolist(), typical_size(others).tolist(), strict=True)
            ],
            1,
        )
        for c in range(2):
            rows = gates[:, c].numpy() > 0
            which = self.CHOSEN[:, c].numpy()
            found = np.linalg.lstsq(shows[rows][:, which], weights[rows, c], rcond=None)[0]
            expected = weights[:, c] - rows * (shows[:, which] @ found)
            np.testing.assert_allclose(along[:, c], expected, atol=5 * RIDGE)
            assert np.abs(along[~rows, c]).sum() == 0

    def test_the_data_teach_the_others_as_before(self):
        """The pulls leave no pressure on the held concepts, and that on the spared ones is what it was; without `spared` it is not."""
        deltas, _, others = self.drawn()
        gates, shows = torch.ones_like(deltas), presence(others.double(), typical_size(others))
        before = 0.5 * shows.mean(dim=0)
        moved = []
        for spared in (torch.ones(2, 2, dtype=torch.bool), None):
            controller = HoldController([0.0, 0.0], 0.1, unread=0.0, spared=spared)
            given = others if spared is not None else others[:, :0]
            controller.start(deltas, gates, given)
            pull = 0.5 - controller.along(deltas.double(), gates.double(), given.double()) @ controller.strengths / 4
            loudness = (deltas / typical_size(deltas)).abs().pow(3).sum(dim=1).double()
            left = ((loudness * pull)[:, None] * controller.weights(deltas.double())).mean(dim=0)
            assert left.abs().max() < 0.02
            moved.append(((pull[:, None] * shows).mean(dim=0) - before) / before)
        assert moved[0].abs().max() < 0.01
        assert moved[1].abs().min() > 0.2

    def test_of_pairs_that_teach_both_the_spared_lesson_is_learned(self):
        """Where one side shows the concept it mostly shows the wanted one too. Held alone, the concept takes half of that with it."""

        class Together(Policy):
            """Feature 1 is the sum of two: one is the concept."""

            def pairs(self, n: int):
                pairs = super().pairs(n)
                pairs[:, 1] += pairs[:, 0]
                return pairs

            @property
            def changes(self) -> tuple[float, float]:
                """Of the concept's mean score and the wanted one's: the features' covariance with the log-ratio."""
                own, both = self.weights[:2].tolist()
                return own + both, own + 2 * both

        def policy() -> Together:
            return Together(0, taught=1.0, leak=0.0, rate=0.1)

        plain = policy()
        for _ in range(300):
            plain.step(None)
        alone, sparing = (
            held(policy(), spared=spared)[0].changes for spared in (None, torch.ones(1, 1, dtype=torch.bool))
        )
        assert max(abs(alone[0]), abs(sparing[0])) < 0.3 * plain.changes[0]
        assert sparing[1] > 0.6 * plain.changes[1] > 2 * alone[1]

    def test_loud_pairs_that_share_all_do_not_turn_it_round(self):
        """The few pairs that show it loudest show the spared one whole, the many quiet ones half: what is left of the loud ones is on the other side."""
        deltas, others = torch.zeros(400, 1), torch.zeros(400, 1)
        deltas[:5], others[:5] = 8.0, 4.0
        deltas[5:105], others[5:105] = 3.0, 0.87
        controller = HoldController([0.0], 0.1, spared=torch.ones(1, 1, dtype=torch.bool), bound=100.0)
        controller.start(deltas, torch.ones_like(deltas), others)
        plain = HoldController([0.0], 0.1)
        plain.start(deltas, torch.ones_like(deltas))
        assert controller.along(deltas[:1].double(), torch.ones(1, 1).double(), others[:1].double()).item() < 0
        assert controller.strengths.item() == pytest.approx(plain.strengths.item() / LEAST, rel=0.01)

    def test_nothing_of_its_own(self):
        """The spared one reads the same: nothing is pulled, rather than everything."""
        deltas, gates, _ = self.drawn()
        controller = HoldController([0.0], 0.1, spared=torch.ones(1, 1, dtype=torch.bool))
        controller.start(deltas[:, :1], gates[:, 1:], deltas[:, :1])
        along = controller.along(deltas[:, :1].double(), gates[:, 1:].double(), deltas[:, :1].double())
        assert (along * controller.strengths).abs().max() < 0.1
        assert controller.own.item() < 0.01


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
        push = torch.sigmoid(-self.beta * log_ratios)
        others = features[:, 1:2] if controller and len(controller._spared) else features[:, :0]
        if controller:
            along = controller.along(features[:, :1], torch.ones_like(features[:, :1]), others)
            push = push - along[:, 0] * controller.strengths[0] / 4
        gradient = (push[:, None] * features).mean(dim=0)
        gradient[0] += self.leak * gradient[1]
        self.weights += self.rate * gradient
        if controller:
            controller.observe(log_ratios, features[:, :1], others=others)
            controller.update()


def held(policy: Policy, steps: int = 300, target: float = 0.0, **options) -> tuple[Policy, HoldController]:
    controller = HoldController([target], policy.beta, **options)
    pairs = policy.pairs(512)
    deltas, others = pairs[:, :1], pairs[:, 1:2] if len(controller._spared) else None
    controller.start(deltas, torch.ones_like(deltas), others)
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
        # At the highest rate log-ratios are tens of nats apart, and few of them count in full.
        assert abs(policy.change) < max((0.3 if rate == 3 else 0.2) * abs(plain.change), 0.5)
        # What is wanted is learned: most of it, but less where the held concept decides most pairs, which then tell little of the rest.
        assert policy.weights[1] > (0.2 if taught == 3 else 0.6) * plain.weights[1]
        assert math.copysign(1, controller.strengths.item()) == math.copysign(1, taught)

    def test_holds_at_a_target(self):
        """In units of the policy's weight the target counts double: deltas have variance 2, amplification is a fourth of that. Where
        the two readings of it disagree, the policy may be anywhere between.
        """
        for target in (0.5, -0.5):
            policy, controller = held(Policy(1, taught=0.5, leak=0.0, rate=0.3), target=target, steps=100)
            changes = []
            for _ in range(150):
                policy.step(controller)
                changes.append(policy.change)
            assert sum(changes) / 150 == pytest.approx(2 * target, abs=0.7)

    @pytest.mark.parametrize("rate", [0.3, 1.0], ids=lambda rate: f"rate {rate}")
    def test_probes_see_what_no_pair_shows(self, rate):
        """Of each nat that the wanted lesson gains it takes half a nat from the concept, on held-out prompts alone. Nine probes in 50 steps, of
        which each is off by 0.2 sd; the learning rate falls to 0.
        """

        def ends(probed: bool) -> float:
            policy = Policy(0, taught=-1.0, leak=0.0, rate=rate)
            controller = HoldController([0.0], policy.beta)
            deltas = policy.pairs(256)[:, :1]
            controller.start(deltas, torch.ones_like(deltas))
            noise = torch.Generator().manual_seed(0)
            for step in range(50):
                if probed and step and step % 5 == 0:
                    shift = 0.2 * torch.randn(1, generator=noise, dtype=torch.float64)
                    controller.correct((policy.change - policy.weights[1] / 2) / 2 + shift, [0.2])
                policy.rate = rate * (1 - step / 50)
                policy.step(controller)
            return float(policy.change - policy.weights[1] / 2) / 2

        unseen = ends(probed=False)
        assert unseen < -0.35
        assert abs(ends(probed=True)) < 0.5 * abs(unseen)

    @pytest.mark.parametrize("batch", [4, 64])
    def test_noise_does_not_wind_up(self, batch):
        """Nothing is taught of the concept: what the controller does is the answer to noise alone. The concept wanders, as it does without
        a controller, by a small part of what the same steps teach where there is something to learn.
        """
        taught = Policy(3, taught=1.0, leak=0.0, rate=0.3, batch=batch)
        for _ in range(600):
            taught.step(None)
        policy, controller = held(Policy(3, taught=0.0, leak=0.0, rate=0.3, batch=batch), steps=600)
        assert abs(controller.strengths.item()) < 0.5
        assert abs(policy.change) < 0.2 * taught.change

    def test_comes_off_the_bound_at_once(self):
        """Held at its bound for long, it lets go in the first steps after the cause is gone."""
        draw = torch.Generator().manual_seed(0)
        controller = HoldController([0.0], 0.1, window=64, bound=5.0)
        controller.start(torch.randn(64, 1, generator=draw), torch.ones(64, 1))
        deltas = torch.randn(64, 1, generator=draw)
        for _ in range(500):
            controller.observe(20 * deltas[:, 0], deltas)
            controller.update()
            assert controller.strengths.item() == pytest.approx(4 * 5.0 / controller.state()["scale"].item())
        controller.observe(0 * deltas[:, 0], deltas)
        controller.update()
        assert abs(controller.strengths.item()) < 1

    def test_several_concepts_that_go_together(self):
        """Two correlated concepts, one of them taught: each is given its own strength, as in a joint regression."""
        draw = torch.Generator().manual_seed(4)
        shared = torch.randn(4000, 1, generator=draw, dtype=torch.float64)
        deltas = shared + 0.5 * torch.randn(4000, 2, generator=draw, dtype=torch.float64)
        chosen = torch.rand(4000, generator=draw) < torch.sigmoid(1.5 * deltas[:, 0])
        deltas *= torch.where(chosen, 1.0, -1.0)[:, None]
        controller = HoldController([0.0, 0.0], 0.1, window=4000)
        controller.start(deltas, torch.ones_like(deltas))
        strengths = controller.strengths.tolist()
        assert strengths[0] > 0.8
        assert abs(strengths[1]) < 0.2 * strengths[0]


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
        log_ratios = log_ratios[-SHORTEST:].tolist()
        for c, (share, seen) in enumerate(((1.0, (2.0, -1.0, 0.5, 0.1)), (0.25, (1.5, 0.0, 0.0, 0.0)))):
            size = (sum(x**4 for x in seen) / sum(x * x for x in seen)) ** 0.5
            scale = sum(x * x for x in seen) / sum(x * shown(x, size) for x in seen)
            weights = [scale * shown(x, size) for x in deltas[-SHORTEST:, c].tolist()]
            middle = sum(weights) / SHORTEST, sum(log_ratios) / SHORTEST
            terms = [
                (w - middle[0]) * saturated(r - middle[1], log_ratios) / 4 / share
                for w, r in zip(weights, log_ratios, strict=True)
            ]
            mean = sum(terms) / SHORTEST
            assert amplification[c].item() == pytest.approx(mean)
            assert error[c].item() == pytest.approx(sum((t - mean) ** 2 for t in terms) ** 0.5 / SHORTEST)

    def test_rows_outside_the_gate_say_nothing(self):
        """Their log-ratios are 20 nats larger, of a lesson of their own: the covariance is that of the gate's rows."""
        log_ratios, deltas = self.rows()
        gates = (torch.arange(100)[:, None] % torch.tensor([4, 1]) == 0).float()
        controller = HoldController([0.0, 0.0], 0.1, window=100)
        controller.start(deltas, gates)
        controller.observe(log_ratios + 20 * (1 - gates[:, 0]), deltas * gates, gates=gates)
        weights = controller.weights(deltas.double())[::4, 0].tolist()
        inside = log_ratios[::4].tolist()
        middle = sum(weights) / 25, sum(inside) / 25
        moved = sum((w - middle[0]) * saturated(r - middle[1], inside) for w, r in zip(weights, inside, strict=True))
        assert controller.amplification()[0][0].item() == pytest.approx(moved / 100, rel=1e-5)
        assert abs(moved) > 2.5

    def test_is_the_change_where_log_ratios_follow_the_deltas(self):
        """Where they are small: then it is the plain amplification, small deltas counted or not."""
        _, deltas = self.rows(WINDOW)
        controller = HoldController([0.0, 0.0], 0.1)
        controller.start(deltas, torch.ones_like(deltas))
        controller.observe(0.1 * deltas[:, 0], deltas)
        controller.update()
        assert controller.amplification()[0][0].item() == pytest.approx(
            float((0.1 * deltas[:, 0] ** 2).mean() / 4), rel=0.02
        )

    def test_a_few_pairs_that_are_nats_away_do_not_outweigh_the_rest(self):
        """One in ten of the pairs with the concept has lost it by 30 nats, and the others have gained a nat: it has been amplified."""
        deltas = torch.zeros(WINDOW, 1)
        deltas[::4] = 4.0
        controller = started(deltas)
        log_ratios = torch.where(deltas[:, 0] > 0, 1.0, 0.0)
        log_ratios[::40] = -30.0
        controller.observe(log_ratios, deltas)
        controller.update()
        assert controller.amplification()[0].item() > 0.05

    def test_what_other_lessons_lift_is_not_held(self):
        """One pair in ten shows the concept, always on the chosen side; every lesson lifts all pairs by 3 nats, which is none of it."""
        deltas = torch.zeros(WINDOW, 1)
        deltas[::10] = 4.0
        controller = started(deltas)
        before = controller.strengths.item()
        controller.observe(3 + torch.randn(WINDOW, generator=torch.Generator().manual_seed(0)), deltas)
        controller.update()
        beta = torch.sigmoid(torch.tensor(-0.3)).item() / 0.5  # of the pull, as margins grow
        assert controller.strengths.item() == pytest.approx(beta * before, rel=0.1)
        controller.observe(
            3 + torch.where(deltas[:, 0] > 0, 2.0, 0.0), deltas
        )  # and now the concept too, by 2 nats more
        controller.update()
        assert controller.strengths.item() > 1.5 * before

    def test_acts_on_what_both_readings_agree_on(self):
        """Where the covariance says less and the mean product more of the concept, it only takes out the pressure, until a probe decides."""
        deltas = torch.zeros(WINDOW, 1)
        deltas[: WINDOW // 2] = 4.0
        controller = started(deltas)
        log_ratios = torch.where(deltas[:, 0] > 0, 1.0, 2.0)
        controller.observe(log_ratios, deltas)
        controller.update()
        pull = torch.sigmoid(-0.1 * log_ratios[0]).item() * (1 + UNREAD)
        assert (controller.strengths * controller.weights(deltas)[0] / 4).item() == pytest.approx(pull, rel=0.01)
        level = controller.strengths.item()
        controller.correct([0.5], [0.01])
        controller.update()
        assert controller.strengths.item() > 1.2 * level

    def test_a_step_larger_than_the_window_counts_whole(self):
        controller = HoldController([0.0, 0.0], 0.1, window=10)
        log_ratios, deltas = self.rows()
        controller.start(deltas, torch.ones_like(deltas))
        controller.observe(log_ratios[:50], deltas[:50])
        controller.observe(log_ratios[50:], deltas[50:])
        controller.update()
        weights = controller.weights(deltas.double())
        for c in range(2):
            both = torch.stack([log_ratios.double(), weights[:, c]])
            apart = both - both.mean(dim=1, keepdim=True)
            bounded = torch.tensor([saturated(x, both[0].tolist()) for x in apart[0].tolist()])
            covariance = (bounded * apart[1]).mean().item() / 4
            assert controller.amplification()[0][c].item() == pytest.approx(covariance, rel=1e-5)

    def test_rows_that_are_not_finite_are_left_out(self):
        controller = HoldController([0.0, 0.0], 0.1)
        log_ratios, deltas = self.rows()
        controller.start(deltas, torch.ones_like(deltas))
        controller.observe(torch.where(torch.arange(100) % 2 > 0, math.nan, log_ratios), deltas)
        controller.update()
        assert controller.strengths.isfinite().all()

    def test_what_rollouts_show_against_a_slow_reference(self):
        """Each rollout of the policy against each of the reference's for the same prompt; of a gated concept, on its gate's prompts."""
        draw = torch.Generator().manual_seed(7)
        controller = HoldController([0.0, 0.0, 0.0], 0.1)
        calibration = torch.randn(50, 3, generator=draw)
        controller.start(calibration, torch.ones(50, 3))
        now, before = 2 * torch.randn(9, 2, 3, generator=draw) + 0.5, torch.randn(9, 4, 3, generator=draw)
        gates = torch.tensor([[1.0, 0.0, 0.0]]).repeat(9, 1)
        gates[:, 1] = torch.tensor([1, 0, 0.5, 1, 0, 0, 1, 1, 0])
        gates[4, 2] = 1
        change, error = controller.change(now, before, gates)
        for c in range(2):
            size = typical_size(calibration)[c].item()
            seen = calibration[:, c].tolist()
            scale = sum(x * x for x in seen) / sum(x * shown(x, size) for x in seen)
            found = []
            for ours, theirs in zip(now[..., c].tolist(), before[..., c].tolist(), strict=True):
                found.append(sum(scale * shown(x - y, size) for x in ours for y in theirs) / 8)
            gate = gates[:, c].tolist()
            mean = sum(g * x for g, x in zip(gate, found, strict=True)) / sum(gate)
            n = sum(gate) ** 2 / sum(g * g for g in gate)
            square = sum((g * (x - mean)) ** 2 for g, x in zip(gate, found, strict=True)) / sum(gate) ** 2
            assert change[c].item() == pytest.approx(mean, rel=1e-5)
            assert error[c].item() == pytest.approx((square * n / (n - 1)) ** 0.5, rel=1e-5)
        assert error[2].isnan()  # of one prompt
        assert controller.change(now, before, gates * math.nan)[1].isnan().all()
        assert controller.change(now, now, gates)[0].tolist() == pytest.approx(
            [0, 0, 0], abs=1e-6
        )  # nothing has changed

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

    def test_bias_against_a_slow_reference(self):
        """Two concepts, probe by probe; one of them is not always measured."""
        controller = HoldController([0.0, 0.1], 0.1)
        log_ratios, deltas = self.rows(WINDOW)
        deltas = deltas + 0.3
        controller.start(deltas, torch.ones_like(deltas))
        bias, doubt = [0.0, 0.0], [0.0, 0.0]
        for number, change in enumerate([[0.1, 0.0], [0.9, math.nan], [0.8, -0.2], [0.85, -0.3]]):
            seen = slice(128 * number, 128 * (number + 1))
            controller.observe((number + 1) * log_ratios[seen] + number, deltas[seen])
            controller.update()
            controller.correct(change, [0.2, 0.1])
            reading, noise = controller.amplification()
            for c in range(2):
                if math.isnan(change[c]):
                    continue
                off = change[c] - (reading[c].item() + bias[c])
                variance = (0.2, 0.1)[c] ** 2
                prior = max(doubt[c] + DRIFT**2 + noise[c].item() ** 2, off**2 - variance)
                bias[c] += prior / (prior + variance) * off
                doubt[c] = prior * variance / (prior + variance)
            assert controller.bias.tolist() == pytest.approx(bias)
            assert controller._bias.doubt.tolist() == pytest.approx(doubt)

    def test_a_noisy_probe_moves_little(self):
        """64 rollouts of a rare concept: a change of one standard error is no reason to let go."""
        deltas = torch.zeros(WINDOW, 1)
        deltas[::20] = 6.0
        controller = started(deltas)
        controller.observe(torch.zeros(WINDOW), deltas)
        controller.update()
        before = controller.strengths.item()
        controller.correct([-0.1], [0.1])
        controller.update()
        assert 0.8 * before < controller.strengths.item() <= before
        for _ in range(20):  # said often enough, it is one
            controller.correct([-0.1], [0.03])
        controller.update()
        assert controller.strengths.item() < 0.7 * before

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
