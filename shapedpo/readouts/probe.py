r"""Readouts that were trained to tell a concept: a linear probe and a causal attention probe.

The linear probe is \\( w \cdot h_t + b \\) of the hidden state at each token, pooled over the completion's tokens.

The attention probe weighs tokens by a score of their own, whatever the reading position:

\\( z_t = b + \sum_h \frac{\sum_{s \le t} e^{q_h \cdot h_s}\, v_h \cdot h_s}{\sum_{s \le t} e^{q_h \cdot h_s}} \\),

s over the completion's tokens. A ratio of cumulative sums, so it takes memory in proportion to T, and gives a score at each position, which
no later token changes. A completion's score is that of its last token, which has seen them all.

Source: METHOD of Bergen et al., "Anatomy of Post-Training" (arXiv 2606.12360), where probes are one of the readouts. The form of attention
is ours. `shapedpo fit` trains both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from .base import ActivationReader, Readout, check_pooling, fingerprint, register
from .files import read_place, read_tensors


LINEAR, ATTENTION = ("weight", "bias"), ("query", "value", "bias")
"""Names of the tensors in a file: `(d_in,)` and `()`; `(H, d_in)`, `(H, d_in)` and `()`."""
OUTPUTS = ("logit", "probability")
"""What an attention probe's score is."""
_SMALLEST = -600.0
"""Keys this far below a sequence's largest, in nats, weigh as if they were here: in float64 no sum of weights is 0 then."""


@register
@dataclass(frozen=True)
class LinearProbe(Readout):
    """A linear probe of the hidden states at one place.

    Args:
        path: A safetensors file with `weight` and `bias`, and in the metadata where it reads, as `shapedpo fit` writes it.
        pooling: How a completion's tokens become one score: `"mean"`, `"max"` or `"freq"`, the fraction of tokens that score above 0. By
            default that of the file, with which it was trained.

    Raises:
        ValueError: If the pooling is unknown.
    """

    type: ClassVar[str] = "linear_probe"

    path: str
    pooling: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", str(self.path))
        if self.pooling is not None:
            check_pooling(self.pooling)

    def load(self) -> LinearProbeReader:
        """Read the file.

        Raises:
            ValueError: If it is missing, or holds no linear probe or no place to read it at.
        """
        (weight, bias), metadata = read_tensors(self.path, LINEAR, "the linear probe")
        pooling = self.pooling or metadata.get("pooling", "mean")
        check_pooling(pooling)
        _check_shapes(self.path, (weight.dim(), bias.dim()), (1, 0), weight, bias)
        return LinearProbeReader(weight, bias, pooling, read_place(self.path, metadata), metadata.get("model_name"))


@register
@dataclass(frozen=True)
class AttentionProbe(Readout):
    """A causal attention probe of the hidden states at one place.

    Args:
        path: A safetensors file with `query`, `value` and `bias`, and in the metadata where it reads, as `shapedpo fit` writes it.
        output: `"logit"`, the probe's sum, or `"probability"`, its sigmoid: that the completion shows the concept, where as many do as do not.
            Completions without the concept differ in their logits by as much as some with it differ from some without; of that nothing is
            left in their probabilities.

    Raises:
        ValueError: If the output is unknown.
    """

    type: ClassVar[str] = "attention_probe"

    path: str
    output: str = "logit"

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", str(self.path))
        if self.output not in OUTPUTS:
            raise ValueError(f"Unknown output {self.output!r} of a probe. Choose one of {', '.join(OUTPUTS)}.")

    def load(self) -> AttentionProbeReader:
        """Read the file.

        Raises:
            ValueError: If it is missing, or holds no attention probe or no place to read it at.
        """
        (query, value, bias), metadata = read_tensors(self.path, ATTENTION, "the attention probe")
        _check_shapes(self.path, (query.shape, value.dim(), bias.dim()), (value.shape, 2, 0), query, value, bias)
        place, model_name = read_place(self.path, metadata), metadata.get("model_name")
        return AttentionProbeReader(query, value, bias, place, model_name, self.output)


class LinearProbeReader(ActivationReader):
    """Reads `x @ weight + bias`.

    Args:
        weight: `(d_in,)`.
        bias: `()`.
        pooling: One of `POOLINGS`.
        hook_name: Where to read.
        model_name: The model that it was trained on.
    """

    n_features = 1

    def __init__(
        self, weight: Tensor, bias: Tensor, pooling: str, hook_name: str, model_name: str | None = None
    ) -> None:
        self.pooling, self.hook_name, self.model_name = pooling, hook_name, model_name
        self.d_in = len(weight)
        self._weight, self._bias = weight.detach().float(), bias.detach().float()
        self._fingerprint = fingerprint(self._weight, self._bias, pooling, hook_name)

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def to(self, device: torch.device | str) -> LinearProbeReader:
        self._weight, self._bias = self._weight.to(device), self._bias.to(device)
        return self

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return (x.float() @ self._weight + self._bias)[..., None]

    def directions(self) -> Tensor:
        return (self._weight / self._weight.norm())[None]


class AttentionProbeReader(ActivationReader):
    """Reads a completion with attention over its tokens.

    Args:
        query: `(H, d_in)`, whose product with a token's state is how much it counts, as a logarithm.
        value: `(H, d_in)`, whose product with it is what it says.
        bias: `()`.
        hook_name: Where to read.
        model_name: The model that it was trained on.
        output: One of [`OUTPUTS`].
    """

    n_features = 1
    pooling = "last"

    def __init__(
        self,
        query: Tensor,
        value: Tensor,
        bias: Tensor,
        hook_name: str,
        model_name: str | None = None,
        output: str = "logit",
    ) -> None:
        self.hook_name, self.model_name, self.output = hook_name, model_name, output
        self.d_in = query.shape[1]
        self._query, self._value, self._bias = (tensor.detach().float() for tensor in (query, value, bias))
        self._fingerprint = fingerprint(self._query, self._value, self._bias, hook_name, output)

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def to(self, device: torch.device | str) -> AttentionProbeReader:
        self._query, self._value, self._bias = (t.to(device) for t in (self._query, self._value, self._bias))
        return self

    def encode(self, x: Tensor) -> Tensor:
        """Score every token, all tokens of `(..., T, d_in)` counting as the completion's."""
        rows = x.reshape(-1, *x.shape[-2:])
        return self.tokens(rows, torch.ones_like(rows[..., 0], dtype=torch.bool)).view(*x.shape[:-1], 1)

    @torch.no_grad()
    def tokens(self, x: Tensor, mask: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            keys, values = x.float() @ self._query.T, (x.float() @ self._value.T).double()  # (N, T, H)
            outside = ~mask[..., None]  # where prompts and padding may overflow
            keys, values = keys.masked_fill(outside, -torch.inf), values.masked_fill(outside, 0.0)
            keys = keys - keys.amax(dim=1, keepdim=True).clamp(min=torch.finfo(keys.dtype).min)
            weights = keys.double().clamp(min=_SMALLEST).exp() * mask[..., None]
            ratio = (weights * values).cumsum(dim=1) / weights.cumsum(dim=1)  # 0 / 0 before the first key
            logits = ratio.sum(dim=-1) + self._bias
            scores = logits if self.output == "logit" else logits.sigmoid()
            return torch.where(mask, scores, 0.0)[..., None].float()

    def directions(self) -> Tensor:
        """An attention probe has none.

        Raises:
            ValueError: Always.
        """
        raise ValueError("an attention probe has no direction in the activations. Use a LinearProbe or a Direction")

    def _reduce(self, x: Tensor, inside: Tensor) -> Tensor:
        scores = self.tokens(x, inside)  # (N, T, 1)
        last = inside.sum(dim=1).clamp(min=1) - 1
        return scores[torch.arange(len(x), device=x.device), last]


def save_probe(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write a probe.

    Args:
        path: Of the file.
        tensors: As [`LinearProbe`] or [`AttentionProbe`] expect them.
        metadata: At least `hook_name`; what else is known of it.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    kept = {name: tensor.detach().cpu().float().contiguous() for name, tensor in tensors.items()}
    save_file(kept, path, metadata={"format": "pt", **{key: str(value) for key, value in metadata.items()}})


def _check_shapes(path: str, found: Any, expected: Any, *tensors: Tensor) -> None:
    if found != expected:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise ValueError(
            f"The tensors of '{path}' have the shapes {shapes}. Expected (d,) and () of a linear probe, (H, d), (H, d) and () of an "
            "attention probe."
        )
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise ValueError(f"The probe in '{path}' is not finite.")
