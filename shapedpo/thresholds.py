"""Where a score begins to show a concept: at a quantile of the data's scores, or where it tells labelled responses best."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .probes.contrast import Row, read_contrast
from .readouts.responses import tokenize_response


def labelled(path: str, owner: str) -> list[Row]:
    """Read a contrast set (see [`~shapedpo.probes.contrast.read_contrast`]).

    Raises:
        ValueError: If it is not one, or lacks responses that show the concept, or that do not.
    """
    try:
        rows = read_contrast([path])
    except ValueError as error:
        raise ValueError(f"{owner}: {error}") from error
    shown = sum(row.label for row in rows)
    if shown in (0, len(rows)):
        raise ValueError(
            f"{owner}: of the {len(rows)} responses of '{path}', {shown} show the concept: both kinds are needed."
        )
    return rows


def contrast_rows(path: str, tokenizer: Any) -> tuple[list[dict[str, Any]], Tensor]:
    """A contrast set as rows of TRL's, the responses as chosen completions, and their labels, `(N,)` bool."""
    rows, labels = [], []
    for row in labelled(path, "Method 'tokens'"):
        ids, start = tokenize_response(tokenizer, row.prompt, row.response)
        # One token will do on the side that is not looked at.
        rows.append({"prompt_ids": ids[:start], "chosen_ids": ids[start:], "rejected_ids": ids[-1:]})
        labels.append(row.label)
    return rows, torch.tensor(labels)


def upper_quantile(scores: Tensor, quantile: float) -> float:
    """The threshold above which at most `1 - quantile` of the scores lie, half-way between two of them.

    Not one of them: read again in other company, a token's score differs in its last bits.

    Args:
        scores: `(N,)`.
        quantile: Between 0 and 1.
    """
    ordered = scores.double().sort().values
    value = ordered[math.ceil(quantile * (len(ordered) - 1))]
    above = ordered[ordered > value]
    return float((value + above[0]) / 2 if len(above) else value)


def best_f1(scores: Tensor, labels: Tensor) -> float:
    """The threshold above which scores tell the labelled ones best, by F1: half-way between the neighbouring scores.

    Args:
        scores: `(N,)`.
        labels: `(N,)` bool.
    """
    order = scores.double().argsort(descending=True)
    ordered, hits = scores.double()[order], labels[order].double().cumsum(dim=0)
    n = torch.arange(1, len(ordered) + 1)
    f1 = 2 * hits / (n + labels.sum())
    # Equal scores stay together.
    following = torch.cat([ordered[1:], ordered[-1:] - 1])
    best = int(torch.where(following < ordered, f1, -1.0).argmax())
    return float((ordered[best] + following[best]) / 2)
