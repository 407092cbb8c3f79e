"""What the monitored features of a run are called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from .features import load_labels, promoted_tokens
from .records import Record
from .sae import FeatureMonitor


if TYPE_CHECKING:
    from .access import TrainerAccess


class FeatureNames:
    """Names features as they are needed, once each.

    Args:
        run: The trainer, whose reference has the unembedding.
        labels: File of labels, or `None`.
        width: Features of the SAE, whichever are watched; 0 where none are.

    Raises:
        FileNotFoundError, ValueError: If the file cannot be read, or is of a wider SAE.
    """

    def __init__(self, run: TrainerAccess, labels: str | None, width: int) -> None:
        self._run = run
        self._labels = load_labels(labels) if labels is not None else {}
        if width and max(self._labels, default=0) >= width:
            raise ValueError(
                f"`feature_labels={labels!r}` labels feature {max(self._labels)}, and the SAE has {width:,} features. Name the labels of that SAE."
            )
        self._known: dict[int, Record] = {}

    def of(self, columns: Sequence[int], features: FeatureMonitor) -> dict[int, Record]:
        """Names of some features; all processes must ask together, as the unembedding may be sharded.

        Args:
            columns: Which, by their places among the monitored ones.
            features: The monitored ones.

        Returns:
            By column: `feature`, its place in the SAE; `label`, of the file, or made of the tokens; the `tokens` that excite it most;
            those that it `promotes`.
        """
        new = [column for column in columns if column not in self._known]
        if new:
            tokenizer, statistics = self._run.tokenizer, features.statistics
            # A transcoder's too: they go into the residual stream, as an MLP's output does.
            directions = features.reader.writes(torch.tensor(new))
            model = self._run.accelerator.unwrap_model(self._run.reference)
            for column, ids in zip(new, promoted_tokens(directions, model), strict=True):
                feature = int(statistics.ids[column])
                tokens, promotes = (
                    [tokenizer.decode([token]).strip() for token in part]
                    for part in (statistics.exciting.tokens(column), ids)
                )
                told = ", ".join(filter(None, tokens)) or ", ".join(filter(None, promotes))
                label = self._labels.get(feature) or told or f"feature {feature}"
                self._known[column] = {"feature": feature, "label": label, "tokens": tokens, "promotes": promotes}
        return self._known
