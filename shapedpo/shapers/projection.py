"""Gradient projection: the step may do anything but push the projected concepts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .base import Shaper, register


HOOKS_PASSED_OVER = (
    "no layer of the policy ran the hook that it was given. A model that was compiled before, in this process, without hooks runs none: set "
    "torch_compile=False (and no dynamo_backend in accelerate's configuration)."
)


@register
@dataclass(frozen=True)
class Project(Shaper):
    r"""Project the concept out of the gradient. The loss, and what is logged as `loss`, stay DPO's.

    In **pair space** (the default) the DPO gradient \\( -\beta \sum_i a_i G_i \\), \\( G_i = \nabla(\log\pi(y^+_i) -
    \log\pi(y^-_i)) \\), keeps its form with \\( a' = a - D (D^\top D)^+ D^\top a \\), where \\( D \\) holds the deltas of
    all concepts projected this way on the forward batch of all processes. The batch then exerts no net pressure on any of
    them. It takes a batch of many more pairs than concepts: with as many concepts as pairs nothing would be left.

    In the **residual stream**, on the backward pass through the layers, \\( g \leftarrow g - g Q Q^\top \\), \\( Q \\) an
    orthonormal basis of the concepts' directions (SAE decoder rows, or the direction itself). The forward pass is untouched.
    On `stories260k` this did little: training works around it.

    In the space of the **parameters**, of a step that would raise the concept the component along the concept's own gradient is removed:
    \\( g \leftarrow g - (g \cdot v / v \cdot v)\, v \\) where \\( g \cdot v < 0 \\), with \\( v = \nabla \sum_i d_i (\log\pi(y^+_i) -
    \log\pi(y^-_i))/2 \\) over the step's pairs; of several, their span is. It costs a second backward pass and a second set of gradients for each concept. The gradient
    norm that is logged is the projected one's.

    Args:
        space: `"pair"`, `"residual"` or `"parameters"`.
        layers: Decoder layers whose output gradient is projected, in the residual stream. All by default.

    Source: ours; in the space of parameters after A-GEM (Chaudhry et al., arXiv 1812.00420). The paper's authors report that projecting
    the gradients of activations is worked around by training.
    """

    name: ClassVar[str] = "project"
    actions: ClassVar[tuple[str, ...]] = ("suppress",)

    space: Literal["pair", "residual", "parameters"] = "pair"
    layers: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.space not in ("pair", "residual", "parameters"):
            raise ValueError(
                f"Method 'project': `space` must be 'pair', 'residual' or 'parameters', got {self.space!r}."
            )
        if self.layers is None:
            return
        if self.space != "residual":
            where = "pair space" if self.space == "pair" else "parameter space"
            raise ValueError(
                f"Method 'project': `layers` is an option of the space 'residual'; in {where} there are none."
            )
        layers = list(self.layers) if isinstance(self.layers, list | tuple) else []
        if not layers or any(isinstance(layer, bool) or not isinstance(layer, int) or layer < 0 for layer in layers):
            raise ValueError(f"Method 'project': `layers` must be a list of layer indices from 0, got {self.layers!r}.")
        object.__setattr__(self, "layers", layers)


def project_pairs(
    grad: Tensor, deltas: Tensor, completion_mask: Tensor, token_weight: Tensor, reduce: Callable[[Tensor], Tensor]
) -> Tensor:
    r"""Project the concepts' deltas out of a loss's gradient with respect to the policy's token log-probabilities.

    A pair's coefficient \\( a_i \\) is read off the gradient itself, at the first completion token of either side, so it is
    right for any loss type, any weights and any scaling of the loss. A loss that treats the two sides differently has two
    coefficients; their mean, which is what moves the pair apart, is projected and the rest left alone.

    Args:
        grad: `(2B, T)`, chosen completions first.
        deltas: `(B, C)` float32, 0 where a pair is not to be projected.
        completion_mask: `(2B, T)`, which predicted tokens are completion tokens.
        token_weight: `(2B, T)`, how much each token's log-probability counts in its sequence's.
        reduce: Sums a tensor over processes.

    Returns:
        `(2B, T)`, the projected gradient.
    """
    first = completion_mask.float().argmax(dim=1, keepdim=True)  # (2B, 1)
    chosen, rejected = grad.gather(1, first).squeeze(1).double().chunk(2)
    coefficient = (rejected - chosen) / 2  # (B,): the loss falls as the pair moves apart
    deltas = deltas.double()
    gram, pressure = reduce(torch.cat([deltas.T @ deltas, (deltas.T @ coefficient)[:, None]], dim=1)).split(
        [deltas.shape[1], 1], dim=1
    )
    excess = deltas @ (torch.linalg.pinv(gram, hermitian=True, rtol=1e-9) @ pressure)  # (B, 1)
    return grad + torch.cat([excess, -excess]).to(grad.dtype) * token_weight.to(grad.dtype)


class ResidualProjection:
    """Context manager that projects directions out of the gradient of decoder layers' outputs.

    Hooks live inside `with` only. It must enclose the backward pass too: with gradient checkpointing a layer runs again there.

    Args:
        layers: The decoder layers to hook, each with its basis `(d, k)` of orthonormal columns.

    Raises:
        RuntimeError: On leaving, if no layer ran its hook.
    """

    def __init__(self, layers: Sequence[tuple[nn.Module, Tensor]]) -> None:
        self._layers = [layer for layer, _ in layers]
        self._bases = [basis for _, basis in layers]
        self._handles: list[Any] = []
        self._ran = False

    def __enter__(self) -> ResidualProjection:
        self._ran = False
        for index, layer in enumerate(self._layers):
            self._handles.append(layer.register_forward_hook(self._hook(index)))
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        while self._handles:
            self._handles.pop().remove()
        if kind is None and not self._ran:
            raise RuntimeError(f"No gradient was projected: {HOOKS_PASSED_OVER}")

    def _hook(self, index: int) -> Callable[..., None]:
        def project(grad: Tensor) -> Tensor:
            # Kept where it is needed: a copy from the host waits for the device.
            q = self._bases[index] = self._bases[index].to(grad.device)
            return (grad.float() - grad.float() @ q @ q.T).to(grad.dtype)

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            # Not in the reference's pass, nor in the first of reentrant checkpointing's two: they have no gradient.
            self._ran |= torch.is_grad_enabled()
            if torch.is_grad_enabled() and hidden.requires_grad:
                hidden.register_hook(project)

        return hook


def orthonormal_basis(directions: Tensor) -> Tensor:
    """Orthonormal columns that span the rows of `directions`: `(F, d)` to `(d, k)`, float32, k the rank."""
    # By SVD and not QR, since features of an SAE can be parallel.
    u, s, _ = torch.linalg.svd(nn.functional.normalize(directions.double(), dim=1).T, full_matrices=False)
    return u[:, s > 1e-6 * s[0]].float()
