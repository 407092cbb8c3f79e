"""What the commands need to have models answer prompts: the models, how long an answer may be, and prompts in tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import find_adapter_config_file

from ...errors import UserError, as_user_error
from ...monitor.probe.rollouts import choose_prompts, context_length
from ...openings import tokenised
from ...sources import model_source


_LOOKED_AT = 50  # rows for each prompt that is wanted: some are too long, or repeat others


def answer_length(model: Any, asked: int | None) -> int:
    """Where an answer is cut: after as many tokens as asked for, by default 256 or half of the model's context."""
    return min(256, context_length(model) // 2) if asked is None else asked


def longest_prompt(model: Any, max_new_tokens: int) -> int:
    """Tokens of the longest prompt that leaves room for an answer."""
    return context_length(model) - max_new_tokens


def load_model(name: str, base: str, dtype: str, device: Any) -> Any:
    """A causal language model, ready to answer.

    Args:
        name: A folder, or a name on the hub; of a PEFT adapter too.
        base: What an adapter is merged into.
        dtype: float32, bfloat16 or float16.
        device: Where it goes.

    Raises:
        UserError: If there is none of that name or type.
    """
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"Unknown dtype {dtype!r}. Choose float32, bfloat16 or float16.")
    with as_user_error(OSError, ValueError, RuntimeError, prefix=f"The model {name!r} cannot be loaded: "):
        if find_adapter_config_file(name) is None:
            model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype))
        else:
            from peft import PeftConfig, PeftModel

            was = PeftConfig.from_pretrained(name).base_model_name_or_path
            if was and model_source(was) != model_source(base):
                print(f"The adapter {name!r} says that it was trained from {was!r}; it is read on top of {base!r}.")
            whole: Any = AutoModelForCausalLM.from_pretrained(model_source(base), dtype=getattr(torch, dtype))
            model = PeftModel.from_pretrained(whole, name).merge_and_unload()
    return model.to(device).eval().requires_grad_(False)


def prompt_tokens(data: Any, tokenizer: Any, n: int, longest: int, seed: int) -> list[list[int]]:
    """Tokens of a dataset's prompts, as training would tokenise them.

    Args:
        data: Rows with `prompt`, or with `chosen` and `rejected` that begin alike.
        tokenizer: The model's.
        n: How many at most; each is taken once.
        longest: Prompts of more tokens are passed over.
        seed: Which are taken.

    Raises:
        UserError: If there are none.
    """
    rows = np.arange(len(data))
    if len(rows) > _LOOKED_AT * n:  # at random: data are often sorted by where they come from
        rows = np.sort(np.random.default_rng(seed).choice(rows, _LOOKED_AT * n, replace=False))
        data = data.select(rows)
    if "prompt" in data.column_names:
        # only the prompt matters, and what it is rendered with: what follows it is made up
        read = [name for name in ("prompt", "tools", "chat_template_kwargs") if name in data.column_names]
        data = data.select_columns(read)
        prompts = data["prompt"][:]
        if not prompts or None in prompts:
            raise UserError(
                f"Row {rows[prompts.index(None)]} of the prompts is null. Leave it out."
                if prompts
                else "There are no prompts."
            )
        answer: Any = "." if isinstance(prompts[0], str) else [{"role": "assistant", "content": "."}]
        for side in ("chosen", "rejected"):
            data = data.add_column(side, [answer] * len(prompts))
    args = SimpleNamespace(max_length=None, truncation_mode="keep_start", dataset_num_proc=None)
    with as_user_error(ValueError):
        return choose_prompts(tokenised(data, tokenizer, args, "prompts"), n, longest, seed, "--max-new-tokens")
