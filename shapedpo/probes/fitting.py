r"""Training probes: the same objective for a linear probe and an attention probe, by L-BFGS.

With \\( z \\) the score of a response, the objective is the mean of

- `pairs`: \\( -\log\sigma(z_+ - z_-) \\) over every two responses to one prompt of which one shows the concept and the other does not;
- `bce`: \\( -\log\sigma(\pm z) \\) over all responses, those that show it and those that do not weighing the same in all;

responses weigh what they are given, a pair what its negative is; plus \\( \frac{\mathrm{l2}}{2} \lVert w \rVert^2 \\) of weights on inputs that were standardised and divided by \\( \sqrt d \\), so that one `l2` fits
every width. What is returned works on the inputs as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


OBJECTIVES = ("pairs", "bce")
L2 = 1e-4
STEPS = 300
"""Iterations of L-BFGS, at most."""


def difference_of_means(means: Tensor, labels: np.ndarray, weights: np.ndarray | None = None) -> Tensor:
    """Unit vector from responses that lack the concept to those that show it, `(d,)` float64, of their mean states `(N, d)`."""
    weigh = torch.ones(len(labels)) if weights is None else torch.from_numpy(weights)
    shown = torch.from_numpy(labels)
    kinds = [torch.einsum("n,nd->d", weigh[k].double() / weigh[k].sum(), means[k].double()) for k in (shown, ~shown)]
    return F.normalize(kinds[0] - kinds[1], dim=0)


def fit_linear(
    means: Tensor,
    labels: np.ndarray,
    pairs: np.ndarray,
    objective: str,
    l2: float = L2,
    weights: np.ndarray | None = None,
) -> dict[str, Tensor]:
    """Train a linear probe on pooled states.

    Args:
        means: `(N, d)`, each response's state, pooled over its tokens.
        labels: `(N,)` bool.
        pairs: `(P, 2)` of [`~shapedpo.probes.contrast.Contrast.pairs`].
        objective: One of [`OBJECTIVES`].
        l2: Weight of the squared weights.
        weights: `(N,)`, what each response counts, of those that show the concept and of the others apart; by default alike.

    Returns:
        `weight`, `(d,)`, and `bias`, `()`, float32.
    """
    mean, scale = _standard(means.double())
    x = (means.double() - mean) / scale
    w = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    b = torch.zeros((), dtype=torch.float64, requires_grad=True)
    loss = _objective(labels, pairs, objective, weights)
    _minimise(lambda: loss(x @ w + b) + l2 / 2 * w.square().sum(), [w, b])
    weight = w.detach() / scale
    bias = b.detach() - mean @ weight
    if objective == "pairs":  # which leave it free
        bias = _middle(means.double() @ weight, labels)
    return {"weight": weight.float(), "bias": bias.float()}


def fit_attention(
    states: Tensor,
    counts: Tensor,
    labels: np.ndarray,
    pairs: np.ndarray,
    objective: str,
    l2: float = L2,
    heads: int = 1,
    seed: int = 0,
    weights: np.ndarray | None = None,
) -> dict[str, Tensor]:
    """Train an attention probe on the states of all tokens, by its score at each response's last one.

    Args:
        states: `(M, d)`, those of all responses one after the other.
        counts: `(N,)`, how many tokens each response has.
        labels: `(N,)` bool.
        pairs: `(P, 2)`.
        objective: One of [`OBJECTIVES`].
        l2: Weight of the squared weights, of queries and values.
        heads: H.
        seed: Of the first queries, which are near 0: the probe starts from a mean over tokens.
        weights: `(N,)`, as in [`fit_linear`].

    Returns:
        `query` and `value`, `(H, d)`, and `bias`, `()`, float32.
    """
    mean, scale = _standard(states)
    x = (states - mean) / scale  # float32: there are many
    rows = torch.repeat_interleave(torch.arange(len(counts)), counts)
    generator = torch.Generator().manual_seed(seed)
    query = 0.1 * torch.randn(heads, x.shape[1], generator=generator)
    value, b = torch.zeros_like(query, requires_grad=True), torch.zeros((), requires_grad=True)
    query.requires_grad_()
    loss = _objective(labels, pairs, objective, weights)

    def scores() -> Tensor:
        return _attended(x @ query.T, x @ value.T, rows, len(counts)) + b

    _minimise(lambda: loss(scores()) + l2 / 2 * (query.square().sum() + value.square().sum()), [query, value, b])
    bias = b.detach() - (mean @ (value.detach() / scale).T).sum()
    if objective == "pairs":
        bias = bias + _middle((scores() - b).detach(), labels)
    return {"query": (query.detach() / scale).float(), "value": (value.detach() / scale).float(), "bias": bias.float()}


def _attended(keys: Tensor, values: Tensor, rows: Tensor, n: int) -> Tensor:
    """`(N,)` scores of responses, of their tokens' `(M, H)`."""
    index = rows[:, None].expand_as(keys)
    with torch.no_grad():
        largest = keys.new_full((n, keys.shape[1]), -torch.inf).scatter_reduce(0, index, keys, "amax")
    weights = (keys - largest[rows]).exp()
    total = keys.new_zeros(n, keys.shape[1]).index_add(0, rows, weights)
    return (keys.new_zeros(n, keys.shape[1]).index_add(0, rows, weights * values) / total).sum(dim=1)


def _objective(
    labels: np.ndarray, pairs: np.ndarray, objective: str, weights: np.ndarray | None
) -> Callable[[Tensor], Tensor]:
    weigh = torch.ones(len(labels)) if weights is None else torch.from_numpy(weights).float()
    if objective == "pairs":
        positive, negative = torch.from_numpy(pairs).T
        return lambda z: _mean(-F.logsigmoid(z[positive] - z[negative]), weigh[negative])
    if objective != "bce":
        raise ValueError(f"Unknown objective {objective!r}. Choose one of {', '.join(OBJECTIVES)}.")
    shown = torch.from_numpy(labels)
    return lambda z: (
        (_mean(-F.logsigmoid(z[shown]), weigh[shown]) + _mean(-F.logsigmoid(-z[~shown]), weigh[~shown])) / 2
    )


def _mean(losses: Tensor, weights: Tensor) -> Tensor:
    return (losses * weights).sum() / weights.sum()


def _minimise(objective: Callable[[], Tensor], parameters: Sequence[Tensor]) -> None:
    optimiser = torch.optim.LBFGS(
        list(parameters), max_iter=STEPS, history_size=20, line_search_fn="strong_wolfe", tolerance_grad=1e-7
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = objective()
        value.backward()
        return value

    optimiser.step(closure)


def _standard(x: Tensor) -> tuple[Tensor, Tensor]:
    """`(d,)` each: the mean of inputs, and what to divide them by after taking it away."""
    std = x.std(dim=0)
    return x.mean(dim=0), torch.where(std > 0, std, 1.0) * x.shape[1] ** 0.5


def _middle(scores: Tensor, labels: np.ndarray) -> Tensor:
    """What to add to scores so that 0 is half-way between the means of the two kinds."""
    shown = torch.from_numpy(labels)
    return -(scores[shown].mean() + scores[~shown].mean()) / 2
