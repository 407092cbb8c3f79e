"""The controller of held concepts on a policy simulated pair by pair."""

from __future__ import annotations

import math

import pytest
import torch

from shapedpo.shapers.hold import HoldController
from tests.shapers.held import Policy, held


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
