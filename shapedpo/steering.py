"""Changing hidden states in the forward pass: adding directions, or projecting them out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .capture import Side, activation, decoder_layers, resolve_site
from .concept import Concept
from .readouts import ActivationReader, Direction, LoadedReadout
from .readouts.files import residual
from .shapers import Residual
from .shapers.projection import HOOKS_PASSED_OVER, orthonormal_basis
from .shapers.steering import Ablate, ForwardEdit
from .structure import own_directions


class Edit(NamedTuple):
    """What is done at some places of a model.

    Attributes:
        places: Modules, and whether their input or their output is meant.
        basis: `(d, k)` float32, orthonormal columns. One column if it is added.
        ablate: Whether it is projected out, or added.
    """

    places: list[tuple[nn.Module, Side]]
    basis: Tensor
    ablate: bool

    def to(self, device: torch.device) -> Edit:
        """The same with its basis on a device."""
        return self if self.basis.device == device else self._replace(basis=self.basis.to(device))

    def __call__(self, x: Tensor, amount: Tensor) -> Tensor:
        """`(N, T, d)`, changed by `amount`, `(N, T, 1)` float32."""
        if not self.ablate:
            return x + (amount * self.basis[:, 0]).to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):  # not in bf16, or most of the direction would stay
            basis = self.basis.to(torch.promote_types(x.dtype, torch.float32))
            return (x - amount.to(basis.dtype) * ((x.to(basis.dtype) @ basis) @ basis.T)).to(x.dtype)


class Steering:
    """Context manager inside which a model's hidden states are changed, as soon as `aim` has said how much and where.

    Hooks live inside `with` only, also if something fails there. It must enclose the backward pass too: with gradient checkpointing
    modules run again there, and the same is done again. Before `aim`, and after leaving, nothing is changed: a pass of the reference
    through the same module comes first.

    Args:
        edits: By concept, by its index.

    Raises:
        RuntimeError: On leaving, if no module ran its hook after `aim`: a compiled one may pass over hooks that it has not met before.
    """

    def __init__(self, edits: Mapping[int, Edit]) -> None:
        self._edits = dict(edits)
        self._amounts: dict[int, Tensor] = {}
        self._ran = False
        self._handles: list[Any] = []

    def __bool__(self) -> bool:
        return bool(self._edits)

    def __enter__(self) -> Steering:
        self._ran = False
        try:
            for concept, edit in self._edits.items():
                for module, side in edit.places:
                    self._handles.append(self._hook(concept, module, side))
        except BaseException as error:
            self.__exit__(type(error))
            raise
        return self

    def __exit__(self, kind: object = None, *error: object) -> None:
        passed_over = bool(self._amounts) and not self._ran
        self._amounts = {}
        while self._handles:
            self._handles.pop().remove()
        if kind is None and passed_over:
            raise RuntimeError(f"Steering changed nothing: {HOOKS_PASSED_OVER}")

    def aim(self, amounts: Mapping[int, Tensor], positions: Tensor) -> None:
        """Say what the passes from now on are changed by.

        Args:
            amounts: By concept, by its index, `(N,)` float32, how much each sequence is.
            positions: `(N, T)` bool, which of its tokens are. If the model puts virtual tokens before the text, it speaks of the last T.
        """
        self._amounts = {
            concept: (amount[:, None] * positions)[..., None].detach() for concept, amount in amounts.items()
        }

    def _hook(self, concept: int, module: nn.Module, side: Side) -> Any:
        def changed(x: Tensor) -> Tensor:
            self._ran = True
            amount = self._amounts[concept]
            # Kept where it is needed: a copy from the host waits for the device.
            edit = self._edits[concept] = self._edits[concept].to(x.device)
            return edit(x, F.pad(amount.to(x.device), (0, 0, x.shape[1] - amount.shape[1], 0)))

        if side == "output":

            def output_hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
                if concept not in self._amounts:
                    return None
                x = changed(activation(side, args, kwargs, output))
                return x if isinstance(output, Tensor) else type(output)([x, *output[1:]])

            return module.register_forward_hook(output_hook, with_kwargs=True)

        def input_hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if concept not in self._amounts:
                return None
            x = changed(activation(side, args, kwargs))
            if args:
                return (x, *args[1:]), kwargs
            name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
            return args, {**kwargs, name: x}

        return module.register_forward_pre_hook(input_hook, with_kwargs=True)


def policy_steering(model: nn.Module, concepts: Sequence[Concept], readers: Sequence[LoadedReadout]) -> Steering:
    """The steering of the concepts with the methods `steer` and `ablate`.

    Args:
        model: The policy, unwrapped.
        concepts: All concepts.
        readers: What each acts by, of `steering_readers`.

    Raises:
        ValueError: If a layer is not there; the text names the concept.
    """
    edits = {}
    for index, (concept, reader) in enumerate(zip(concepts, readers, strict=True)):
        if concept.shapes and isinstance(concept.shaper, ForwardEdit):
            assert isinstance(reader, ActivationReader)  # by steering_readers
            directions, ablate = own_directions(model, concepts, readers, index), isinstance(concept.shaper, Ablate)
            try:
                edits[index] = make_edit(model, reader.hook_name, directions, concept.shaper.layers, ablate)
            except ValueError as error:
                raise ValueError(f"Concept {concept.name!r}: method {concept.shaper.name!r}: {error}") from error
    return Steering(edits)


def residual_edit(model: nn.Module, concepts: Sequence[Concept], readers: Sequence[LoadedReadout], index: int) -> Edit:
    """How the reference is steered for the concept of that index, with method `residual`.

    Raises:
        ValueError: If a layer is not there; the text names the concept.
    """
    concept, reader = concepts[index], readers[index]
    assert isinstance(reader, ActivationReader)  # by steering_readers
    assert isinstance(concept.shaper, Residual)
    directions = own_directions(model, concepts, readers, index)
    try:
        return make_edit(model, reader.hook_name, directions, concept.shaper.layers, ablate=False)
    except ValueError as error:
        raise ValueError(f"Concept {concept.name!r}: method 'residual': {error}") from error


def make_edit(model: nn.Module, hook_name: str, directions: Tensor, layers: Sequence[int] | None, ablate: bool) -> Edit:
    """An edit by directions, `(F, d)`, after some decoder layers or, without `layers`, at a hook point.

    Raises:
        ValueError: If a layer is not there, or as wide as something else.
    """
    module, side, width = resolve_site(model, hook_name if layers is None else residual(0))
    if directions.shape[1] != width:
        raise ValueError(
            f"its direction is {directions.shape[1]} wide, and the hidden states of {type(model).__name__} are {width} wide there. Was it made "
            "for another model or place?"
        )
    if layers is None:
        places: list[tuple[nn.Module, Side]] = [(module, side)]
    else:
        found = decoder_layers(model)
        if outside := [layer for layer in layers if layer >= len(found)]:
            raise ValueError(f"there is no layer {outside[0]}: the model has {len(found)} (0 to {len(found) - 1}).")
        places = [(found[layer], "output") for layer in layers]
    if ablate:
        return Edit(places, orthonormal_basis(directions), True)
    mean = F.normalize(directions.double(), dim=1).mean(dim=0)
    return Edit(places, F.normalize(mean, dim=0).float()[:, None], False)


def steering_readers(concepts: Sequence[Concept], readers: Sequence[LoadedReadout]) -> list[LoadedReadout]:
    """What gives each concept the direction that its method steers by, if it does: its own reader, or the one of the file that the method names.

    Raises:
        ValueError: If there is no direction to steer by; the text names the concept.
    """
    found = list(readers)
    for index, concept in enumerate(concepts):
        shaper = concept.shaper
        steers = isinstance(shaper, ForwardEdit) or (isinstance(shaper, Residual) and shaper.steer is not None)
        if not concept.shapes or not steers:
            continue
        assert isinstance(shaper, ForwardEdit | Residual)
        owner = f"Concept {concept.name!r}: method {shaper.name!r}"
        if shaper.direction is not None:
            layer = shaper.layers[0] if shaper.layers else None  # else the file says where
            try:
                found[index] = Direction(path=shaper.direction, layer=layer).load()
            except ValueError as error:
                raise ValueError(f"{owner}: {error}") from error
        elif not isinstance(found[index], ActivationReader):
            raise ValueError(
                f"{owner} needs a readout with a direction (SAEFeatures, Direction or LinearProbe), or a `direction` of its own; a readout of text "
                "has none."
            )
    return found
