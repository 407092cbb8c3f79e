"""What of a row's prompt has to be known in tokens, beyond what TRL's tokenization says."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from trl.data_utils import _tokenize, common_prefix_length


ROW = "shapedpo_row"
"""Column of prepared data, and key of a batch: each row's number in the data that was given."""
TURN_COLUMN = "shapedpo_turn_tokens"
"""Column of prepared data: how many of the prompt's tokens are its final user turn's, and what follows it."""
TURN = "concept_turn"
"""Key of a batch: where the final user turn begins, `(2B,)`."""


def tokenized(processing_class: Any, prompt: Any, example: Mapping[str, Any], **options: Any) -> list[int]:
    """Token ids of a prompt, or of prompt and completion, as `DPOTrainer` makes them of the same row."""
    if isinstance(prompt, str):
        return list(_tokenize(processing_class, prompt)["input_ids"])
    tools = example.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    options = {"tools": tools, **(example.get("chat_template_kwargs") or {}), **options}
    return list(_tokenize(processing_class, prompt, **options)["input_ids"])


def final_user_turn(messages: Sequence[Mapping[str, Any]]) -> int | None:
    """The index of a prompt's last message by the user, if there is one."""
    return next((index for index in reversed(range(len(messages))) if messages[index]["role"] == "user"), None)


def turn_tokens(example: Mapping[str, Any], processing_class: Any) -> int:
    """How many of the prompt's last tokens begin with the content of the final user turn.

    Token ids do not say where a turn begins. So the prompt is rendered again with two other contents of that turn, which have nothing in
    common: what all three share before is not its content, whatever the chat template is. Where there are no turns (plain text, or no
    message by the user) the whole prompt counts.
    """
    prompt, ids = example["prompt"], example["prompt_ids"]
    turn = None if isinstance(prompt, str) else final_user_turn(prompt)
    if turn is None:
        return len(ids)
    shared = len(ids)
    for content in ("a", "1"):
        other = [*prompt[:turn], {**prompt[turn], "content": content}, *prompt[turn + 1 :]]
        rendered = tokenized(processing_class, other, example, add_generation_prompt=True)
        shared = min(shared, common_prefix_length(ids, rendered))
    return len(ids) - shared


class TurnStart:
    """Adds to a batch where each sequence's final user turn begins, `(2B,)` int32 under `TURN`, however it was truncated."""

    def __call__(self, examples: Sequence[Mapping[str, Any]], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if TURN_COLUMN not in examples[0]:  # data that is not trained on
            return {}
        turns = torch.tensor([example[TURN_COLUMN] for example in examples]).repeat(2)
        kept = (batch["attention_mask"] - batch["completion_mask"]).sum(dim=1)  # of the prompt
        padding = batch["attention_mask"].argmax(dim=1)  # a user's collator may have it on the left
        return {TURN: (padding + (kept - turns).clamp(min=0)).to(torch.int32)}
