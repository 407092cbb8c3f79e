"""Trains the lab's sparse autoencoder."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from .text import dialogues


MODEL_NAME = "shapedpo/lab"  # what the SAE's metadata says of the model; a path would tell of the machine that built it


def train_lab_sae(
    model_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    *,
    layer: int,
    d_sae: int,
    k: int,
    training_tokens: int,
    seed: int,
    context_size: int = 80,
) -> None:
    """Trains an SAE on the lab's own text ([`train_sae`](../sae/train.py)).

    Args:
        model_path: folder of the trained model and its tokenizer.
        out: folder for `cfg.json` and `sae_weights.safetensors`.
        layer: the decoder layer whose output is read.
        d_sae: number of features.
        k: active features a token, on average.
        training_tokens: tokens of the lab's text to train on.
        seed: of text, initialisation and order.
        context_size: tokens a dialogue is cut or padded to.
    """
    from ..sae.train import token_rows, train_sae

    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question.text}, {"role": "assistant", "content": answer}], tokenize=False
        )
        for question, answer, _ in dialogues(training_tokens // 36 + 512, seed)  # a dialogue has about 43 tokens
    ]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    train_sae(
        model_path,
        tokenizer,
        token_rows(ids, context_size, tokenizer.pad_token_id),
        out,
        layer=layer,
        d_sae=d_sae,
        k=k,
        training_tokens=training_tokens,
        batch_tokens=min(1024, training_tokens // 8),
        learning_rate=1e-3,
        seed=seed,
        model_name=MODEL_NAME,
    )
