"""Projection of a step's gradient in parameter space: what would raise a concept is taken out of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .concept import Concept
from .shapers import ConceptSignal
from .shaping import projects


class ParameterProjection:
    """Gathers concepts' own gradients over a step's batches, and takes them out of the step's gradient.

    A context manager, too: a batch that fails inside, as for want of memory, ends its step, and nothing of that is left for the next.

    Args:
        model: The policy, unwrapped.
        concepts: All concepts; those of other methods are passed over.
    """

    def __init__(self, model: nn.Module, concepts: Sequence[Concept]) -> None:
        self.concepts = projected_concepts(concepts)
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._gradients: dict[int, list[Tensor]] = {}

    def __bool__(self) -> bool:
        return bool(self.concepts)

    def __enter__(self) -> ParameterProjection:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        if kind is not None:
            self._gradients = {}

    def add(self, signals: Sequence[ConceptSignal], chosen: Tensor, rejected: Tensor) -> None:
        r"""Add a batch's gradients, \( \nabla \sum_i d_i g_i (\log\pi(y_i^+) - \log\pi(y_i^-))/2 \), before its loss is propagated back.

        Args:
            signals: All concepts' scores.
            chosen, rejected: `(B,)` each, the policy's log-probabilities, part of the graph.
        """
        for concept in self.concepts:
            objective = (signals[concept].delta * signals[concept].gate * (chosen - rejected)).sum() / 2
            found = torch.autograd.grad(objective, self._parameters, retain_graph=True, allow_unused=True)
            gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(self._parameters, found, strict=True)]
            sums = self._gradients.get(concept)
            self._gradients[concept] = gradients if sums is None else list(torch._foreach_add(sums, gradients))

    @torch.no_grad()
    def apply(self, reduce: Callable[[Tensor], Tensor]) -> dict[int, float]:
        r"""Project the parameters' gradients, once they are those of the step.

        With \\( g \\) the gradient and \\( v_c \\) the concepts', of those concepts that the step would raise, \\( g \cdot v_c < 0 \\), the span
        is projected out.

        Args:
            reduce: Sums a tensor over processes.

        Returns:
            By concept, by its index, how much of the gradient lay along the concept's, between 0 and 1; 0 if the step would not raise it.
        """
        gradients = {concept: [reduce(part) for part in parts] for concept, parts in self._gradients.items()}
        self._gradients = {}
        step = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        order = list(gradients)
        vectors = [gradients[concept] for concept in order]
        # One copy to the host: all inner products, in float64, of the step's gradient (the last one) and the concepts'.
        everything = [*vectors, step]
        products = torch.stack([torch.stack([_dot(one, two) for two in everything]) for one in everything]).cpu()
        norms = products.diagonal().clamp(min=1e-300).sqrt()
        raised = [row for row in range(len(order)) if products[row, -1] < 0]
        shares = dict.fromkeys(order, 0.0)
        if raised and torch.isfinite(products).all():  # else the trainer's own checks are to see it
            weights = torch.linalg.pinv(products[raised][:, raised], hermitian=True, rtol=1e-9) @ products[raised, -1]
            for row, weight in zip(raised, weights.tolist(), strict=True):
                torch._foreach_add_(step, vectors[row], alpha=-weight)
                shares[order[row]] = float(-products[row, -1] / (norms[row] * norms[-1]))
        return shares


def projected_concepts(concepts: Sequence[Concept]) -> list[int]:
    """The indices of the concepts that are projected in parameter space."""
    return [index for index, concept in enumerate(concepts) if concept.shapes and projects(concept, "parameters")]


def check_parameter_projection(concepts: Sequence[Concept], args: Any, sharded: bool) -> None:
    """Check that the step's gradient is where it can be projected.

    Args:
        concepts: All concepts.
        args: The trainer's arguments.
        sharded: Whether DeepSpeed or FSDP are in charge of it.

    Raises:
        ValueError: If it is not; the text names the concept.
    """
    for index in projected_concepts(concepts):
        owner = f"Concept {concepts[index].name!r}: method 'project' in parameter space"
        if sharded:
            raise ValueError(
                f"{owner} needs each process to have the whole gradient, and DeepSpeed and FSDP keep parts of it. Use space: pair, or DDP."
            )
        if args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError(
                f"{owner} makes a second backward pass, which reentrant gradient checkpointing does not allow. Set "
                "gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        if args.fp16:
            raise ValueError(f"{owner} does not know of the loss scaling of fp16. Use bf16, or space: pair.")


def _dot(one: Sequence[Tensor], two: Sequence[Tensor]) -> Tensor:
    return torch.stack([(a.double() * b.double()).sum() for a, b in zip(one, two, strict=True)]).sum()
