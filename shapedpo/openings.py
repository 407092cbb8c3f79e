"""The openings of TRL's loss that we use, and nothing of the loss itself.

* `_compute_loss(model, ...)` calls `model` for the policy: a callable in its place sees the output and may change it.
* Where `precompute_ref_logps` is true, the reference's log-probabilities are the batch's.
* Where `use_weighting` is true, a pair's loss is multiplied by a weight made of `log_sum_sq_probs`.
* `compute_ref_log_probs(model, inputs)` makes the reference's pass.
* `_prepare_dataset` tokenises a dataset, and needs nothing of the trainer but its tokenizer.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import jinja2
import torch
from torch import Tensor
from trl import DPOTrainer
from trl.trainer import utils as trl_utils


TRL_VERSIONS = ">=1.15,<1.17"
"""The releases of TRL that have them."""

REF_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
"""The batch's keys of the reference's log-probabilities."""

_METHODS = {
    "_compute_loss": ["self", "model", "inputs", "return_outputs"],
    "compute_ref_log_probs": ["self", "model", "inputs"],
    "_precompute_ref_logps": ["self", "dataset", "name", "batch_size"],
    "_set_signature_columns_if_needed": ["self"],
    "_prepare_dataset": ["self", "dataset", "processing_class", "args", "dataset_name"],
}
_OUTPUT_FIELDS = ("log_probs", "log_sum_sq_probs")


def check_trl() -> None:
    """Check that the installed TRL has the openings.

    Raises:
        ImportError: If it lacks one; the text has the versions that have them.
    """
    missing = []
    for name, parameters in _METHODS.items():
        method = getattr(DPOTrainer, name, None)
        if method is None or list(inspect.signature(method).parameters) != parameters:
            missing.append(f"DPOTrainer.{name}({', '.join(parameters)})")
    fields = getattr(getattr(trl_utils, "FusedCausalLMOutput", None), "__dataclass_fields__", {})
    missing += [f"FusedCausalLMOutput.{field}" for field in _OUTPUT_FIELDS if field not in fields]
    if missing:
        raise ImportError(
            f"trl {version('trl')} lacks {', '.join(missing)}, through which ShapedDPOTrainer enters the loss. The "
            f"versions that have it are trl{TRL_VERSIONS}: pip install 'trl{TRL_VERSIONS}'."
        )


def tokenised(dataset: Any, tokenizer: Any, args: Any, name: str) -> Any:
    """A preference dataset as DPOTrainer tokenises it, without a trainer: with `prompt_ids`, `chosen_ids` and `rejected_ids`.

    Args:
        dataset: In any form that TRL takes.
        tokenizer: The model's.
        args: Has `max_length`, `truncation_mode` and `dataset_num_proc`; a row whose prompt fills `max_length` is dropped.
        name: What to call the dataset in progress bars.

    Raises:
        ValueError: If the tokenizer's chat template refuses a row.
    """
    check_trl()
    trainer: Any = SimpleNamespace(_tokenizer=tokenizer)
    try:
        return DPOTrainer._prepare_dataset(trainer, dataset, tokenizer, args, name)
    except jinja2.TemplateError as error:
        raise ValueError(
            f"The model's chat template refuses a row: {error}. Every message needs `role` and `content`, and a role that the template knows."
        ) from error


def token_weights(mask: Tensor, ld_alpha: float | None) -> Tensor:
    """How much each token counts in its sequence's log-probability: LD-DPO (arXiv 2409.06411) discounts the longer one's tail.

    Args:
        mask: `(2B, T)`, the completions' tokens, chosen ones first.
        ld_alpha: LD-DPO's weight of the tail, if any.
    """
    weight = mask.float()
    if ld_alpha is None:
        return weight
    shared = torch.minimum(*mask.sum(dim=1).chunk(2)).repeat(2)[:, None]
    return torch.where(mask.cumsum(dim=1) > shared, ld_alpha * weight, weight)


def sequence_logps(log_probs: Tensor, completion_mask: Tensor, ld_alpha: float | None) -> tuple[Tensor, Tensor]:
    """Sum a model's token log-probabilities as TRL does those of policy and reference.

    Args:
        log_probs: `(2B, T')`, of a model's output. (Virtual tokens of prompt-learning PEFT come first.)
        completion_mask: `(2B, T)`.
        ld_alpha: LD-DPO's weight of the tail, if any.

    Returns:
        `(B,)` of the chosen and of the rejected completions.
    """
    weights = token_weights(completion_mask[:, 1:], ld_alpha)  # the first token has no log-probability
    chosen, rejected = (log_probs[:, -weights.shape[1] :] * weights).sum(dim=1).chunk(2)
    return chosen, rejected


def without(log_probs: Tensor, leaving: Tensor) -> Tensor:
    """Token log-probabilities, 0 for the tokens that leave.

    Args:
        log_probs: `(2B, T')`, of a model's output.
        leaving: `(2B, T)` bool. (The first token has no log-probability; virtual tokens of prompt-learning PEFT come before.)
    """
    virtual, real = log_probs.split([log_probs.shape[1] - leaving.shape[1] + 1, leaving.shape[1] - 1], dim=1)
    return torch.cat([virtual, real.masked_fill(leaving[:, 1:], 0.0)], dim=1)


def hand_pair_weights(outputs: Any, weights: Tensor, completion_mask: Tensor, wpo: bool) -> None:
    """Hand pair weights to TRL's loss by way of its WPO weights.

    With `use_weighting`, TRL multiplies a pair's loss by `exp(mean over tokens of (log_probs - log_sum_sq_probs))` of both its
    completions (the WPO weight, arXiv 2406.11827). Writing a `log_sum_sq_probs` that makes this mean half the logarithm of our
    weight on either side makes the product the weight itself, in the value of the loss as in its gradient, for each
    loss type that TRL can weight.

    Args:
        outputs: The policy's output. Its `log_sum_sq_probs` is written.
        weights: `(B,)`, not negative.
        completion_mask: `(2B, T)`.
        wpo: Whether the user asked for WPO weighting as well; the weights are then multiplied.
    """
    log_probs = outputs.log_probs.detach()
    # exp(-1e4) is 0 in any float type, and no infinity meets a mask of zeros.
    log_weights = weights.log().clamp(min=-1e4)
    chosen_empty, rejected_empty = (completion_mask[:, 1:].sum(dim=1) == 0).chunk(2)
    # A completion without tokens has no mean that could carry its half: the other one carries both.
    chosen_share = torch.where(rejected_empty, 1.0, torch.where(chosen_empty, 0.0, 0.5))
    share = torch.cat([chosen_share, 1.0 - chosen_share])  # (2B,)
    base = outputs.log_sum_sq_probs if wpo else log_probs
    outputs.log_sum_sq_probs = base - (share * log_weights.repeat(2))[:, None].to(base.dtype)


def mutable_losses() -> torch.autograd.graph.saved_tensors_hooks:
    """A context in which TRL may multiply a loss in place by its weights.

    The hinge loss is a ReLU, whose backward pass needs its own result: autograd gets a copy, of one number a pair.
    """
    return torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda tensor: tensor)


@contextmanager
def restored(owner: Any, *names: str) -> Iterator[None]:
    """Put attributes back to what they were, whatever happens inside."""
    values = {name: getattr(owner, name) for name in names}
    try:
        yield
    finally:
        for name, value in values.items():
            setattr(owner, name, value)
