"""Trains the lab's sparse autoencoder with sae-lens."""

from __future__ import annotations

import json
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .text import dialogues


MODEL_NAME = "shapedpo/lab"  # what the SAE's metadata says of the model; a path would tell of the machine that built it


def _tokens(tokenizer: PreTrainedTokenizerBase, n: int, seed: int, context_size: int) -> Dataset:
    """`n` dialogues, one a row, cut or padded on the right to `context_size` tokens (under a causal mask padding
    changes nothing before it)."""
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question.text}, {"role": "assistant", "content": answer}], tokenize=False
        )
        for question, answer, _ in dialogues(n, seed)
    ]
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        padding="max_length",
        truncation=True,
        max_length=context_size,
        padding_side="right",
    )
    return Dataset.from_dict({"input_ids": encoded["input_ids"]})


def train_sae(
    model_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    *,
    layer: int,
    d_in: int,
    d_sae: int,
    k: int,
    training_tokens: int,
    seed: int,
    context_size: int = 80,
) -> None:
    """Trains a BatchTopK SAE on the output of decoder layer `layer` and saves it as sae-lens does, as a JumpReLU SAE.

    The beginning-of-sequence and padding tokens are left out: their activations are outliers, and nothing reads them.

    Args:
        model_path: folder of the trained model and its tokenizer.
        out: folder for `cfg.json` and `sae_weights.safetensors`.
        layer: the decoder layer whose output is read.
        d_in: the model's hidden size.
        d_sae: number of features.
        k: active features a token, on average.
        training_tokens: tokens of the lab's text to train on.
        seed: of text, initialisation and order.
        context_size: tokens a dialogue is cut or padded to.
    """
    from sae_lens import (
        BatchTopKTrainingSAEConfig,
        LanguageModelSAERunnerConfig,
        LanguageModelSAETrainingRunner,
        LoggingConfig,
    )
    from sae_lens.load_model import load_model

    hook_name = f"model.layers.{layer}"
    batch = min(1024, training_tokens // 8)
    steps = training_tokens // batch
    cfg = LanguageModelSAERunnerConfig(
        sae=BatchTopKTrainingSAEConfig(
            d_in=d_in, d_sae=d_sae, k=k, normalize_activations="expected_average_only_in", decoder_init_norm=0.1
        ),
        model_name=MODEL_NAME,
        model_class_name="AutoModelForCausalLM",
        hook_name=hook_name,
        dataset_path="",
        is_dataset_tokenized=True,
        context_size=context_size,
        training_tokens=training_tokens,
        train_batch_size_tokens=batch,
        store_batch_size_prompts=64,
        n_batches_in_buffer=16,
        n_batches_for_norm_estimate=20,
        lr=1e-3,
        lr_warm_up_steps=steps // 20,
        lr_decay_steps=steps // 4,
        dead_feature_window=200,
        feature_sampling_window=1_000_000,  # its log would be the only use
        prepend_bos=True,
        exclude_special_tokens=[tokenizer.bos_token_id, tokenizer.pad_token_id],
        seed=seed,
        device="cpu",
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=str(out),
    )
    model = load_model(cfg.model_class_name, str(model_path), device="cpu", hook_names=[hook_name])
    n_dialogues = training_tokens // 36 + 512  # a dialogue has about 43 tokens
    LanguageModelSAETrainingRunner(
        cfg, override_dataset=_tokens(tokenizer, n_dialogues, seed, context_size), override_model=model
    ).run()
    for name in ("runner_cfg.json", "sparsity.safetensors"):
        (out / name).unlink(missing_ok=True)
    path = out / "cfg.json"
    config = json.loads(path.read_text())
    config["metadata"]["hf_hook_name"] = f"{hook_name}.output"
    path.write_text(json.dumps(config, indent=2) + "\n")
