"""How well a readout tells responses that show a concept from those that do not, and what its direction does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..readouts.responses import pad_examples, tokenize_response
from ..steering import Steering, make_edit
from .contrast import Contrast


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


FEW = 10
"""Responses of a kind that are needed to judge by."""


class Quality(NamedTuple):
    """On responses that nothing was fitted on.

    Attributes:
        auroc: Chance that a response that shows the concept scores above one that does not.
        low: Of its 95 % interval.
        high: Of its 95 % interval.
        f1: With the threshold.
        threshold: The score above which F1 is best on the responses that were fitted on.
    """

    auroc: float
    low: float
    high: float
    f1: float
    threshold: float


def judge_scores(scores: np.ndarray, labels: np.ndarray, fit: np.ndarray, held: np.ndarray) -> Quality:
    """How well scores tell labels.

    Args:
        scores: `(N,)`.
        labels: `(N,)` bool.
        fit: The numbers of those that were fitted on.
        held: Of those to judge on.
    """
    from sklearn.metrics import f1_score, roc_auc_score

    from ..thresholds import best_f1

    threshold = best_f1(torch.from_numpy(scores[fit]), torch.from_numpy(labels[fit]))
    area = float(roc_auc_score(labels[held], scores[held]))
    low, high = auroc_interval(area, int(labels[held].sum()), int((~labels[held]).sum()))
    return Quality(area, low, high, float(f1_score(labels[held], scores[held] > threshold)), threshold)


class Confusion(NamedTuple):
    """How a readout answers to what it is not for, on responses that nothing was fitted on.

    Attributes:
        name: Of the kind of responses, which lack the concept.
        responses: How many there are.
        auroc: Chance that a response that shows the concept scores above one of these.
        loudness: How far their mean score is above that of all others that lack the concept, as a share of how far the concept's is.
    """

    name: str
    responses: int
    auroc: float
    loudness: float


def confusions(scores: np.ndarray, labels: np.ndarray, kinds: Mapping[str, np.ndarray]) -> list[Confusion]:
    """What a readout confuses the concept with, the worst first.

    Args:
        scores: `(N,)`.
        labels: `(N,)` bool.
        kinds: `(N,)` bool each, of [`~shapedpo.probes.contrast.Contrast.hard`]; those of fewer than [`FEW`] responses are left out.
    """
    from sklearn.metrics import roc_auc_score

    found = []
    for name, rows in kinds.items():
        rest = ~labels & ~rows
        if rows.sum() < FEW or not rest.any():
            continue
        both, floor = labels | rows, scores[rest].mean()
        loudness = (scores[rows].mean() - floor) / (scores[labels].mean() - floor)
        area = float(roc_auc_score(labels[both], scores[both]))
        found.append(Confusion(name, int(rows.sum()), area, float(loudness)))
    return sorted(found, key=lambda one: one.auroc)


def auroc_interval(area: float, positives: int, negatives: int) -> tuple[float, float]:
    """A conservative 95 % interval of an AUROC.

    Its variance is at most `A (1 - A) / min(positives, negatives)` (van Dantzig, 1951; Birnbaum and Klose, 1957), that of a share of so
    many trials: so the interval is Wilson's, which does not vanish where the two kinds are told apart without fault.
    """
    n, z = min(positives, negatives), 1.959964
    middle = (area + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(area * (1 - area) / n + z * z / (4 * n * n))
    return max(middle - half, 0.0), min(middle + half, 1.0)


@torch.no_grad()
def steering_effect(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    contrast: Contrast,
    hook_name: str,
    unit: Tensor,
    size: float,
    *,
    batch_size: int = 8,
    max_length: int | None = None,
) -> float:
    """What adding a direction does to what the model would say: nats a token.

    The mean log-probability of a token, of the responses that show the concept less that of those that do not, with the direction added to the
    states that predict the response, less the same with it subtracted, halved: so what any push at all does, which is harm, cancels. Above 0 the direction makes the model likelier to show the concept; a
    readout whose direction does nothing here reads the concept without being what brings it about.

    Args:
        model: The model, on its device.
        tokenizer: Its tokenizer.
        contrast: The responses.
        hook_name: Where it is added.
        unit: `(d,)`.
        size: How much of it, in the units of the hidden states: by convention the distance between the two kinds' means along it.
        batch_size: Responses in a forward pass.
        max_length: Where prompt and response together are cut off, in tokens.
    """
    examples = [tokenize_response(tokenizer, *response) for response in contrast.responses]
    examples = [(ids[:max_length], start) for ids, start in examples]
    order = sorted(range(len(examples)), key=lambda index: len(examples[index][0]))
    change = np.zeros(len(examples))
    edit = make_edit(model, hook_name, unit[None].float(), None, ablate=False)
    was_training = model.training
    model.eval()
    try:
        for first in range(0, len(order), batch_size):
            rows = order[first : first + batch_size]
            ids, attention, mask = pad_examples([examples[row] for row in rows], model.device)
            means, tokens = [], mask[:, 1:].sum(dim=1).clamp(min=1)
            for amount in (-size, size):
                with Steering({0: edit}) as steering:
                    steering.aim({0: torch.full((len(rows),), amount, device=ids.device)}, _predicting(mask))
                    means.append(response_logps(model, ids, attention, mask) / tokens)
            change[rows] = (means[1] - means[0]).double().cpu().numpy() / 2
    finally:
        model.train(was_training)
    kept = np.array([start < len(ids) for ids, start in examples])
    shown = contrast.labels
    return float(change[shown & kept].mean() - change[~shown & kept].mean())


def _predicting(mask: Tensor) -> Tensor:
    """`(N, T)` bool: the positions that predict a token of the mask."""
    return torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)


def response_logps(model: Any, ids: Tensor, attention: Tensor, mask: Tensor) -> Tensor:
    """`(N,)`, the log-probability of the tokens of the mask, all together."""
    logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits[:, :-1].float()
    logps = torch.gather(torch.log_softmax(logits, dim=-1), 2, ids[:, 1:, None])[..., 0]
    return (logps * mask[:, 1:]).sum(dim=1)
