"""Every feature of an SAE, watched: what its scores mean, its running estimates, and the pair behind each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from ..readouts.sae_reader import SAEReader
from .estimates import Window
from .features import Exciting
from .pairs import TopPairs


class FeatureStatistics(NamedTuple):
    """What the features' raw scores mean, by the calibration sample. `(F,)` float32 each.

    Attributes:
        ids: `(F,)` int64, the features' places in the SAE.
        mean: Mean raw score of a completion.
        std: Its standard deviation, 1 where it never varied.
        delta: Mean of chosen minus rejected, in standard deviations: what the data pushes before the first step.
        exciting: The completions that excite each feature most.
    """

    ids: Tensor
    mean: Tensor
    std: Tensor
    delta: Tensor
    exciting: Exciting

    def tensors(self) -> dict[str, Tensor]:
        """All of them by name, for a checkpoint."""
        exciting = {f"exciting.{name}": tensor for name, tensor in self.exciting._asdict().items()}
        return {"ids": self.ids, "mean": self.mean, "std": self.std, "delta": self.delta, **exciting}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> FeatureStatistics:
        """What gave these tensors."""
        exciting = Exciting(tensors["exciting.activation"], tensors["exciting.token"])
        return cls(tensors["ids"], tensors["mean"], tensors["std"], tensors["delta"], exciting)

    def narrowed(self, keep: Tensor) -> FeatureStatistics:
        """Those of some features only."""
        exciting = Exciting(*(tensor[:, keep] for tensor in self.exciting))
        return FeatureStatistics(self.ids[keep], self.mean[keep], self.std[keep], self.delta[keep], exciting)


class FeatureCalibration:
    """Adds up the calibration pass, batch by batch, so that no table of all features is ever held.

    Args:
        n_features: F.
        device: Where the sums live.
    """

    def __init__(self, n_features: int, device: torch.device) -> None:
        # Squares of raw scores differ by orders of magnitude: sums in float64, what is made of them in float32.
        self.sums = torch.zeros(3, n_features, dtype=torch.float64, device=device)
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.exciting = Exciting.none(n_features, device)

    def add(self, features: Tensor, tokens: Tensor, keep: Tensor) -> None:
        """Add a batch of B pairs.

        Args:
            features: `(2B, F)` raw scores, chosen completions first.
            tokens: `(2B, F)` int64, the token on which each is that large.
            keep: `(B,)` bool, the pairs that count.
        """
        chosen, rejected = (features * keep.repeat(2)[:, None]).double().chunk(2)
        self.sums += torch.stack(
            [
                (chosen + rejected).sum(dim=0),
                (chosen.square() + rejected.square()).sum(dim=0),
                (chosen - rejected).sum(0),
            ]
        )
        self.count += keep.sum()
        self.exciting = self.exciting.merged(features * keep.repeat(2)[:, None], tokens)

    def finish(self, accelerator: Accelerator) -> FeatureStatistics:
        """The statistics over all processes."""
        sums, count, exciting = self.sums, self.count, self.exciting
        if accelerator.num_processes > 1:
            sums, count = accelerator.reduce(sums, "sum"), accelerator.reduce(count, "sum")
            exciting = exciting.over_processes(accelerator)
        n = 2 * count
        mean = sums[0] / n
        variance = (sums[1] / n - mean.square()).clamp(min=0) * n / (n - 1)
        # What rounding leaves of a constant is no variation.
        std = torch.where(variance > 1e-12 * (1 + mean.square()), variance.sqrt(), 1.0)
        ids = torch.arange(len(std), device=std.device)
        return FeatureStatistics(ids, mean.float(), std.float(), (sums[2] / count / std).float(), exciting)


class FeatureMonitor:
    """Running estimates of every monitored feature.

    Args:
        reader: Reads the features.
        statistics: What their scores mean.
        size: The window, in pairs over all processes.
    """

    def __init__(self, reader: SAEReader, statistics: FeatureStatistics, size: int) -> None:
        self.reader = reader
        self.statistics = statistics
        device = statistics.mean.device
        self.window = Window(len(statistics.mean), size, device)
        self.pairs = TopPairs(len(statistics.mean), 1, size, device)

    def update(
        self, features: Tensor, rows: Tensor | None, apart: Tensor, valid: Tensor, beta: float, world: int
    ) -> None:
        """Add a batch of B pairs: see [`Window.update`]. `features` are `(2B, F)` raw scores; a delta that is not finite counts as 0."""
        chosen, rejected = features.chunk(2)
        delta = (chosen - rejected) / self.statistics.std * valid[:, None]
        delta = delta.nan_to_num(0.0, 0.0, 0.0)  # one feature that overflows must not spoil its sums for good
        self.window.update(apart, beta, delta, world)
        if rows is not None:
            self.pairs.update(rows, apart, beta, delta, world)

    def standardised(self, features: Tensor) -> Tensor:
        """Raw scores, `(N, F)`, in standard deviations from the mean of the data."""
        return (features - self.statistics.mean) / self.statistics.std


def ranked(value: Tensor, se: Tensor, k: int) -> tuple[list[int], list[int]]:
    """The k scores that are most surely up, and the k that are most surely down.

    Ranked by the end of the 95 % interval that lies nearer to 0, so that a large value that is only noise does not lead.

    Args:
        value: `(F,)`.
        se: `(F,)` standard errors.
        k: How many at most; those whose interval holds 0 are left out.
    """
    sides = []
    for sign in (1, -1):
        bound = torch.nan_to_num(sign * value - 1.96 * se, nan=-torch.inf)
        best = bound.topk(min(k, len(bound)))
        sides.append([i for i, b in zip(best.indices.tolist(), best.values.tolist(), strict=True) if b > 0])
    return sides[0], sides[1]
