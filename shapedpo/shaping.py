"""Carries what the shapers ask for to the openings of TRL's loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .calibration import Calibration
from .capture import decoder_layers
from .concept import Concept
from .losses import NORMALISED_LOSSES
from .metrics import Pairs
from .openings import sequence_logps, token_weights
from .readouts import LoadedReadout
from .shapers import ConceptSignal, Project
from .shapers.hold import HoldController
from .shapers.projection import ResidualProjection, orthonormal_basis, project_pairs
from .structure import LITTLE, own_directions


class Shaping:
    """What a list of concepts does to one batch.

    Args:
        concepts: All concepts; those that only watch are passed over.
        beta: DPO's beta.
        normalised: Whether the loss compares log-ratios a token (`sigmoid_norm`).
        loss_weight: What the losses that compare pairs weigh together; a held concept is to pull as hard as they do.
    """

    def __init__(
        self, concepts: Sequence[Concept], beta: float, normalised: bool = False, loss_weight: float = 1.0
    ) -> None:
        self.beta, self.normalised, self.loss_weight = beta, normalised, loss_weight
        self.concepts = list(concepts)
        self.active = [(index, concept) for index, concept in enumerate(concepts) if concept.shapes]
        self.held = [index for index, concept in self.active if concept.action == "hold"]
        names = [concept.name for concept in concepts]
        self.spared = sorted({names.index(name) for index in self.held for name in concepts[index].spare})
        self.hold: HoldController | None = None
        if self.held:
            spared = [[names[other] in concepts[index].spare for index in self.held] for other in self.spared]
            self.hold = HoldController(
                [concepts[index].target for index in self.held],
                beta,
                spared=torch.tensor(spared, dtype=torch.bool).reshape(-1, len(self.held)),
            )

    @classmethod
    def of(cls, concepts: Sequence[Concept], args: Any) -> Shaping:
        """What they do with the trainer's arguments."""
        losses = list(zip(args.loss_type, args.loss_weights or [1.0] * len(args.loss_type), strict=True))
        normalised = any(loss in NORMALISED_LOSSES for loss, _ in losses)
        return cls(concepts, args.beta, normalised, sum(weight for loss, weight in losses if loss != "sft"))

    def strength(self, index: int) -> float:
        """The strength in force: positive to suppress, negative to amplify."""
        if self.hold is not None and index in self.held:
            return float(self.hold.strengths[self.held.index(index)])
        return self.concepts[index].signed_strength

    @property
    def strengths(self) -> list[float]:
        """The strengths to log: as the user gave them, positive whichever way; a held concept's is negative where it is amplified."""
        return [
            self.strength(index) if index in self.held else abs(concept.signed_strength) if concept.shapes else 0.0
            for index, concept in enumerate(self.concepts)
        ]

    def start(self, calibration: Calibration) -> list[str]:
        """Start or resume the controller of the held concepts, if there are any. Returns warnings, of each that shares all it shows with what it spares."""
        if self.hold is None:
            return []
        if calibration.hold is not None:
            self.hold.restore(calibration.hold)
        else:
            deltas, gates = calibration.deltas, calibration.gates
            self.hold.start(deltas[:, self.held], gates[:, self.held], deltas[:, self.spared])
        return [
            f"Concept {self.concepts[index].name!r}: {own:.1%} of what its pairs show is not shared with {', '.join(self.concepts[index].spare)}, which "
            "it is to spare. With so little to act on it will hardly be held. Spare fewer, or read it with what tells it apart."
            for index, own in zip(self.held, self.hold.own.tolist(), strict=True)
            if self.concepts[index].spare and own < LITTLE
        ]

    def observe(
        self,
        pairs: Pairs,
        mask: Tensor,
        gather: Callable[[Tensor], Tensor],
        last: bool,
        tilt: Tensor | None = None,
    ) -> None:
        """Let the controller of the held concepts, if there are any, see a batch that was trained on.

        How hard the loss pulls a pair is what other methods have left of it: with their tilt and weights, where there are any. Log-ratios
        are those of the policy and the reference as it is.

        Args:
            pairs: This process's part of it.
            mask: `(2B, T)`, the completions' tokens.
            gather: Puts the rows of all processes one after the other.
            last: Whether an optimizer step follows, and with it the next strengths.
            tilt: `(2B,)` of `tilt`.
        """
        if self.hold is None:
            return
        ratios = (torch.cat(list(pairs.policy_logps)) - torch.cat(list(pairs.ref_logps))).float()
        chosen, rejected = ratios.chunk(2)
        margins = self.beta * self._compared(ratios if tilt is None else ratios + tilt, mask)
        if pairs.weights is not None:  # the margin at which DPO would pull as the weighted pair does
            margins = -torch.logit(pairs.weights * torch.sigmoid(-margins), eps=1e-6)
        read = self._held_pairs(pairs.signals)
        rows = gather(torch.cat([torch.stack([chosen - rejected, margins], dim=1), *read], dim=1))
        seen, deltas, gates, others = rows.split([2, *(part.shape[1] for part in read)], dim=1)
        self.hold.observe(seen[:, 0], deltas, margins=seen[:, 1], gates=gates, others=others)
        if last:
            self.hold.update()

    def correct(self, now: Tensor, before: Tensor, gates: Tensor) -> None:
        """Tell the controller of the held concepts, if there are any, what probe rollouts show. On all processes alike.

        Args:
            now: `(N, K, C)`, all concepts' scores of the policy's rollouts of N prompts.
            before: `(N, M, C)`, those of the reference's.
            gates: `(N, C)`.
        """
        if self.hold is not None:
            now, before = now[..., self.held], before[..., self.held]
            self.hold.correct(*self.hold.change(now, before, gates[:, self.held]))

    def tilt(self, signals: Sequence[ConceptSignal]) -> Tensor | None:
        """What to subtract from the reference's log-probabilities, in nats: `(2B,)`, or `None` if there is nothing."""
        rewards = [
            reward
            for index, concept in self.active
            if index not in self.held
            and (reward := concept.shaper.reward(signals[index], self.strength(index))) is not None
        ]
        return torch.stack(rewards).sum(dim=0) / self.beta if rewards else None

    def penalty(self, log_probs: Tensor, mask: Tensor, ld_alpha: float | None, pairs: Pairs) -> Tensor | None:
        r"""What held concepts add to the loss, \\( \beta \sum_c \lambda_c A_c \\) of the batch (see `shapers/hold.py`); `None` if there are none.

        Args:
            log_probs: `(2B, T')`, the policy's, part of the graph.
            mask: `(2B, T)`, the completions' tokens.
            ld_alpha: LD-DPO's weight of the tail.
            pairs: The batch.
        """
        if self.hold is None:
            return None
        logps = torch.cat(sequence_logps(log_probs, mask, ld_alpha))
        apart = self._compared((logps - torch.cat(list(pairs.ref_logps))).float(), mask)
        along = self.hold.along(*self._held_pairs(pairs.signals))
        pull = along @ self.hold.strengths.to(along.device, along.dtype)
        return self.loss_weight * self.beta / 4 * (pull * apart).mean()

    def _held_pairs(self, signals: Sequence[ConceptSignal]) -> tuple[Tensor, Tensor, Tensor]:
        """What the controller of the held concepts is to know: their gated deltas and gates, `(B, C)`, and the spared ones' deltas, `(B, S)`."""
        gates = torch.stack([signals[index].gate for index in self.held], dim=1)
        others = [signals[index].delta for index in self.spared]
        return _gated_deltas(signals, self.held), gates, torch.stack(others, dim=1) if others else gates[:, :0]

    def _compared(self, log_ratios: Tensor, mask: Tensor) -> Tensor:
        """What the loss compares of completions' log-ratios `(2B,)`: chosen less rejected, a token where it is normalised; `(B,)`."""
        lengths = mask.sum(dim=1).clamp(min=1) if self.normalised else 1
        chosen, rejected = (log_ratios / lengths).chunk(2)
        return chosen - rejected

    def pair_weights(
        self, signals: Sequence[ConceptSignal], calibration: Calibration | None, column: Tensor | None
    ) -> Tensor | None:
        """Product of all methods' pair weights and the dataset's weight column: `(B,)`, or `None` if there is nothing."""
        weights = [] if column is None else [column]
        for index, concept in self.active:
            if concept.shaper.per_pair:
                assert calibration is not None  # there is one where there are concepts
                weight = concept.shaper.pair_weight(signals[index], concept.signed_strength, calibration.signal(index))
                weights.append(weight if weight is not None else torch.ones_like(signals[index].delta))
        return torch.stack(weights).prod(dim=0) if weights else None

    def projected_deltas(self, signals: Sequence[ConceptSignal]) -> Tensor | None:
        """Deltas of the concepts projected in pair space: `(B, C')`, or `None` if there are none."""
        projected = [index for index, concept in self.active if projects(concept, "pair")]
        return _gated_deltas(signals, projected) if projected else None

    def residual_projection(self, model: nn.Module, readers: Sequence[LoadedReadout]) -> AbstractContextManager[Any]:
        """A context for forward and backward in which the residual stream's gradient is projected.

        Args:
            model: The policy, unwrapped.
            readers: All concepts' readers.

        Raises:
            ValueError: If a layer is not there or a readout has no direction in the residual stream.
        """
        chosen = [(index, concept) for index, concept in self.active if projects(concept, "residual")]
        if not chosen:
            return nullcontext()
        layers = decoder_layers(model)
        directions: dict[int, list[Tensor]] = {}
        for index, concept in chosen:
            shaper = concept.shaper
            assert isinstance(shaper, Project)
            own = own_directions(model, self.concepts, readers, index)
            for layer in range(len(layers)) if shaper.layers is None else shaper.layers:
                if layer >= len(layers):
                    raise ValueError(
                        f"Concept {concept.name!r}: method 'project' names layer {layer}, but the model has {len(layers)} "
                        f"(0 to {len(layers) - 1})."
                    )
                directions.setdefault(layer, []).append(own)
        return ResidualProjection(
            [(layers[layer], orthonormal_basis(torch.cat(rows))) for layer, rows in sorted(directions.items())]
        )


def project_policy(
    log_probs: Tensor,
    deltas: Tensor,
    completion_mask: Tensor,
    ld_alpha: float | None,
    reduce: Callable[[Tensor], Tensor],
) -> None:
    """Register the pair-space projection on the gradient of the policy's token log-probabilities.

    Args:
        log_probs: `(2B, T')`, part of the graph.
        deltas: `(B, C')` of [`Shaping.projected_deltas`].
        completion_mask: `(2B, T)`.
        ld_alpha: LD-DPO's weight of the tail.
        reduce: Sums a tensor over processes.
    """
    mask = completion_mask[:, 1:]
    token_weight = token_weights(mask, ld_alpha)

    def project(grad: Tensor) -> Tensor:
        virtual, real = grad.split([grad.shape[1] - mask.shape[1], mask.shape[1]], dim=1)  # prompt-learning PEFT's
        return torch.cat([virtual, project_pairs(real, deltas, mask, token_weight, reduce)], dim=1)

    log_probs.register_hook(project)


def _gated_deltas(signals: Sequence[ConceptSignal], indices: Sequence[int]) -> Tensor:
    """Deltas of some concepts, 0 outside their gates: `(B, C')`."""
    return torch.stack([signals[index].delta * signals[index].gate for index in indices], dim=1)


def projects(concept: Concept, space: str) -> bool:
    """Whether a concept is projected out of the gradient in that space."""
    return isinstance(concept.shaper, Project) and concept.shaper.space == space
