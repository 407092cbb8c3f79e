"""Contrast sets that the model makes itself: the same prompts, answered under two opposite instructions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from ..readouts.responses import Messages, Response, prompt_ids, response_text
from .contrast import Row


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def instructed_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Messages],
    instructions: tuple[str, str],
    *,
    seed: int,
    place: str = "user",
    batch_size: int = 16,
    max_new_tokens: int = 128,
    judge: Callable[[Sequence[tuple[str, str]]], list[bool]] | None = None,
) -> list[Row]:
    """Rows for [`~shapedpo.probes.contrast.Contrast.of`]: each prompt with the answer under either instruction, but without the instruction.

    What is read later is the answer to the prompt as it stands, so that the readout learns the answer and not the request.

    Args:
        model: Answers, sampled at temperature 1.
        tokenizer: Its tokenizer.
        prompts: Text or messages.
        instructions: One that asks for the concept, and its opposite.
        seed: Of the sampling.
        place: Where the instruction goes, `"user"` or `"system"`.
        batch_size: Prompts answered at once.
        max_new_tokens: Where an answer is cut.
        judge: Of `(prompt, answer)` texts; answers of which it says the opposite of what was asked for are left out.

    Raises:
        ValueError: If nothing is left.
    """
    from ..inoculation import inoculated

    rows: list[Row] = []
    for number, (instruction, label) in enumerate(zip(instructions, (True, False), strict=True)):
        asked = [inoculated(prompt, instruction, place) for prompt in prompts]
        texts = sample(
            model, tokenizer, asked, seed + number, batch_size, max_new_tokens, f"Answering: {instruction[:40]}"
        )
        for prompt, text in zip(prompts, texts, strict=True):
            rows.append(Row(prompt, _as_answer(prompt, text), label, "instructions"))
    rows = [row for row in rows if response_text(row.response).strip()]
    if judge is not None:
        said = judge([(response_text(row.prompt), response_text(row.response)) for row in rows])
        rows = [row for row, shown in zip(rows, said, strict=True) if shown == row.label]
    if not rows:
        raise ValueError(
            "No answer is left: all were empty, or the judge says the opposite of each. Change the instructions."
        )
    return rows


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Messages],
    *,
    seed: int,
    batch_size: int = 16,
    max_new_tokens: int = 128,
) -> list[Response]:
    """The model's own answers to prompts, sampled at temperature 1, without those that are empty."""
    texts = sample(model, tokenizer, prompts, seed, batch_size, max_new_tokens, "Answering")
    return [(prompt, _as_answer(prompt, text)) for prompt, text in zip(prompts, texts, strict=True) if text.strip()]  # type: ignore[misc]


def _as_answer(prompt: str | Messages, text: str) -> str | Messages:
    """Text as the answer to a prompt, of its kind."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Messages],
    seed: int,
    batch_size: int,
    max_new_tokens: int,
    title: str,
) -> list[str]:
    """An answer to each prompt, in their order, from the model's full distribution. The random state is left as it was."""
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    answers = [""] * len(ids)
    was_training = model.training
    model.eval()
    generate: Any = model.generate
    try:
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            for first in tqdm(range(0, len(order), batch_size), desc=title):
                rows = order[first : first + batch_size]
                length = max(len(ids[row]) for row in rows)
                torch.manual_seed(seed + first)  # a batch's answers are the same whatever came before
                found = generate(
                    input_ids=torch.tensor(
                        [[pad] * (length - len(ids[r])) + ids[r] for r in rows], device=model.device
                    ),
                    attention_mask=torch.tensor(
                        [[0] * (length - len(ids[r])) + [1] * len(ids[r]) for r in rows], device=model.device
                    ),
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    max_new_tokens=max_new_tokens,
                    pad_token_id=pad,
                    use_cache=True,
                )
                for row, text in zip(
                    rows, tokenizer.batch_decode(found[:, length:], skip_special_tokens=True), strict=True
                ):
                    answers[row] = text
    finally:
        model.train(was_training)
    return answers
