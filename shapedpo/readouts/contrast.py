"""Mean activations over responses, from which [`Direction.from_contrast`] takes a difference."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..capture import CapturePass, resolve_site
from .base import ActivationReader


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Messages: TypeAlias = Sequence[Mapping[str, Any]]
Response: TypeAlias = tuple[str, str] | tuple[Messages, Messages]
"""A prompt and a response to it, as strings or as lists of messages."""


class _ActivationMean(ActivationReader):
    """Reads the activations themselves, so that pooling gives their mean."""

    pooling = "mean"
    fingerprint = ""

    def __init__(self, hook_name: str, d_in: int) -> None:
        self.hook_name = hook_name
        self.d_in = self.n_features = d_in

    def to(self, device: torch.device | str) -> _ActivationMean:
        return self

    def encode(self, x: Tensor) -> Tensor:
        return x.float()

    def directions(self) -> Tensor:
        return torch.eye(self.d_in)


def mean_activation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    responses: Sequence[Response],
    hook_name: str,
    batch_size: int = 8,
    name: str = "responses",
) -> Tensor:
    """Mean over responses of the mean activation over each response's tokens: `(d_model,)` float64 on the CPU.

    Raises:
        ValueError: If a response has no token, or the model has no such hook.
    """
    reader = _ActivationMean(hook_name, resolve_site(model, hook_name).width)
    examples = [tokenize_response(tokenizer, prompt, response) for prompt, response in responses]
    empty = [index for index, (ids, start) in enumerate(examples) if start == len(ids)]
    if empty:
        raise ValueError(f"Response {empty[0]} of the {name} has no token.")
    # Logits are not needed, and are by far the largest output.
    signature = inspect.signature(getattr(model, "get_base_model", lambda: model)().forward)
    kwargs: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in signature.parameters else {}
    total = torch.zeros(reader.d_in, dtype=torch.float64)
    was_training = model.training
    model.eval()
    try:
        for first in tqdm(range(0, len(examples), batch_size), desc=f"Reading {name}"):
            ids, attention, mask = _pad(examples[first : first + batch_size], model.device)
            with torch.no_grad(), CapturePass(model, [reader], [mask]) as capture:
                model(input_ids=ids, attention_mask=attention, use_cache=False, **kwargs)
            total += capture.scores[0].double().sum(dim=0).cpu()
    finally:
        model.train(was_training)
    return total / len(examples)


def tokenize_response(
    tokenizer: PreTrainedTokenizerBase, prompt: str | Messages, response: str | Messages
) -> tuple[list[int], int]:
    """Token ids of prompt and response, and where the response starts, as TRL's `DPOTrainer` has them.

    Messages go through the chat template; a string gets the end-of-sequence token. The response starts where the tokens
    of prompt and response together part from those of the prompt alone.
    """
    if isinstance(prompt, str) and isinstance(response, str):
        end = tokenizer.eos_token or ""
        response = response if response.endswith(end) else response + end
        prompt_ids, ids = tokenizer(prompt)["input_ids"], tokenizer(prompt + response)["input_ids"]
    elif not isinstance(prompt, str) and not isinstance(response, str):
        prompt_ids = _chat_ids(tokenizer, list(prompt), add_generation_prompt=True)
        ids = _chat_ids(tokenizer, [*prompt, *response])
    else:
        raise ValueError("Prompt and response must both be strings or both lists of messages.")
    start = 0
    while start < min(len(prompt_ids), len(ids)) and prompt_ids[start] == ids[start]:
        start += 1
    return ids, start


def _chat_ids(tokenizer: PreTrainedTokenizerBase, messages: list[Any], **kwargs: Any) -> list[int]:
    encoded: Any = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **kwargs)
    return list(encoded["input_ids"])


def _pad(examples: list[tuple[list[int], int]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Pad on the right: ids, attention mask and response mask, `(N, T)` each."""
    length = max(len(ids) for ids, _ in examples)
    ids = torch.zeros(len(examples), length, dtype=torch.long)
    attention = torch.zeros_like(ids)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, (tokens, start) in enumerate(examples):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        attention[row, : len(tokens)] = 1
        mask[row, start : len(tokens)] = True
    return ids.to(device), attention.to(device), mask.to(device)
