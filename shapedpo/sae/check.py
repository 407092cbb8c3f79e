"""How good an SAE is on the tokens that a run reads, and which of its features tell a concept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from ..readouts.base import ActivationReader
from ..readouts.responses import Response, read_responses


if TYPE_CHECKING:
    from sae_lens import SAE
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class SAEQuality(NamedTuple):
    """What [`check_sae`] finds.

    Attributes:
        tokens: Number of tokens that it was checked on.
        variance_explained: `1 - E[(x - x_hat)^2] / Var[x]` over them.
        l0: Mean number of active features a token.
        frequency: `(d_sae,)` float64, the fraction of tokens on which each feature is active.
    """

    tokens: int
    variance_explained: float
    l0: float
    frequency: Tensor

    @property
    def dead(self) -> float:
        """Fraction of features that are active on no token."""
        return float((self.frequency == 0).double().mean())


class _QualityReader(ActivationReader):
    """Sums up reconstruction and activity over all tokens that it is shown."""

    pooling = "max"
    fingerprint = ""
    n_features = 1

    def __init__(self, sae: SAE[Any], hook_name: str) -> None:
        from sae_lens.evals import ExplainedVarianceCalculator

        self.hook_name, self.d_in, self.sae = hook_name, sae.cfg.d_in, sae
        self.variance = ExplainedVarianceCalculator()
        self.active = torch.zeros(sae.cfg.d_sae, dtype=torch.float64)

    def to(self, device: torch.device | str) -> _QualityReader:
        self.sae.to(device)
        self.active = self.active.to(device)
        return self

    def encode(self, x: Tensor) -> Tensor:
        return self.sae.encode(x)

    def directions(self) -> Tensor:
        return self.sae.W_dec

    def pooled(self, x: Tensor, mask: Tensor) -> Tensor:
        for tokens in x[mask].float().split(1024):  # (tokens, d_in)
            activations = self.sae.encode(tokens)
            self.active += (activations != 0).sum(dim=0)
            self.variance.add_batch(sae_output=self.sae.decode(activations), hidden_acts=tokens)
        return x.new_zeros(len(x), 1, dtype=torch.float32)


@torch.no_grad()
def check_sae(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sae: SAE[Any],
    responses: Sequence[Response],
    *,
    hook_name: str | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
) -> SAEQuality:
    """Check an SAE on the tokens of responses, which are what a concept is read on.

    Args:
        model: The model whose activations are read.
        tokenizer: Its tokenizer.
        sae: The SAE.
        responses: With their prompts.
        hook_name: Where to read, if the SAE's metadata does not say or is wrong for the model.
        batch_size: Responses in a forward pass.
        max_length: Where prompt and response together are cut off, in tokens.

    Raises:
        ValueError: If the SAE gives something else than what it takes (a transcoder), or the model has no such hook.
    """
    metadata = sae.cfg.metadata
    if "transcoder" in sae.cfg.architecture():
        raise ValueError("A transcoder predicts another layer's activations: it has no reconstruction to check.")
    sae.turn_off_forward_pass_hook_z_reshaping()
    reader = _QualityReader(sae, hook_name or metadata.hf_hook_name or metadata.hook_name)
    read_responses(model, tokenizer, responses, reader, batch_size=batch_size, max_length=max_length, name="SAE")
    tokens = reader.variance.num_samples
    active = reader.active.cpu()
    return SAEQuality(tokens, reader.variance.compute(), float(active.sum()) / tokens, active / tokens)


def auroc(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of each column, ties counted half.

    Args:
        scores: (N, F) or (N,).
        labels: (N,) bool.

    Returns:
        (F,) or a scalar array.
    """
    positives, negatives = labels.sum(), (~labels).sum()
    ranks = rankdata(scores, axis=0)
    return (ranks[labels].sum(axis=0) - positives * (positives + 1) / 2) / (positives * negatives)
