"""Reading activations at hook points during one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .hookpoints import LENS_HOOKS, Side, Site, decoder_layers, resolve_site


if TYPE_CHECKING:
    from .readouts.base import ActivationReader

__all__ = ["LENS_HOOKS", "CapturePass", "Side", "Site", "activation", "decoder_layers", "resolve_site", "run_to"]

UNREACHED = (
    "no forward pass reached it, or the model was compiled before and passes over hooks (then set torch_compile=False)."
)


def activation(side: Side, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None) -> Tensor:
    """The tensor that a module takes or gives, from what its forward hook sees.

    Raises:
        TypeError: If there is none.
    """
    if side == "output":
        # Decoder layers gave tuples before transformers 5, and attention still does.
        value = output[0] if isinstance(output, tuple | list) and output else output
    else:
        value = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))
    if not isinstance(value, Tensor):
        raise TypeError(f"Expected a tensor as the module's {side}, got {type(value).__name__}.")
    return value


class CapturePass:
    """Reads scores during the one forward pass that runs inside `with`.

    Hooks live only inside `with`, also if the forward fails. Readers of one site share a hook. Reading has no gradient.

    Args:
        model: The model that is going to run. Unwrap DDP and engines.
        readers: What to read.
        masks: For each reader the tokens to pool over, `(N, T)` bool. If the model puts virtual tokens before the text,
            as prompt tuning does, a mask speaks of the last T positions.

    Raises:
        ValueError: If a hook name does not fit the model, or an activation's shape does not fit reader or mask.
        RuntimeError: If a hook runs twice, or not at all.

    Example:
        ```python
        with torch.no_grad(), CapturePass(model, [reader], [completion_mask]) as capture:
            model(input_ids, attention_mask=attention_mask)
        capture.scores[0]  # (N, F)
        ```
    """

    def __init__(self, model: nn.Module, readers: Sequence[ActivationReader], masks: Sequence[Tensor]) -> None:
        if len(readers) != len(masks):
            raise ValueError(f"Each reader needs a mask: got {len(readers)} readers and {len(masks)} masks.")
        self._readers = list(readers)
        self._masks = list(masks)
        self._sites: dict[tuple[nn.Module, Side], list[int]] = {}
        found = {
            name: resolve_site(model, name) for name in dict.fromkeys(reader.hook_name for reader in self._readers)
        }
        for index, reader in enumerate(self._readers):
            module, side, _ = found[reader.hook_name]
            self._sites.setdefault((module, side), []).append(index)
        self._scores: list[Tensor | None] = [None] * len(self._readers)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    @property
    def scores(self) -> list[Tensor]:
        """For each reader its scores, `(N, F)` float32."""
        scores = [score for score in self._scores if score is not None]
        if len(scores) < len(self._scores):
            raise RuntimeError(f"Nothing was read at {self._unread()}: {UNREACHED}")
        return scores

    def __enter__(self) -> CapturePass:
        self._scores = [None] * len(self._readers)
        try:
            for (module, side), indices in self._sites.items():
                self._handles.append(self._hook(module, side, indices))
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._remove()
        if kind is None and any(score is None for score in self._scores):
            raise RuntimeError(f"Nothing was read at {self._unread()}: {UNREACHED}")

    def _hook(self, module: nn.Module, side: Side, indices: list[int]) -> torch.utils.hooks.RemovableHandle:
        if side == "input":

            def read_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                self._read(activation(side, args, kwargs), indices)

            return module.register_forward_pre_hook(read_input, with_kwargs=True)

        def read_output(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self._read(activation(side, args, kwargs, output), indices)

        return module.register_forward_hook(read_output, with_kwargs=True)

    @torch.no_grad()
    def _read(self, x: Tensor, indices: list[int]) -> None:
        x = x.detach()
        for index in indices:
            reader, mask = self._readers[index], self._masks[index]
            if self._scores[index] is not None:
                raise RuntimeError(
                    f"{reader.hook_name!r} was reached twice in one capture: run one forward pass, without gradient "
                    "checkpointing's second one, inside it."
                )
            length = mask.shape[1]
            if x.dim() != 3 or len(x) != len(mask) or x.shape[1] < length or x.shape[2] != reader.d_in:
                raise ValueError(
                    f"The activations at {reader.hook_name!r} have shape {tuple(x.shape)}; the mask of shape "
                    f"{tuple(mask.shape)} and the reader call for ({len(mask)}, {length}, {reader.d_in})."
                )
            # The layers of a model may be on several devices; the scores of all of them come together where the masks are.
            scores = reader.to(x.device).pooled(x[:, x.shape[1] - length :], mask.to(x.device, torch.bool))
            self._scores[index] = scores.to(mask.device)

    def _unread(self) -> str:
        names = {reader.hook_name for reader, score in zip(self._readers, self._scores, strict=True) if score is None}
        return ", ".join(repr(name) for name in sorted(names))

    def _remove(self) -> None:
        while self._handles:
            self._handles.pop().remove()


class _Reached(Exception):
    """Ends a forward pass where it has got what was asked for."""


@torch.no_grad()
def run_to(model: nn.Module, hook_name: str, **inputs: Any) -> Tensor:
    """Run a model up to a hook point. What comes after it is not computed.

    Args:
        model: A causal language model, unwrapped.
        hook_name: Where to stop (see [`resolve_site`]).
        **inputs: What the model takes.

    Returns:
        The activations there, `(N, T, d)`.

    Raises:
        ValueError: If the hook name does not fit the model.
        RuntimeError: If the forward pass ends without coming there.
    """
    module, side, _ = resolve_site(model, hook_name)
    found: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None) -> None:
        found.append(activation(side, args, kwargs, output))
        raise _Reached

    register = module.register_forward_pre_hook if side == "input" else module.register_forward_hook
    handle = register(stop, with_kwargs=True)
    try:
        model(**inputs)
    except _Reached:
        return found[0]
    finally:
        handle.remove()
    raise RuntimeError(f"Nothing was read at {hook_name!r}: {UNREACHED}")
