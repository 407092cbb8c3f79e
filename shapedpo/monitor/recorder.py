"""What a logging step comes to: records of the running estimates, of the features that move most, and of the rows behind both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .estimates import QUANTITIES, Estimates, Window
from .estimators import Estimate
from .features import GATHERED
from .names import FeatureNames
from .pairs import TopPairs
from .records import TEXT_LENGTH, Record, plain
from .sae import FeatureMonitor, ranked


if TYPE_CHECKING:
    from .access import TrainerAccess

TOP_FEATURES = 20


class StepRecorder:
    """Makes records. All processes must ask for them together; rows and their texts are on the main one.

    Args:
        run: The trainer.
        names: Names features.
        sae: What to call the SAE.
        texts: Whether rows are quoted, or go by their numbers alone.
    """

    def __init__(self, run: TrainerAccess, names: FeatureNames, sae: str | None, texts: bool) -> None:
        self.run = run
        self.names = names
        self.sae = sae
        self.texts = texts
        self.accelerator = run.accelerator

    def estimates(self, window: Window) -> Estimates:
        """The estimates of a window over all processes, on the host: one copy, however many figures are made of it."""
        return Window.estimates(self.summed(window.state()).cpu())

    def summed(self, tensor: Tensor) -> Tensor:
        """A tensor summed over processes."""
        return self.accelerator.reduce(tensor, "sum") if self.accelerator.num_processes > 1 else tensor

    def merged(self, pairs: TopPairs) -> Tensor:
        """The best of all processes' tables, `(C, k, fields)`."""
        if self.accelerator.num_processes == 1:
            return pairs.table
        parts = pairs.table.split(GATHERED)
        return torch.cat([pairs.merged(self.accelerator.gather(part[None])) for part in parts])

    def step(
        self, state: Any, pairs: int, estimates: Estimates, best: Estimate, strengths: Mapping[str, float]
    ) -> Record:
        """Each concept's estimates, and the share of the window that is in none of them.

        Args:
            state: The trainer's state.
            pairs: How many have been trained on.
            estimates: The concepts'.
            best: The best estimate of their changes.
            strengths: Those in force, by name.
        """
        concepts = {}
        for index, (concept, numbers) in enumerate(zip(self.run.concepts, _table(estimates), strict=True)):
            strength = plain(strengths.get(concept.name, 0.0)) if concept.shapes else None
            change = [plain(best.value[index]), plain(best.se[index])]
            concepts[concept.name] = {**numbers, "change": change, "strength": strength}
        return {
            "type": "step",
            "step": state.global_step,
            "epoch": plain(state.epoch or 0),
            "pairs": pairs,
            "concepts": concepts,
            "estimator": best.name if concepts else None,
            "left_out": plain(estimates.left_out),
        }

    def pairs(self, step: int, pairs: TopPairs) -> Record:
        """The pairs behind each concept."""
        found = self._rows(self.merged(pairs))
        return {
            "type": "pairs",
            "step": step,
            "concepts": {concept.name: rows for concept, rows in zip(self.run.concepts, found, strict=True)},
        }

    def features(self, step: int, features: FeatureMonitor) -> Record:
        """The features that are most surely amplified and suppressed, with their names and the pair behind each."""
        estimates = self.estimates(features.window)
        amplified, suppressed = ranked(estimates.value[0], estimates.se[0], TOP_FEATURES)
        chosen = [*amplified, *suppressed]
        names = self.names.of(chosen, features)
        index = torch.tensor(chosen, dtype=torch.long)
        table = _table(estimates._replace(value=estimates.value[:, index], se=estimates.se[:, index]))
        pairs = self.merged(features.pairs)
        rows = self._rows(pairs[index.to(pairs.device)])
        entries = [
            {**names[column], **numbers, "rows": found}
            for column, numbers, found in zip(chosen, table, rows, strict=True)
        ]
        return {
            "type": "features",
            "step": step,
            "sae": self.sae,
            "watched": features.reader.n_features,
            "amplified": entries[: len(amplified)],
            "suppressed": entries[len(amplified) :],
        }

    def _rows(self, table: Tensor) -> list[list[Record]]:
        """The pairs of a [`TopPairs`] table, as records have them."""
        places = [[pair for pair in some if pair[0] > 0] for some in table.tolist()]
        rows = {int(pair[1]) for some in places for pair in some} if self.texts else set()
        if rows:
            self.run.fetch(sorted(rows))
        if not self.accelerator.is_main_process:
            return [[] for _ in places]
        texts = {row: self.run.texts(row) for row in rows}  # one row is behind many concepts
        return [[_pair(pair, self.run.beta, texts.get(int(pair[1]), {})) for pair in some] for some in places]


def _pair(pair: Sequence[float], beta: float, texts: Mapping[str, str | None]) -> Record:
    _, row, delta, apart, contribution, _ = pair
    return {
        "row": int(row),
        **{name: None if text is None else text[:TEXT_LENGTH] for name, text in texts.items()},
        "delta": plain(delta),
        "margin": plain(beta * apart),
        "contribution": plain(contribution),
    }


def _table(estimates: Estimates) -> list[Record]:
    """One mapping of `[value, standard error]` for each column of estimates."""
    values, errors = estimates.value.T.tolist(), estimates.se.T.tolist()
    return [
        {name: [plain(v), plain(e)] for name, v, e in zip(QUANTITIES, value, error, strict=True)}
        for value, error in zip(values, errors, strict=True)
    ]
