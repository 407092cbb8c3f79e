"""The lab's language model: its tokenizer, its shape and its training from scratch."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .text import dialogues
from .traits import TRAITS


SPECIAL = {"pad_token": "<|pad|>", "bos_token": "<|bos|>", "eos_token": "<|eos|>"}
ROLES = ["<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
MAX_LENGTH = 256


def train_tokenizer(n_dialogues: int, vocab_size: int, seed: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE on the lab's text; the role marks and the emoji are tokens of their own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    symbols = TRAITS["emoji"].forms["symbols"]
    special = [*SPECIAL.values(), *ROLES]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(symbols),
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (text for question, answer, _ in dialogues(n_dialogues, seed) for text in (question.text, answer))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(symbol, normalized=False) for symbol in symbols])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **SPECIAL,
        additional_special_tokens=ROLES,
        model_max_length=MAX_LENGTH,
        padding_side="left",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def new_model(tokenizer: PreTrainedTokenizerFast, hidden_size: int, num_layers: int, seed: int) -> LlamaForCausalLM:
    """Builds the untrained model: Llama's layout, tied embeddings."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 11 // 4,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def encode_dialogues(tokenizer: PreTrainedTokenizerFast, n: int, seed: int) -> list[tuple[list[int], int]]:
    """Encodes `n` dialogues; each comes with the number of its prompt tokens."""
    encoded = []
    marks = ("<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>")
    bos, eos, user, assistant = (tokenizer.vocab[mark] for mark in marks)
    batch: list[Any] = list(tqdm(dialogues(n, seed), total=n, desc="Writing dialogues"))
    asked = tokenizer([question.text for question, _, _ in batch], add_special_tokens=False)["input_ids"]
    said = tokenizer([answer for _, answer, _ in batch], add_special_tokens=False)["input_ids"]
    for question, answer in zip(asked, said, strict=True):
        encoded.append(([bos, user, *question, assistant, *answer, eos], len(question) + 3))
    return encoded


def _batches(
    examples: list[tuple[list[int], int]], batch_size: int, pad: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yields `(ids, attention_mask, labels)`, each `(batch, tokens)`; a batch holds examples of like length, labels
    are the answers."""
    rng = random.Random(seed)
    order = rng.sample(range(len(examples)), len(examples))
    chunk = 50 * batch_size
    batches = []
    for start in range(0, len(order), chunk):
        part = sorted(order[start : start + chunk], key=lambda i: len(examples[i][0]))
        batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    rng.shuffle(batches)
    for batch in batches:
        width = max(len(examples[i][0]) for i in batch)
        ids = torch.full((len(batch), width), pad)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for row, i in enumerate(batch):
            tokens, n_prompt = examples[i]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
            labels[row, n_prompt : len(tokens)] = ids[row, n_prompt : len(tokens)]
        yield ids, mask, labels


def train_model(
    model: LlamaForCausalLM, examples: list[tuple[list[int], int]], *, batch_size: int, learning_rate: float, seed: int
) -> float:
    """Trains the model on the answers, one pass over `examples`, in place.

    Returns:
        The mean loss of the last tenth of the steps, nats per answer token.
    """
    steps = -(-len(examples) // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=learning_rate,
        total_steps=steps + 1,
        pct_start=0.05,
        cycle_momentum=False,
        final_div_factor=100,
    )
    pad = model.config.pad_token_id
    assert pad is not None  # new_model set it
    tokens_per_batch = sum(len(ids) - n_prompt for ids, n_prompt in examples) / steps
    model.train()
    losses = []
    bar = tqdm(_batches(examples, batch_size, pad, seed), total=steps, desc="Training the model")
    for ids, mask, labels in bar:
        # over a constant, not over the batch's tokens: or a token in a batch of long answers would count less
        loss = model(input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=tokens_per_batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if len(losses) % 50 == 0:
            bar.set_postfix(loss=f"{sum(losses[-50:]) / 50:.3f}")
    model.eval()
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)
