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
from .quality import Quality, judge_scores, steering_effect


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KINDS = ("direction", "linear_probe", "attention_probe")
"""What can be fitted, by the readout's `type`: difference of means, and probes."""
STEERED = 64
"""Responses, at most, on which a direction's effect is measured, half of them of either kind."""


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
    """

    kind: str
    layer: int
    tensors: dict[str, Tensor]
    quality: Quality
    effect: float


def fit_readouts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, contrast: Contrast, options: Options
) -> list[Fitted]:
    """Fit each kind at each layer on a part of a contrast set, and judge it on the rest.

    An attention probe needs the states of all tokens, which are held for one layer at a time, float32: tokens x width x 4 bytes.

    Raises:
        ValueError: If there is no such layer, or the set cannot be split or has no pairs.
    """
    layers = list(range(len(decoder_layers(model)))) if options.layers is None else list(options.layers)
    for layer in layers:
        resolve_site(model, residual(layer))  # an error now rather than after the first pass
    fit, held = contrast.split(options.heldout, options.seed)
    pairs = contrast.take(fit).pairs()
    if options.objective == "pairs" and not len(pairs):
        raise ValueError(
            "The objective 'pairs' needs prompts with a response of either kind, and there is none. Use 'bce'."
        )
    means = _means(model, tokenizer, contrast, layers, options)
    found = []
    for layer in tqdm(layers, desc="Fitting"):
        for kind in options.kinds:
            tensors, scores = _fit(model, tokenizer, contrast, kind, layer, means[layer], (fit, held), pairs, options)
            quality = judge_scores(scores.double().numpy(), contrast.labels, fit, held)
            effect = float("nan")
            if kind != "attention_probe":
                effect = _effect(model, tokenizer, contrast, layer, tensors, means[layer], (fit, held), options)
            found.append(Fitted(kind, layer, tensors, quality, effect))
    return found


def best(fitted: Sequence[Fitted]) -> dict[str, Fitted]:
    """Of each kind the one with the highest AUROC on held-out responses; of equals the earliest layer."""
    kinds = dict.fromkeys(one.kind for one in fitted)
    return {
        kind: max((one for one in fitted if one.kind == kind), key=lambda f: (f.quality.auroc, -f.layer))
        for kind in kinds
    }


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
        "objective": "difference of means" if fitted.kind == "direction" else options.objective,
        "l2": options.l2,
        "seed": options.seed,
        "positives": int(contrast.labels.sum()),
        "negatives": int((~contrast.labels).sum()),
        **{key: round(value, 6) for key, value in fitted.quality._asdict().items()},
        "steering_effect": round(fitted.effect, 6),
    }
    save_probe(path, fitted.tensors, metadata)


def model_fingerprint(model: Any) -> str:
    """Hash of a model's small parameters (norms, biases): another training has others, and a large model is not read whole."""
    small = [(name, p.detach().float()) for name, p in sorted(model.named_parameters()) if p.dim() == 1]
    return fingerprint([name for name, _ in small], *(p for _, p in small))[:16]


def _fit(
    model: Any,
    tokenizer: Any,
    contrast: Contrast,
    kind: str,
    layer: int,
    means: Tensor,
    parts: tuple[np.ndarray, np.ndarray],
    pairs: np.ndarray,
    options: Options,
) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of one readout, and its scores of all responses, `(N,)`."""
    fit, labels = parts[0], contrast.labels[parts[0]]
    if kind == "attention_probe":
        states = _tokens(model, tokenizer, contrast, layer, options)
        counts = torch.tensor([len(states[index]) for index in fit])
        chosen = torch.cat([states[index] for index in fit])
        tensors = fit_attention(
            chosen, counts, labels, pairs, options.objective, options.l2, options.heads, options.seed
        )
        query, value, bias = (tensors[name] for name in ATTENTION)
        reader: ActivationReader = AttentionProbeReader(query, value, bias, residual(layer))
        return tensors, torch.cat([_score(reader, state) for state in states])
    if kind == "linear_probe":
        tensors = fit_linear(means[fit], labels, pairs, options.objective, options.l2)
        reader = LinearProbeReader(tensors["weight"], tensors["bias"], "mean", residual(layer))
    else:
        tensors = {"direction": difference_of_means(means[fit], labels).float()}
        reader = DirectionReader(tensors["direction"], "mean", residual(layer))
    return tensors, reader.encode(means)[:, 0]


def _score(reader: ActivationReader, states: Tensor) -> Tensor:
    return reader.pooled(states[None], torch.ones(1, len(states), dtype=torch.bool))[:, 0]


def _effect(
    model: Any,
    tokenizer: Any,
    contrast: Contrast,
    layer: int,
    tensors: dict[str, Tensor],
    means: Tensor,
    parts: tuple[np.ndarray, np.ndarray],
    options: Options,
) -> float:
    fit, held = parts
    unit = torch.nn.functional.normalize(tensors.get("direction", tensors.get("weight", means[0])).double(), dim=0)
    along = (means[fit].double() @ unit).numpy()
    labels = contrast.labels[fit]
    few = [held[contrast.labels[held] == kind][: STEERED // 2] for kind in (True, False)]
    return steering_effect(
        model,
        tokenizer,
        contrast.take(np.concatenate(few)),
        residual(layer),
        unit,
        float(along[labels].mean() - along[~labels].mean()),
        batch_size=options.batch_size,
        max_length=options.max_length,
    )


def _means(
    model: Any, tokenizer: Any, contrast: Contrast, layers: Sequence[int], options: Options
) -> dict[int, Tensor]:
    """For each layer the mean states over each response's tokens, `(N, d)` float32 on the CPU, of one pass."""
    readers = [ActivationMean(residual(layer), resolve_site(model, residual(layer)).width) for layer in layers]
    found = {
        layer: torch.zeros(len(contrast.labels), reader.d_in) for layer, reader in zip(layers, readers, strict=True)
    }
    for rows, scores in _passes(model, tokenizer, contrast, readers, options, f"{len(layers)} layers"):
        for layer, part in zip(layers, scores, strict=True):
            found[layer][rows] = part.cpu()
    return found


def _tokens(model: Any, tokenizer: Any, contrast: Contrast, layer: int, options: Options) -> list[Tensor]:
    """Each response's states, `(T_i, d)` float32 on the CPU."""
    reader = ActivationTokens(residual(layer), resolve_site(model, residual(layer)).width)
    found = [torch.empty(0)] * len(contrast.labels)
    for rows, (scores,) in _passes(model, tokenizer, contrast, [reader], options, f"layer {layer}"):
        for row, states in zip(rows, scores, strict=True):
            found[row] = states[states[:, 0] > 0, 1:].cpu()
    return found


def _passes(
    model: Any, tokenizer: Any, contrast: Contrast, readers: Sequence[ActivationReader], options: Options, name: str
) -> Iterator[tuple[list[int], list[Tensor]]]:
    sizes: dict[str, Any] = {"batch_size": options.batch_size, "max_length": options.max_length}
    return read_batches(model, tokenizer, contrast.responses, readers, **sizes, name=name)
