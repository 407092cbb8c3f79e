"""What a readout is: a piece of data that says how a concept is read, and the reader that it loads.

A *readout* ([`Readout`]) is a frozen dataclass. It is cheap to build, can be pickled and survives a round trip through
YAML. Its `load` method gives a *reader*, which holds the weights: an [`ActivationReader`] reads hidden states, a
[`TextReader`] reads the completion's text. Scores are float32, raw (not standardised), and carry no gradient.
"""

from __future__ import annotations

import dataclasses
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias, TypeVar

import torch
from torch import Tensor

from ..errors import suggest


POOLINGS = ("max", "mean", "freq")
"""How a completion's tokens become one score: the largest, the mean, or the fraction of tokens above zero."""


class ActivationReader(ABC):
    """Reads scores from the activations of one hook point.

    Attributes:
        hook_name: Where to read, in TransformerLens or Hugging Face naming (see [`~shapedpo.capture.resolve_site`]).
        d_in: Width of the activations.
        n_features: Number of raw scores, F.
        pooling: One of `POOLINGS`, or `"last"` where a reader's score at the last token is of them all.
        model_name: The model that the weights were made for, if they say so.
    """

    hook_name: str
    d_in: int
    n_features: int
    pooling: str
    model_name: str | None = None

    @property
    def width(self) -> int:
        """How many numbers `encode` makes of a token on its way, at most."""
        return self.n_features

    @abstractmethod
    def to(self, device: torch.device | str) -> ActivationReader:
        """Move the weights in place; does nothing when they are there already."""

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Score every token: `(..., d_in)` to `(..., F)` float32. Unchunked, so for tests and small inputs."""

    @torch.no_grad()
    def tokens(self, x: Tensor, mask: Tensor) -> Tensor:
        """Score the tokens of a mask one by one: `(N, T, d_in)`, `(N, T)` bool to `(N, T, F)` float32, 0 outside the mask."""
        return self.encode(x) * mask[..., None]

    @abstractmethod
    def directions(self) -> Tensor:
        """What each feature writes into the activations: `(F, d_in)` float32."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of all that changes a score, the same in every process."""

    def pooled(self, x: Tensor, mask: Tensor) -> Tensor:
        """Score every row of a batch.

        Args:
            x: Activations, `(N, T, d_in)`, of any floating type.
            mask: `(N, T)` bool, the tokens to pool over (for DPO, the completion's).

        Returns:
            `(N, F)` float32. Rows whose mask is empty score 0.
        """
        # Scores stay float32 under a trainer's bf16 autocast.
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            counts = mask.sum(dim=1)
            x, inside = gather_tokens(x.detach(), mask)
            reduced = self._reduce(x, inside)
            if self.pooling in ("mean", "freq"):
                reduced = reduced / counts.clamp(min=1)[:, None]
            return torch.where(counts[:, None] > 0, reduced, 0.0)

    def _reduce(self, x: Tensor, inside: Tensor) -> Tensor:
        """Reduce over tokens (max, or sum for `mean` and `freq`): `(N, T, d_in)`, `(N, T)` to `(N, F)` float32.

        Tokens that are not `inside` repeat one that is, so a maximum need not look at `inside`.
        """
        return reduce_tokens(self.encode(x), inside, self.pooling)


class WrappedReader(ActivationReader):
    """Reads as another reader does. Subclasses keep something of what they see.

    Args:
        reader: The other.
    """

    def __init__(self, reader: ActivationReader) -> None:
        self.reader = reader
        self.hook_name, self.d_in, self.n_features = reader.hook_name, reader.d_in, reader.n_features
        self.pooling, self.model_name = reader.pooling, reader.model_name

    def to(self, device: torch.device | str) -> WrappedReader:
        self.reader.to(device)
        return self

    @property
    def width(self) -> int:
        return self.reader.width

    def encode(self, x: Tensor) -> Tensor:
        return self.reader.encode(x)

    def tokens(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.reader.tokens(x, mask)

    def directions(self) -> Tensor:
        return self.reader.directions()

    @property
    def fingerprint(self) -> str:
        return self.reader.fingerprint


class TextReader(ABC):
    """Reads one score from each text."""

    n_features: int = 1

    @abstractmethod
    def score(self, texts: list[str]) -> Tensor:
        """Score completions given as text: `(N,)` float32."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of all that changes a score, the same in every process."""


LoadedReadout: TypeAlias = ActivationReader | TextReader


@dataclass(frozen=True)
class Readout(ABC):
    """How a concept is read. Subclasses are `SAEFeatures`, `Direction`, `LinearProbe`, `AttentionProbe`, `Regex` and `TextFunction`."""

    type: ClassVar[str]
    """The readout's name in YAML."""

    @abstractmethod
    def load(self) -> LoadedReadout:
        """Load what scoring needs, on the CPU."""

    def load_shared(self, loaded: dict[Any, Any]) -> LoadedReadout:
        """The same, with what several readouts have in common loaded once.

        Args:
            loaded: What was loaded before, to which this adds. To be dropped when all are loaded.
        """
        return self.load()

    def to_dict(self) -> dict[str, Any]:
        """The readout as plain data, for YAML and checkpoints. Fields at their default are left out."""
        data: dict[str, Any] = {"type": self.type}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                data[field.name] = list(value) if isinstance(value, tuple) else value
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Readout:
        """Build a readout from what `to_dict` gives.

        Raises:
            ValueError: If the type or a field is unknown, or a required field is missing.
        """
        readout = readout_from_dict(data)
        if not isinstance(readout, cls):
            raise ValueError(f"Expected a readout of type {cls.type!r}, got {readout.type!r}.")
        return readout

    @classmethod
    def _from_fields(cls, fields: dict[str, Any]) -> Readout:
        known = {field.name: field for field in dataclasses.fields(cls)}
        unknown = [name for name in fields if name not in known]
        if unknown:
            raise ValueError(
                f"Readout {cls.type!r} has no field {unknown[0]!r}.{suggest(str(unknown[0]), known)} Its fields are {', '.join(known)}."
            )
        missing = [name for name, field in known.items() if field.default is dataclasses.MISSING and name not in fields]
        if missing:
            raise ValueError(f"Readout {cls.type!r} needs the field {missing[0]!r}.")
        return cls(**fields)


ReadoutT = TypeVar("ReadoutT", bound=Readout)
_REGISTRY: dict[str, type[Readout]] = {}


def register(cls: type[ReadoutT]) -> type[ReadoutT]:
    """Class decorator: make a readout known to `readout_from_dict` under its `type`."""
    _REGISTRY[cls.type] = cls
    return cls


def readout_from_dict(data: Mapping[str, Any]) -> Readout:
    """Build a readout from plain data, by its `type`.

    Raises:
        ValueError: If `data` is not a mapping, or names no known type, or its fields do not fit the type.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"A readout must be a mapping with a `type`, got {data!r}.")
    fields = dict(data)
    kind = fields.pop("type", None)
    if not isinstance(kind, str) or kind not in _REGISTRY:
        near = suggest(str(kind), _REGISTRY)
        raise ValueError(f"Unknown readout type {kind!r}.{near} Known types are {', '.join(sorted(_REGISTRY))}.")
    return _REGISTRY[kind]._from_fields(fields)


def check_pooling(pooling: str) -> None:
    """Raise `ValueError` unless `pooling` is one of `POOLINGS`."""
    if pooling not in POOLINGS:
        raise ValueError(f"Unknown pooling {pooling!r}. Choose one of {', '.join(POOLINGS)}.")


def gather_tokens(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move each row's masked tokens to the front and fill up with copies of its first one.

    What lies outside the mask (prompts, padding) then costs nothing or, being a copy, changes no maximum; and an
    overflow there cannot reach a score.

    Args:
        x: `(N, T, d)`.
        mask: `(N, T)` bool.

    Returns:
        The tokens, `(N, T', d)`, and which of them are inside the mask, `(N, T')` bool. T' is the longest row's count
        on the CPU, and T on an accelerator, where reading that count would wait for the device.
    """
    n, t, d = x.shape
    if n * t == 0:
        return x, mask
    counts = mask.sum(dim=1, keepdim=True)
    keep = max(int(counts.max()), 1) if x.device.type == "cpu" else t
    order = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :keep]  # (N, T')
    inside = torch.arange(keep, device=x.device) < counts
    order = torch.where(inside, order, order[:, :1])
    order = order + torch.arange(n, device=x.device)[:, None] * t
    return x.reshape(n * t, d).index_select(0, order.flatten()).view(n, keep, d), inside


def reduce_tokens(values: Tensor, inside: Tensor, pooling: str) -> Tensor:
    """Maximum or sum over tokens: `(N, T, F)`, `(N, T)` to `(N, F)` float32 (see [`ActivationReader._reduce`])."""
    if pooling == "max":
        return values.amax(dim=1).float()
    values = (values > 0).float() if pooling == "freq" else values.float()
    return torch.bmm(inside[:, None, :].float(), values).squeeze(1)


def fingerprint(*parts: Any) -> str:
    """SHA-256 over tensors (type, shape, bytes) and plain values (their `repr`)."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            part = part.detach().cpu().contiguous()
            digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
            digest.update(part.reshape(-1).view(torch.uint8).numpy().data)
        else:
            digest.update(f"{part!r};".encode())
    return digest.hexdigest()
