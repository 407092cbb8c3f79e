"""Where in a completion a concept is read: one number for each token, for showing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...decoding import TokenTexts
from ...readouts import ActivationReader, Regex
from ...readouts.base import WrappedReader


if TYPE_CHECKING:
    from ..access import TrainerAccess


class TokenReader(WrappedReader):
    """Reads every token of a few completions, and keeps what it reads.

    Args:
        reader: Of the concept.
        std: `(F,)`, what the raw scores are divided by.
    """

    def __init__(self, reader: ActivationReader, std: Tensor) -> None:
        super().__init__(reader)
        self.std = std
        self.values = torch.empty(0)
        """`(N, T)`, after a pass: the mean of the features' standardised activations."""

    def pooled(self, x: Tensor, mask: Tensor) -> Tensor:
        # A row at a time: of a whole SAE, all tokens at once would be too many.
        rows = zip(x.split(1), mask.split(1), strict=True)
        self.values = torch.cat([(self.tokens(row, inside) / self.std).mean(dim=-1) for row, inside in rows])
        return super().pooled(x, mask)


def token_activations(run: TrainerAccess, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Read completions token by token, with the reference.

    Args:
        run: The trainer.
        rows: With `prompt_ids` and `chosen_ids`; the rejected side is not looked at.

    Returns:
        For each row its `completion`, the `tokens` that make it up, the concepts' `scores` and their `activations`: for each concept one
        number a token, in standard deviations and not negative. Concepts read by a function of text have no activations.
    """
    concepts, readers, columns = run.concepts, run.reader.readers, run.reader.columns
    statistics = run.calibration.statistics
    watched = {
        concept.name: TokenReader(reader, statistics.std[part])
        for concept, reader, part in zip(concepts, readers, columns, strict=True)
        if isinstance(reader, ActivationReader)
    }
    scores, mask = run.read_tokens(rows, list(watched.values()))
    split = TokenTexts(run.tokenizer)
    found = []
    for i, row in enumerate(rows):
        ids = row["chosen_ids"]
        tokens = split(ids)
        text = "".join(tokens)
        positions = mask[i].nonzero()[:, 0]
        activations: dict[str, list[float]] = {}
        for concept in concepts:
            if concept.name in watched:
                values = watched[concept.name].values[i, positions].clamp(min=0).tolist()
                activations[concept.name] = [round(value, 3) for value in values] + [0.0] * (len(ids) - len(values))
            elif isinstance(concept.readout, Regex):
                activations[concept.name] = _matched(concept.readout, tokens, text)
        found.append(
            {
                "completion": text,
                "tokens": tokens,
                "scores": {c.name: round(float(scores[i, j]), 4) for j, c in enumerate(concepts)},
                "activations": activations,
            }
        )
    return found


def _matched(readout: Regex, tokens: list[str], text: str) -> list[float]:
    """1 for each token that a match of the pattern touches."""
    spans = [match.span() for match in readout.compiled().finditer(text)]
    marks, start = [], 0
    for token in tokens:
        end = start + len(token)
        marks.append(float(any(start < last and first < end for first, last in spans)))
        start = end
    return marks
