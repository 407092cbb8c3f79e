"""What the tests of held concepts share: slow references, and a policy simulated pair by pair."""

from __future__ import annotations

import math
import statistics

import torch

from shapedpo.shapers.hold import LARGEST, SPREADS, HoldController


def shown(x: float, size: float) -> float:
    """[`presence`] of one delta."""
    power = (x / (0.3 * size)) ** 8
    return math.copysign(power / (1 + power), x)


def saturated(x: float, values: list[float]) -> float:
    """A log-ratio as it counts beside others."""
    middle = statistics.median_low(values)
    bound = max(LARGEST, SPREADS * 1.4826 * statistics.median_low(abs(value - middle) for value in values))
    return bound * math.tanh(x / bound)


def started(deltas, **options) -> HoldController:
    controller = HoldController([0.0] * deltas.shape[1], 0.1, **options)
    controller.start(deltas, torch.ones_like(deltas))
    return controller


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
