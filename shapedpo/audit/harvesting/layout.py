"""How a batch of pairs is laid out for one forward pass, and which of its tokens are read.

A pair shares its prompt, so it goes into one row: prompt, chosen, rejected, under a mask in which the rejected completion does not see
the chosen one, with positions that go on from the prompt for both. The prompt is computed once, and padding follows from one
length a pair. Where a model cannot be run like that, each completion goes into a row of its own, as in training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from ...capture import run_to
from ...reading import reading_masks
from .shards import SPANS


PROMPT, CHOSEN, REJECTED = range(len(SPANS))


class Batch(NamedTuple):
    """Some pairs, ready to run.

    Attributes:
        inputs: What the model takes, on the CPU.
        slot: `(N, T)` int64, for each token `3 x pair + span`, or -1 where it is not read.
        ids: `(N, T)` int64.
        n_tokens: How many of them are not padding.
    """

    inputs: dict[str, Any]
    slot: Tensor
    ids: Tensor
    n_tokens: int


Array: TypeAlias = np.ndarray
Layout = Callable[[dict[str, Tensor], Any, "Tokens"], Batch]


class Tokens(NamedTuple):
    """What is needed of the tokenizer."""

    bos: int | None
    eos: int | None
    pad: int


def separate(inputs: dict[str, Tensor], config: Any, tokens: Tokens) -> Batch:
    """Each completion in a row of its own behind its prompt, as TRL's collator lays a batch out. The prompt is read in the chosen row.

    Args:
        inputs: A batch of B pairs of TRL's collator, `(2B, T)` each.
        config: The model's configuration, of the text part.
        tokens: Of the tokenizer.
    """
    completion, prompt = reading_masks(inputs, tokens.bos, tokens.eos)
    ids = inputs["input_ids"]
    pairs = len(ids) // 2
    pair = 3 * torch.arange(pairs)[:, None]
    slot = torch.full_like(ids, -1)
    chosen, rejected = slot[:pairs], slot[pairs:]
    chosen.copy_(torch.where(prompt[:pairs], pair + PROMPT, chosen))
    chosen.copy_(torch.where(completion[:pairs], pair + CHOSEN, chosen))
    rejected.copy_(torch.where(completion[pairs:], pair + REJECTED, rejected))
    attended = inputs["attention_mask"]
    return Batch({"input_ids": ids, "attention_mask": attended}, slot, ids, int(attended.sum()))


def shared(inputs: dict[str, Tensor], config: Any, tokens: Tokens) -> Batch:
    """Each pair in one row, with its prompt once. See [`separate`] for the arguments.

    Where truncation has left the two completions different prompts, the row holds both, and nothing is shared.
    """
    apart = separate(inputs, config, tokens)
    attended = inputs["attention_mask"].bool()
    lengths = attended.sum(dim=1).tolist()
    prompts = (attended & ~inputs["completion_mask"].bool()).sum(dim=1).tolist()
    pairs = len(lengths) // 2
    rows: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []  # ids, slots, positions, branches
    for i in range(pairs):
        c, r = i, pairs + i  # the collator pads on the right
        prompt = prompts[c]
        same = prompt == prompts[r] and torch.equal(apart.ids[c, :prompt], apart.ids[r, :prompt])
        skip = prompt if same else 0
        both = [(c, slice(0, lengths[c])), (r, slice(skip, lengths[r]))]
        branch = torch.ones(lengths[c] + lengths[r] - skip, dtype=torch.int64)
        branch[:skip] = 0
        branch[lengths[c] :] = 2
        rows.append(
            (
                torch.cat([apart.ids[row, part] for row, part in both]),
                torch.cat([apart.slot[row, part] for row, part in both]),
                torch.cat([torch.arange(part.start, part.stop) for _, part in both]),
                branch,
            )
        )
    pad = torch.nn.utils.rnn.pad_sequence
    ids, slot, position, branch = (
        pad([row[part] for row in rows], batch_first=True, padding_value=value)
        for part, value in enumerate((tokens.pad, -1, 0, 3))
    )
    given = {"input_ids": ids, "position_ids": position, "attention_mask": _masks(branch, position, config)}
    return Batch(given, slot, ids, int((branch < 3).sum()))


def _masks(branch: Tensor, position: Tensor, config: Any) -> Any:
    """Which tokens each token sees: `(B, 1, T, T)` bool, for models with several kinds of layers a mapping of kinds to masks.

    A token sees what comes before it in its own branch (1 and 2; padding is 3) and in the trunk (0), and in layers with a
    sliding window only what is near.
    """
    order = torch.arange(branch.shape[1])
    sees = (branch[:, :, None] == branch[:, None]) | (branch[:, None] == 0)
    sees = (sees & (order[:, None] >= order))[:, None]
    window = getattr(config, "sliding_window", None)
    if window is None or getattr(config, "use_sliding_window", None) is False:
        return sees
    near = sees & ((position[:, :, None] - position[:, None]) < window)[:, None]
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    if len(kinds) == 1:
        return near if "sliding_attention" in kinds else sees
    return {kind: near if kind == "sliding_attention" else sees for kind in kinds}


def run(model: nn.Module, hook_name: str, batch: Batch) -> tuple[Tensor, Tensor]:
    """Run a model up to a hook point.

    Returns:
        The activations of the tokens that are read, `(M, d)`, and their slots, `(M,)`, both on the model's device. The tokens of
        a slot stand in order.
    """
    weight = next(model.parameters())
    x = run_to(model, hook_name, use_cache=False, **_placed(batch.inputs, weight))
    places = (batch.slot.flatten() >= 0).nonzero()[:, 0].to(x.device)
    return x.flatten(0, 1)[places], batch.slot.flatten().to(x.device)[places]


def _placed(inputs: dict[str, Any], weight: Tensor) -> dict[str, Any]:
    def place(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: place(entry) for name, entry in value.items()}
        value = value.to(weight.device)
        if value.dim() < 4:
            return value
        # Added to the scores, which is what every attention of transformers can do with a mask.
        dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
        return torch.zeros(value.shape, dtype=dtype, device=weight.device).masked_fill_(~value, torch.finfo(dtype).min)

    return {name: place(value) for name, value in inputs.items()}


def best_layout(model: nn.Module, hook_name: str, inputs: dict[str, Tensor], config: Any, tokens: Tokens) -> Layout:
    """`shared`, if it gives this model's activations; `separate` for models that see a token's neighbours otherwise (state-space models,
    chunked attention) or take no such mask.

    Args:
        model: The model.
        hook_name: Where it is read.
        inputs: Pairs to try it on: those with the longest sequences, so that no window of attention is missed.
        config: The model's configuration, of the text part.
        tokens: Of the tokenizer.
    """
    expected, slots = run(model, hook_name, separate(inputs, config, tokens))
    try:
        found, other = run(model, hook_name, shared(inputs, config, tokens))
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError):
        return separate
    expected, found = expected[slots.argsort(stable=True)].float(), found[other.argsort(stable=True)].float()
    error = (found - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-9)
    # A wrong mask is wrong by much; what is left is rounding.
    tolerance = 1e-4 if next(model.parameters()).dtype == torch.float32 else 0.1
    return shared if len(error) == 0 or float(error.max()) < tolerance else separate


def row_length(prompt: Array, chosen: Array, rejected: Array, max_length: int | None, keep_end: bool) -> Array:
    """Tokens of each pair in a shared row, `(n,)` int64, from those of its parts before truncation."""
    limit = np.iinfo(np.int64).max if max_length is None else max_length
    longer = np.maximum(chosen, rejected) + prompt
    once = np.where(keep_end & (longer > limit), 0, np.minimum(prompt, limit))
    both: Array = np.minimum(prompt + chosen, limit) + np.minimum(prompt + rejected, limit) - once
    return both
