"""Fits readouts of several kinds at several layers to a contrast set, and keeps the best of each kind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..capture import decoder_layers, resolve_site
from ..readouts.base import ActivationReader, fingerprint
from ..readouts.contrast import ActivationMean, ActivationTokens
from ..readouts.direction import DirectionReader
from ..readouts.files import residual
from ..readouts.probe import ATTENTION, AttentionProbeReader, LinearProbeReader, save_probe
from ..readouts.responses import read_batches
from .contrast import Contrast
from .fitting import L2, difference_of_means, fit_attention, fit_linear
from .quality import Confusion, Quality, confusions, judge_scores, steering_effect
from .steering_vector import fit_steering_vector


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KINDS = ("direction", "linear_probe", "attention_probe", "steering_vector")
"""What can be fitted: readouts by their `type` (difference of means, and probes), and what methods steer by."""
STEERED = 64
"""Responses, at most, on which a direction's effect is measured, half of them of either kind."""


_OBJECTIVES = {"direction": "difference of means", "steering_vector": "bi-directional preference"}


class Options(NamedTuple):
    """How to fit.

    Attributes:
        kinds: Of [`KINDS`].
        layers: Decoder layers, counted from 0; all if `None`.
        objective: `"pairs"` or `"bce"`.
        heldout: Share of the prompts to judge on.
        l2: Weight of the probes' squared weights.
        heads: Of the attention probe.
        seed: Of the split and of what is drawn.
        batch_size: Responses in a forward pass.
        max_length: Where prompt and response together are cut off, in tokens.
    """

    kinds: Sequence[str] = KINDS
    layers: Sequence[int] | None = None
    objective: str = "bce"
    heldout: float = 0.25
    l2: float = L2
    heads: int = 1
    seed: int = 0
    batch_size: int = 8
    max_length: int | None = None


class Fitted(NamedTuple):
    """A readout and how good it is.

    Attributes:
        kind: Of [`KINDS`].
        layer: Where it reads.
        tensors: As its file has them.
        quality: On held-out responses.
        effect: Of adding its direction (see [`~shapedpo.probes.quality.steering_effect`]), nats a token; nan where it has none.
        confusions: What it takes for the concept, the worst first.
        length: Of a steering vector as it was learned, in the units of the hidden states.
    """

    kind: str
    layer: int
    tensors: dict[str, Tensor]
    quality: Quality
    effect: float
    confusions: Sequence[Confusion] = ()
    length: float | None = None

    @property
    def merit(self) -> tuple[float, ...]:
        """What is best of a kind: of a steering vector by what it does, of a readout by how it tells the concept; of equals the earliest layer."""
        return (self.effect, -self.layer) if self.length else (self.least, self.quality.auroc, -self.layer)

    @property
    def least(self) -> float:
        """The AUROC against what is hardest to tell from the concept."""
        return min([self.quality.auroc, *(one.auroc for one in self.confusions)])


def fit_readouts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, contrast: Contrast, options: Options
) -> list[Fitted]:
    """Fit each kind at each layer on a part of a contrast set, and judge it on the rest.

    An attention probe needs the states of all tokens, which are held for one layer at a time: tokens x width x 12 bytes.

    Raises:
        ValueError: If there is no such layer, or the set cannot be split or has no pairs.
    """
    layers = list(range(len(decoder_layers(model)))) if options.layers is None else list(options.layers)
    for layer in layers:
        resolve_site(model, residual(layer))  # an error now rather than after the first pass
    study = _Study(model, tokenizer, contrast, options)
    means = study.means(layers) if set(options.kinds) - {"attention_probe"} else {}
    return [
        study.fitted(kind, layer, means.get(layer)) for layer in tqdm(layers, desc="Fitting") for kind in options.kinds
    ]


def best(fitted: Sequence[Fitted]) -> dict[str, Fitted]:
    """Of each kind the one with the highest AUROC on held-out responses, against what is hardest, or with the largest effect: see [`Fitted.merit`]."""
    kinds = dict.fromkeys(one.kind for one in fitted)
    return {kind: max((one for one in fitted if one.kind == kind), key=lambda one: one.merit) for kind in kinds}


def save_readout(path: str | Path, fitted: Fitted, model: Any, contrast: Contrast, options: Options) -> None:
    """Write a readout with what is known of it: the model, the place, how it was trained, how good it is."""
    name = str(model.config._name_or_path)
    metadata = {
        "kind": fitted.kind,
        "hook_name": residual(fitted.layer),
        "layer": fitted.layer,
        "pooling": "last" if fitted.kind == "attention_probe" else "mean",
        "model_name": Path(name).name if Path(name).exists() else name,
        "model_fingerprint": model_fingerprint(model),
        "objective": _OBJECTIVES.get(fitted.kind, options.objective),
        "l2": options.l2,
        "seed": options.seed,
        "positives": int(contrast.labels.sum()),
        "negatives": int((~contrast.labels).sum()),
        **{key: round(value, 6) for key, value in fitted.quality._asdict().items()},
        **(
            {"hardest": fitted.confusions[0].name, "hardest_auroc": round(fitted.confusions[0].auroc, 6)}
            if fitted.confusions
            else {}
        ),
        "steering_effect": round(fitted.effect, 6),
        **({"length": round(fitted.length, 6)} if fitted.length else {}),
    }
    save_probe(path, fitted.tensors, metadata)


def model_fingerprint(model: Any) -> str:
    """Hash of a model's small parameters (norms, biases): another training has others, and a large model is not read whole."""
    small = [(name, p.detach().float()) for name, p in sorted(model.named_parameters()) if p.dim() == 1]
    return fingerprint([name for name, _ in small], *(p for _, p in small))[:16]


class _Study:
    """A contrast set, split, and the model that reads it."""

    def __init__(self, model: Any, tokenizer: Any, contrast: Contrast, options: Options) -> None:
        self.model, self.tokenizer, self.contrast, self.options = model, tokenizer, contrast, options
        self.fit, self.held = contrast.split(options.heldout, options.seed)
        self.labels = contrast.labels[self.fit]
        part = contrast.take(self.fit)
        self.pairs, self.weights = part.pairs(), part.weights()
        self.sizes: dict[str, Any] = {"batch_size": options.batch_size, "max_length": options.max_length}
        if options.objective == "pairs" and not len(self.pairs):
            raise ValueError(
                "The objective 'pairs' needs prompts with a response of either kind, and there is none. Use 'bce'."
            )

    def means(self, layers: Sequence[int]) -> dict[int, Tensor]:
        """For each layer the mean states over each response's tokens, `(N, d)` float32 on the CPU, of one pass."""
        readers = [ActivationMean(residual(layer), resolve_site(self.model, residual(layer)).width) for layer in layers]
        found = {
            layer: torch.zeros(len(self.contrast.labels), reader.d_in)
            for layer, reader in zip(layers, readers, strict=True)
        }
        for rows, scores in self._passes(readers, f"{len(layers)} layers"):
            for layer, part in zip(layers, scores, strict=True):
                found[layer][rows] = part.cpu()
        return found

    def fitted(self, kind: str, layer: int, means: Tensor | None) -> Fitted:
        """One readout, of mean states `(N, d)` at its layer, which an attention probe has no use for."""
        options, effect, length = self.options, float("nan"), None
        if kind == "attention_probe" or means is None:
            tensors, scores = self._attention(layer)
        elif kind == "linear_probe":
            tensors = fit_linear(
                means[self.fit], self.labels, self.pairs, options.objective, options.l2, weights=self.weights
            )
            reader = LinearProbeReader(tensors["weight"], tensors["bias"], "mean", residual(layer))
            scores, effect = reader.encode(means)[:, 0], self._effect(layer, tensors["weight"], means)
        else:
            if kind == "steering_vector":
                vector = self._steering_vector(layer, means)
                length = float(vector.norm())
            else:
                vector = difference_of_means(means[self.fit], self.labels, self.weights)
            tensors = {"direction": torch.nn.functional.normalize(vector, dim=0).float()}
            scores = DirectionReader(tensors["direction"], "mean", residual(layer)).encode(means)[:, 0]
            effect = self._effect(layer, tensors["direction"], means, length)
        found, held = scores.double().numpy(), self.contrast.take(self.held)
        quality = judge_scores(found, self.contrast.labels, self.fit, self.held)
        read = (
            scores.sigmoid().double().numpy() if kind == "attention_probe" else found
        )  # as `shapedpo fit` says to read it
        confused = confusions(read[self.held], held.labels, held.hard())
        return Fitted(kind, layer, tensors, quality, effect, confused, length)

    def _attention(self, layer: int) -> tuple[dict[str, Tensor], Tensor]:
        """The tensors of an attention probe, and its scores of all responses, `(N,)`."""
        options, states = self.options, self._tokens(layer)
        counts = torch.tensor([len(states[index]) for index in self.fit])
        chosen = torch.cat([states[index] for index in self.fit])
        tensors = fit_attention(
            chosen,
            counts,
            self.labels,
            self.pairs,
            options.objective,
            options.l2,
            options.heads,
            options.seed,
            weights=self.weights,
        )
        query, value, bias = (tensors[name] for name in ATTENTION)
        reader = AttentionProbeReader(query, value, bias, residual(layer))
        scores = [reader.pooled(part[None], torch.ones(1, len(part), dtype=torch.bool))[0] for part in states]
        return tensors, torch.cat(scores)

    def _tokens(self, layer: int) -> list[Tensor]:
        """Each response's states, `(T_i, d)` float32 on the CPU."""
        reader = ActivationTokens(residual(layer), resolve_site(self.model, residual(layer)).width)
        found = [torch.empty(0)] * len(self.contrast.labels)
        for rows, (scores,) in self._passes([reader], f"layer {layer}"):
            for row, states in zip(rows, scores, strict=True):
                found[row] = states[states[:, 0] > 0, 1:].cpu()
        return found

    def _steering_vector(self, layer: int, means: Tensor) -> Tensor:
        """What brings the concept about, `(d,)`."""
        size, part = float(means[self.fit].norm(dim=1).mean()), self.contrast.take(self.fit)
        return fit_steering_vector(
            self.model, self.tokenizer, part, residual(layer), size, seed=self.options.seed, **self.sizes
        )

    def _effect(self, layer: int, vector: Tensor, means: Tensor, size: float | None = None) -> float:
        """Of adding a direction, on some of the held-out responses: by default as much as the two kinds' means are apart along it."""
        unit = torch.nn.functional.normalize(vector.double(), dim=0)
        if size is None:
            along, shown = means[self.fit].double() @ unit, torch.from_numpy(self.labels)
            size = float(along[shown].mean() - along[~shown].mean())
        few = [self.held[self.contrast.labels[self.held] == kind][: STEERED // 2] for kind in (True, False)]
        some = self.contrast.take(np.concatenate(few))
        return steering_effect(self.model, self.tokenizer, some, residual(layer), unit, size, **self.sizes)

    def _passes(self, readers: Sequence[ActivationReader], name: str) -> Iterator[tuple[list[int], list[Tensor]]]:
        return read_batches(self.model, self.tokenizer, self.contrast.responses, readers, **self.sizes, name=name)
