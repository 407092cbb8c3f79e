"""Activations over responses: their means, from which [`Direction.from_contrast`] takes a difference, or all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..capture import resolve_site
from .base import ActivationReader
from .responses import Response, read_responses


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class ActivationMean(ActivationReader):
    """Reads the activations themselves, so that pooling gives their mean."""

    pooling = "mean"
    fingerprint = ""

    def __init__(self, hook_name: str, d_in: int) -> None:
        self.hook_name = hook_name
        self.d_in = self.n_features = d_in

    def to(self, device: torch.device | str) -> ActivationMean:
        return self

    def encode(self, x: Tensor) -> Tensor:
        return x.float()

    def directions(self) -> Tensor:
        return torch.eye(self.d_in)


class ActivationTokens(ActivationMean):
    """Its `pooled` pools nothing and gives `(N, T, 1 + d)` float32: 1 where the mask is, and the activations there; else 0."""

    def pooled(self, x: Tensor, mask: Tensor) -> Tensor:
        return torch.cat([torch.ones_like(x[..., :1]), x], dim=-1).float() * mask[..., None]


def mean_activation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    responses: Sequence[Response],
    hook_name: str,
    batch_size: int = 8,
    name: str = "responses",
) -> Tensor:
    """Mean over responses of the mean activation over each response's tokens: `(d_model,)` float64 on the CPU.

    Raises:
        ValueError: If a response has no token, or the model has no such hook.
    """
    reader = ActivationMean(hook_name, resolve_site(model, hook_name).width)
    means = read_responses(model, tokenizer, responses, reader, batch_size=batch_size, name=name)
    return means.double().mean(dim=0)
