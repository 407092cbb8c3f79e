"""The batch whose loss is being computed, and what has been found out about it."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from .concept import Concept
from .metrics import Pairs
from .shapers import ConceptSignal


class Batch:
    """The batch whose loss is being computed.

    Attributes:
        extras: What the collator added, unpacked.
        inputs: What TRL knows of it.
        mask: `(2B, T)`, all completion tokens, also those that leave the loss.
        ref_logps: The reference's log-probabilities, `(B,)` each, once it has been read.
        signals: The concepts' scores, once it has been read.
        non_finite: `(C,)`, how many of a concept's raw scores are not finite.
        features: Raw scores of the monitored features, `(2B, F)`, if there are any.
        pairs: What metrics need of it, if anything is read.
        leaving: `(2B, T)` bool, the tokens that leave the loss, if any may.
        shares: By name of the metric, the numbers of which the log has the quotient, both summed over processes.
        tilt: `(2B,)`, what was taken from the reference's log-probabilities that TRL was handed, if anything.
        penalty: What held concepts add to TRL's loss, if there are any.
        loss_context: Open until TRL has computed the loss.
    """

    def __init__(self, extras: dict[str, Tensor], inputs: dict[str, Any]) -> None:
        self.extras = extras
        self.inputs = inputs
        self.mask: Tensor = inputs["completion_mask"]
        self.ref_logps: Any = None
        self.signals: list[ConceptSignal] = []
        self.non_finite = torch.empty(0)
        self.features: Tensor | None = None
        self.pairs: Pairs | None = None
        self.leaving: Tensor | None = None
        self.shares: dict[str, tuple[Tensor, Tensor]] = {}
        self.tilt: Tensor | None = None
        self.penalty: Tensor | None = None
        self.loss_context = ExitStack()

    def share(self, concept: Concept, name: str, part: Tensor, whole: Tensor | None = None) -> None:
        """Have the share of `part` in `whole`, of the same shape, logged as `concepts/<concept>/<name>`; by default its mean."""
        whole = torch.ones_like(part) if whole is None else whole
        self.shares[f"concepts/{concept.name}/{name}"] = (part.float().sum(), whole.float().sum())
