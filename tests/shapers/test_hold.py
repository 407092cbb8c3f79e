"""The controller of held concepts, by itself: against slow references in float64."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch

from shapedpo.shapers.correction import DRIFT
from shapedpo.shapers.hold import SHORTEST, UNREAD, WINDOW, HoldController
from shapedpo.shapers.pair_statistics import LEAST, RIDGE, presence, typical_size
from tests.shapers.held import Policy, held, saturated, shown, started


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
