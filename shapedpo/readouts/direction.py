"""Readout of a direction in the residual stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from .base import ActivationReader, Readout, check_pooling, fingerprint, register
from .contrast import mean_activation
from .files import read_place, read_tensors, residual
from .responses import Response


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_KEY = "direction"


@register
@dataclass(frozen=True, eq=False)
class Direction(Readout):
    """Projection of the residual stream, after one decoder layer, on a unit vector.

    Args:
        vector: The direction, `(d_model,)`, of any length but zero. Give this or `path`.
        path: A safetensors file with the tensor `direction` (what `save` writes).
        layer: Decoder layer, counted from 0, whose output is read.
        hook_name: Where to read, instead of `layer`. Without either, the file's metadata says.
        pooling: How a completion's tokens become one score: `"max"` or `"mean"` of the projection, or `"freq"`, the
            fraction of tokens on which it is positive.

    Raises:
        ValueError: If the arguments do not name one direction at one place, or the vector is zero or not finite.

    Source: difference-of-means directions as in Bergen et al., "Anatomy of Post-Training", arXiv 2606.12360 (2026).
    """

    type: ClassVar[str] = "direction"

    vector: Tensor | None = None
    path: str | None = None
    layer: int | None = None
    hook_name: str | None = None
    pooling: str = "max"

    def __post_init__(self) -> None:
        if (self.vector is None) == (self.path is None):
            raise ValueError("A direction needs either `vector` or `path`, and not both.")
        if self.layer is not None and self.hook_name is not None:
            raise ValueError(f"A direction takes `layer` ({self.layer}) or `hook_name` ({self.hook_name!r}), not both.")
        if self.layer is not None and (
            isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 0
        ):
            raise ValueError(f"`layer` must be a whole number from 0 up, got {self.layer!r}.")
        check_pooling(self.pooling)
        if self.path is not None:
            object.__setattr__(self, "path", str(self.path))
        else:
            if isinstance(self.vector, dict):
                raise ValueError(
                    "This direction was held in memory, so its description does not contain it. Write it to a file "
                    "with `save` and give `path`."
                )
            if self.layer is None and self.hook_name is None:
                raise ValueError("A direction given as a vector needs `layer` or `hook_name`.")
            object.__setattr__(self, "vector", _unit(self.vector, "`vector`"))

    @classmethod
    def from_contrast(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        positives: Sequence[Response],
        negatives: Sequence[Response],
        layer: int,
        batch_size: int = 8,
        pooling: str = "max",
    ) -> Direction:
        """Difference of means: from responses that lack a trait to responses that show it.

        Activations are averaged over the tokens of each response, then over responses, so that a long one counts no
        more than a short one.

        Args:
            model: The reference model. It is run as it is, on its device, in evaluation mode.
            tokenizer: Its tokenizer, with a chat template if the pairs are conversational.
            positives: `(prompt, response)` pairs that show the trait: two strings, or two lists of messages.
            negatives: Pairs that do not.
            layer: Decoder layer, counted from 0, after which to read.
            batch_size: Responses in a forward pass.
            pooling: Pooling of the direction that is returned.

        Raises:
            ValueError: If a side is empty, a response has no token, or the two means are equal.
        """
        check_pooling(pooling)
        if not positives or not negatives:
            raise ValueError(f"A contrast needs pairs on both sides, got {len(positives)} and {len(negatives)}.")
        hook_name = residual(layer)
        means = [
            mean_activation(model, tokenizer, pairs, hook_name, batch_size, name)
            for pairs, name in ((positives, "positives"), (negatives, "negatives"))
        ]
        return cls(vector=_unit(means[0] - means[1], "The difference of means"), layer=layer, pooling=pooling)

    def save(self, path: str | Path) -> None:
        """Write the direction to a safetensors file, with the place that it is read at in the metadata."""
        vector, hook_name, _ = self._resolve()
        save_file({_KEY: vector}, path, metadata={"hook_name": hook_name, "format": "pt"})

    def load(self) -> DirectionReader:
        """Read the file, if the direction is in one.

        Raises:
            ValueError: If the file is missing, is not safetensors, or holds no direction or no place to read it at.
        """
        vector, hook_name, model_name = self._resolve()
        return DirectionReader(vector, self.pooling, hook_name, model_name)

    def to_dict(self) -> dict[str, Any]:
        """The readout as plain data. A vector in memory is only described, so that needs a file to be built again."""
        data: dict[str, Any] = {"type": self.type}
        if self.vector is not None:
            data["vector"] = {"size": len(self.vector), "sha256": fingerprint(self.vector)}
        for name in ("path", "layer", "hook_name"):
            if getattr(self, name) is not None:
                data[name] = getattr(self, name)
        if self.pooling != "max":
            data["pooling"] = self.pooling
        return data

    def __eq__(self, other: object) -> bool:
        return self.to_dict() == other.to_dict() if isinstance(other, Direction) else NotImplemented

    def __hash__(self) -> int:
        return hash(repr(self.to_dict()))

    def __repr__(self) -> str:
        fields = {key: value for key, value in self.to_dict().items() if key != "type"}
        return f"Direction({', '.join(f'{key}={value!r}' for key, value in fields.items())})"

    def _resolve(self) -> tuple[Tensor, str, str | None]:
        """The unit vector, where to read it, and the model that it was made for, if its file says so."""
        hook_name = self.hook_name if self.layer is None else residual(self.layer)
        if self.path is None:
            assert self.vector is not None
            assert hook_name is not None
            return self.vector, hook_name, None
        (vector,), metadata = read_tensors(self.path, [_KEY], "the direction")
        hook_name = hook_name or read_place(self.path, metadata)
        return _unit(vector, f"The direction in '{self.path}'"), hook_name, metadata.get("model_name")


class DirectionReader(ActivationReader):
    """Reads the projection on a unit vector.

    Args:
        vector: `(d_in,)` float32 of length 1.
        pooling: One of `POOLINGS`.
        hook_name: Where to read.
        model_name: The model that it was made for.
    """

    n_features = 1

    def __init__(self, vector: Tensor, pooling: str, hook_name: str, model_name: str | None = None) -> None:
        self.pooling, self.hook_name, self.model_name = pooling, hook_name, model_name
        self.d_in = len(vector)
        self._vector = vector
        self._fingerprint = fingerprint(vector, pooling, hook_name)

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def to(self, device: torch.device | str) -> DirectionReader:
        self._vector = self._vector.to(device)
        return self

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return (x.float() @ self._vector)[..., None]

    def directions(self) -> Tensor:
        return self._vector[None]


def _unit(vector: Any, name: str) -> Tensor:
    vector = torch.as_tensor(vector).detach().to("cpu", torch.float64)
    if vector.dim() != 1:
        raise ValueError(f"{name} must have one dimension, got shape {tuple(vector.shape)}.")
    if not torch.isfinite(vector).all():
        raise ValueError(f"{name} is not finite.")
    norm = vector.norm()
    if norm == 0:
        raise ValueError(f"{name} is zero, so it has no direction.")
    return (vector / norm).float().contiguous()
