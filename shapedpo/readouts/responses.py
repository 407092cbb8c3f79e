"""Reading responses to prompts with a model, outside of training."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import jinja2
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..capture import CapturePass
from .base import ActivationReader


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Messages: TypeAlias = Sequence[Mapping[str, Any]]
Response: TypeAlias = tuple[str, str] | tuple[Messages, Messages]
"""A prompt and a response to it, as strings or as lists of messages."""


def read_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    responses: Sequence[Response],
    reader: ActivationReader,
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    name: str = "responses",
) -> Tensor:
    """Score responses, each pooled over its own tokens.

    Args:
        model: The model that reads. It is run as it is, on its device, in evaluation mode.
        tokenizer: Its tokenizer, with a chat template if the responses are conversational.
        responses: N of them, each with its prompt.
        reader: What to read.
        batch_size: Responses in a forward pass. Those of like length go together.
        max_length: Where prompt and response together are cut off, in tokens; what is cut off whole scores 0.
        name: What the progress bar and errors call them.

    Returns:
        `(N, F)` float32 on the CPU.

    Raises:
        ValueError: If a response has no token, or the model has no such hook.
    """
    scores = torch.zeros(len(responses), reader.n_features)
    for rows, (found,) in read_batches(
        model, tokenizer, responses, [reader], batch_size=batch_size, max_length=max_length, name=name
    ):
        scores[rows] = found.cpu()
    return scores


def read_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    responses: Sequence[Response],
    readers: Sequence[ActivationReader],
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    name: str = "responses",
) -> Iterator[tuple[list[int], list[Tensor]]]:
    """The same with several readers, batch by batch: the numbers of its responses, and what each reader made of them."""
    examples = [tokenize_response(tokenizer, prompt, response) for prompt, response in responses]
    empty = [index for index, (ids, start) in enumerate(examples) if start == len(ids)]
    if empty:
        raise ValueError(f"Response {empty[0]} of the {name} has no token.")
    if max_length is not None:
        examples = [(ids[:max_length], start) for ids, start in examples]
    order = sorted(range(len(examples)), key=lambda index: len(examples[index][0]))
    # Logits are not needed, and are by far the largest output.
    signature = inspect.signature(getattr(model, "get_base_model", lambda: model)().forward)
    kwargs: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in signature.parameters else {}
    was_training = model.training
    model.eval()
    try:
        for first in tqdm(range(0, len(order), batch_size), desc=f"Reading {name}"):
            rows = order[first : first + batch_size]
            ids, attention, mask = pad_examples([examples[row] for row in rows], model.device)
            with torch.no_grad(), CapturePass(model, readers, [mask] * len(readers)) as capture:
                model(input_ids=ids, attention_mask=attention, use_cache=False, **kwargs)
            yield rows, capture.scores
    finally:
        model.train(was_training)


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
        ids = tokenizer(prompt + response)["input_ids"]
    elif not isinstance(prompt, str) and not isinstance(response, str):
        ids = _chat_ids(tokenizer, [*prompt, *response])
    else:
        raise ValueError("Prompt and response must both be strings or both lists of messages.")
    before, start = prompt_ids(tokenizer, prompt), 0
    while start < min(len(before), len(ids)) and before[start] == ids[start]:
        start += 1
    return ids, start


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str | Messages) -> list[int]:
    """Token ids of a prompt that is to be answered."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    return _chat_ids(tokenizer, list(prompt), add_generation_prompt=True)


def pair_responses(rows: Iterable[Mapping[str, Any]]) -> Iterator[Response]:
    """Both completions of preference pairs, chosen first, each with its prompt (found as TRL does if it has no column)."""
    from trl.data_utils import maybe_extract_prompt

    for row in rows:
        pair = maybe_extract_prompt({key: row[key] for key in ("prompt", "chosen", "rejected") if key in row})
        yield pair["prompt"], pair["chosen"]
        yield pair["prompt"], pair["rejected"]


def response_text(response: str | Messages) -> str:
    """A response's text: of messages, the contents of those that have one."""
    return response if isinstance(response, str) else "\n".join(m["content"] for m in response if m.get("content"))


def _chat_ids(tokenizer: PreTrainedTokenizerBase, messages: list[Any], **kwargs: Any) -> list[int]:
    try:
        encoded: Any = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **kwargs)
    except jinja2.TemplateError as error:
        raise ValueError(f"The model's chat template refuses {str(messages)[:200]!r}: {error}.") from error
    return list(encoded["input_ids"])


def pad_examples(examples: list[tuple[list[int], int]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
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
