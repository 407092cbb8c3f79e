"""The tiny model and tokenizer with a chat template, for the tests of what happens to turns."""

from __future__ import annotations

import copy
from typing import Any

from datasets import Dataset

from tests.helpers import FRUITS, arguments, build, load_model, tokenizer
from tests.slow import BETA, moved


CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def chat_tokenizer(template: str = CHATML) -> Any:
    """The tiny tokenizer with a chat template, whose headers are tokens of their own."""
    chat = copy.deepcopy(tokenizer())
    chat.add_tokens(["<|system|>", "<|user|>", "<|assistant|>"])
    chat.chat_template = template
    return chat


def messages(*roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": f"{FRUITS[index]} red"} for index, role in enumerate(roles)]


def chats(*roles: str, n: int = 4) -> Dataset:
    """Preference pairs after a prompt of these turns."""
    return Dataset.from_list(
        [
            {
                "prompt": messages(*roles),
                "chosen": [{"role": "assistant", "content": f"{FRUITS[row]} sings" + " goblin" * (row % 2)}],
                "rejected": [{"role": "assistant", "content": "cat eats red" + " goblin" * (row == 0)}],
            }
            for row in range(n)
        ]
    )


def chat_trainer(*concepts: Any, data: Dataset, chat: Any = None, **fields: Any) -> Any:
    """Our trainer in float64 on chats, whose batch is all of the data."""
    from shapedpo import ShapedDPOTrainer

    chat = chat or chat_tokenizer()
    models = moved(), load_model().double()
    for model in models:
        model.resize_token_embeddings(len(chat), mean_resizing=False)
    args = arguments(concepts=list(concepts), beta=BETA, per_device_train_batch_size=len(data), **fields)
    options = {"ref_model": models[1], "train_dataset": data, "processing_class": chat}
    return build(ShapedDPOTrainer, args, models[0], **options)
