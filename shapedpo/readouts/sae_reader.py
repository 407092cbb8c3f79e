"""Scores from the features of an SAE, with as little of the SAE as they need."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .base import ActivationReader, fingerprint, reduce_tokens


if TYPE_CHECKING:
    from sae_lens import SAE


# Parameters with one entry a feature, of the architectures whose features do not depend on each other. BatchTopK SAEs
# are JumpReLU ones once saved.
_PER_FEATURE = {
    "standard": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "gated": ("b_gate", "b_mag", "r_mag"),
    "transcoder": ("b_enc",),
    "skip_transcoder": ("b_enc",),
    "jumprelu_transcoder": ("b_enc", "threshold"),
    "jumprelu_skip_transcoder": ("b_enc", "threshold"),
}

# Features computed at a time where they stand alone: enough for a matrix product to run at full speed.
_CHUNK = 1024


def max_elements(device: torch.device) -> int:
    """Bound on the elements of an intermediate of the features' width.

    On a CPU 4 MiB of float32, which stays in cache; elsewhere 16 MiB, so that kernel launches do not dominate.
    """
    return 2**20 if device.type == "cpu" else 2**22


class SAEReader(ActivationReader):
    """Reads features of an SAE.

    Where features stand alone (standard, JumpReLU, gated), a copy of the watched ones' columns is kept. Others (TopK) are encoded
    whole, a few tokens at a time. A whole SAE is held as it is given, so readers of the same one share it.

    Args:
        sae: The SAE. It is moved to where it is read.
        features: Indices of the watched features, or `None` for all.
        pooling: One of `POOLINGS`.
        hook_name: Where to read.

    Raises:
        ValueError: If an activation depends on other tokens, so that it cannot be read from the completion alone.
    """

    def __init__(self, sae: SAE[Any], features: list[int] | None, pooling: str, hook_name: str) -> None:
        architecture = sae.cfg.architecture()
        if architecture == "temporal":
            raise ValueError("Temporal SAEs read a token together with its context, which shapedpo does not support.")
        self.pooling = pooling
        self.hook_name = hook_name
        self.model_name = sae.cfg.metadata.model_name
        self.d_in = sae.cfg.d_in
        self.features = features
        self.n_features = sae.cfg.d_sae if features is None else len(features)
        # sae-lens wants `hook_z` split into heads; the module that it is read from has them side by side.
        sae.turn_off_forward_pass_hook_z_reshaping()
        sae.requires_grad_(False)
        per_feature = architecture in _PER_FEATURE and isinstance(sae.activation_fn, nn.ReLU)
        self._linear = per_feature and architecture != "gated"
        self._columns: Tensor | None = None  # to select from what the SAE encodes
        if features is not None and per_feature:
            sae = _cut(sae, features, _PER_FEATURE[architecture])
        elif features is not None:
            self._columns = torch.tensor(features, device=sae.W_dec.device)
        self._sae = sae

    @property
    def width(self) -> int:
        return int(self._sae.W_dec.shape[0])

    def to(self, device: torch.device | str) -> SAEReader:
        target, current = torch.device(device), self._sae.W_dec.device
        if target.type != current.type or target.index not in (None, current.index):
            self._sae.to(device=target)
        if self._columns is not None:
            self._columns = self._columns.to(target)  # by itself: another reader may have moved the SAE
        return self

    def narrowed(self, features: list[int]) -> SAEReader:
        """A reader of some of these features, by their indices in the SAE.

        Raises:
            ValueError: If this reader does not read all of the SAE's features.
        """
        if self.features is not None:
            raise ValueError(f"Only a reader of all features can be narrowed; this one reads {self.n_features}.")
        return SAEReader(self._sae, features, self.pooling, self.hook_name)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            activations = self._sae.encode(x)
        if self._columns is not None:
            activations = activations.index_select(-1, self._columns)
        return activations.float()

    @torch.no_grad()
    def tokens(self, x: Tensor, mask: Tensor) -> Tensor:
        raw = torch.zeros(*mask.shape, self.n_features, device=x.device)
        for rows, tokens in tiles(mask, max(1, max_elements(x.device) // self.width)):
            raw[rows, tokens] = self.encode(x[rows, tokens])
        return raw * mask[..., None]

    @torch.no_grad()
    def active(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The active features of tokens, for readers of the whole SAE: no `(M, F)` tensor is made.

        Args:
            x: Activations of M tokens, `(M, d_in)`, of any floating type.

        Returns:
            For each activation above 0, in no certain order: its token, `(E,)` int64; its feature, `(E,)` int64; and how large it
            is, `(E,)` float32.
        """
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        with torch.autocast(x.device.type, enabled=False):
            for tokens, features, values in self._activations(x.detach()):
                token, feature = torch.nonzero(values > 0, as_tuple=True)
                found.append((token + tokens.start, feature + features.start, values[token, feature].float()))
        if not found:
            return x.new_zeros(0, dtype=torch.int64), x.new_zeros(0, dtype=torch.int64), x.new_zeros(0).float()
        token, feature, value = (torch.cat(part) for part in zip(*found, strict=True))
        return token, feature, value

    def _activations(self, x: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
        """Activations of tokens, `(M, d_in)`, piece by piece: which tokens, which features, `(M', F')`. A piece lives until the next."""
        if not self._linear:
            size = max(1, max_elements(x.device) // self._sae.W_dec.shape[0])
            for start in range(0, len(x), size):
                yield slice(start, start + size), slice(0, self.n_features), self.encode(x[start : start + size])
            return
        x = self._sae.process_sae_in(x)
        width = min(self.n_features, _CHUNK)
        size = max(1, max_elements(x.device) // width)
        scratch = x.new_empty(min(len(x), size) * width)
        for first in range(0, self.n_features, width):
            features = slice(first, first + width)
            weight = self._sae.W_enc[:, features]  # (d_in, F')
            for start in range(0, len(x), size):
                tile = x[start : start + size]
                hidden = scratch[: len(tile) * weight.shape[1]].view(len(tile), -1)  # (M', F')
                torch.mm(tile, weight, out=hidden)
                self._activate_(hidden, features)
                yield slice(start, start + size), features, hidden

    def directions(self) -> Tensor:
        """What each feature writes into the activations.

        Raises:
            ValueError: If the features write elsewhere than where they are read.
        """
        if "transcoder" in self._sae.cfg.architecture():
            raise ValueError(
                f"a transcoder's features write elsewhere than at {self.hook_name!r}, where they are read, so that they have no direction there. "
                "Use an SAE, or a Direction"
            )
        return self.writes()

    def writes(self, which: Tensor | None = None) -> Tensor:
        """What features write, wherever that is: `(F, d_out)` float32, or those of some, by their places among the features read."""
        columns = self._columns
        if which is not None:
            columns = which.to(self._sae.W_dec.device) if columns is None else columns[which.to(columns.device)]
        rows = self._sae.W_dec.detach()
        return (rows if columns is None else rows[columns]).float()

    @cached_property
    def fingerprint(self) -> str:
        # Not the metadata: when an SAE was made, and by which version, does not change its scores.
        config = {key: value for key, value in self._sae.cfg.to_dict().items() if key not in ("metadata", "device")}
        weights = sorted(self._sae.state_dict().items())
        names, tensors = [name for name, _ in weights], [tensor for _, tensor in weights]
        return fingerprint(sorted(config.items()), self.features, self.pooling, self.hook_name, names, *tensors)

    def _reduce(self, x: Tensor, inside: Tensor) -> Tensor:
        # A maximum starts from -inf, a sum from 0.
        start = -torch.inf if self.pooling == "max" else 0.0
        out = torch.full((len(x), self.n_features), start, dtype=torch.float32, device=x.device)
        if self._linear:
            self._reduce_linear(x, inside, out)
        else:
            size = max(1, max_elements(x.device) // self._sae.W_dec.shape[0])
            for rows, tokens in tiles(inside, size):
                part = reduce_tokens(self.encode(x[rows, tokens]), inside[rows, tokens], self.pooling)
                _accumulate(out[rows], part, self.pooling)
        return out

    def _reduce_linear(self, x: Tensor, inside: Tensor, out: Tensor) -> None:
        """Reduce features that stand alone into `out`, a chunk of them at a time."""
        x = self._sae.process_sae_in(x)
        width = min(self.n_features, _CHUNK)
        size = max(1, max_elements(x.device) // width)
        parts = list(tiles(inside, size))
        # One buffer for all chunks: a fresh one each time would cost more in page faults than the activation function.
        scratch = x.new_empty(min(inside.numel(), size) * width)
        for first in range(0, self.n_features, width):
            features = slice(first, first + width)
            weight = self._sae.W_enc[:, features]  # (d_in, F')
            for rows, tokens in parts:
                tile = x[rows, tokens]  # (N', T', d_in)
                hidden = scratch[: tile[..., 0].numel() * weight.shape[1]].view(*tile.shape[:2], -1)  # (N', T', F')
                torch.mm(tile.flatten(0, 1), weight, out=hidden.flatten(0, 1))
                if self.pooling != "max":
                    self._activate_(hidden, features, count=self.pooling == "freq")
                part = reduce_tokens(hidden, inside[rows, tokens], "max" if self.pooling == "max" else "mean")
                _accumulate(out[rows, features], part, self.pooling)
        if self.pooling == "max":
            # An activation never falls as its pre-activation grows: the largest of one is that of the other's largest.
            self._activate_(out, slice(None))

    def _activate_(self, hidden: Tensor, features: slice, count: bool = False) -> None:
        """Turn `x @ W_enc` into activations in place, or to `count` them into 1 where there is one and 0 elsewhere."""
        hidden += self._sae.b_enc[features]
        threshold = getattr(self._sae, "threshold", None)
        if count:
            hidden.gt_(0.0 if threshold is None else threshold[features].clamp(min=0.0))
        else:
            hidden.relu_()
            if threshold is not None:
                hidden *= hidden > threshold[features]


def _accumulate(out: Tensor, part: Tensor, pooling: str) -> None:
    if pooling == "max":
        torch.maximum(out, part, out=out)
    else:
        out += part


def tiles(inside: Tensor, size: int) -> Iterator[tuple[slice, slice]]:
    """Cut a batch, `(N, T)`, into pieces of at most `size` tokens."""
    n, t = inside.shape
    tokens = min(t, size)
    rows = size // tokens
    for row in range(0, n, rows):
        for token in range(0, t, tokens):
            yield slice(row, row + rows), slice(token, token + tokens)


def _cut(sae: SAE[Any], features: list[int], names: tuple[str, ...]) -> SAE[Any]:
    """A copy of an SAE with some of its features only."""
    index = torch.tensor(features, device=sae.W_dec.device)
    cut = copy.copy(sae)
    cut._parameters = {name: nn.Parameter(p.data, requires_grad=False) for name, p in sae._parameters.items()}
    for name in names:
        setattr(cut, name, nn.Parameter(getattr(sae, name).data[index], requires_grad=False))
    cut.W_enc = nn.Parameter(sae.W_enc.data[:, index], requires_grad=False)
    cut.W_dec = nn.Parameter(sae.W_dec.data[index], requires_grad=False)
    return cut
