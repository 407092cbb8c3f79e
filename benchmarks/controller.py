"""What the controller of held concepts does, as a key to results that were made with it."""

from __future__ import annotations

import functools
import hashlib

import torch

from shapedpo.shapers.hold import HoldController


@functools.cache
def fingerprint(corrected: bool = False) -> str:
    """Stands for the strengths that the controller finds on pairs that are made up, always the same ones, to four digits.

    So results stay valid while the controller does what it did, however it is written, and no longer.

    Args:
        corrected: Whether probe rollouts correct it.
    """
    draw = torch.Generator().manual_seed(0)
    normal = functools.partial(torch.randn, generator=draw)
    controller = HoldController([0.0, 0.5, 0.0], 0.1, spared=torch.tensor([[True, False, True]]))
    found = []
    for step in range(40):
        n = 600 if step == 0 else 16
        gates = torch.stack([torch.ones(n), (torch.rand(n, generator=draw) < 0.5).float(), torch.ones(n)], dim=1)
        others, own = normal(n, 1), torch.tensor([3.0, 3.0, 0.01])  # the last held one has next to nothing of its own
        deltas = gates * (own * normal(n, 3).pow(3) + others)
        log_ratios = (deltas[:, 0] - others[:, 0] + 3 * normal(n)) * max(0, step - 20) / 10
        if step == 0:
            controller.start(deltas, gates, others)
        else:
            controller.observe(log_ratios, deltas, gates=gates, others=others)
            controller.update()
        if corrected and step % 10 == 5:
            controller.correct([0.3, -0.2, 0.0], [0.1, 0.1, 0.1])
        found += controller.strengths.tolist()
    return hashlib.sha256(" ".join(f"{strength:.4g}" for strength in found).encode()).hexdigest()[:8]
