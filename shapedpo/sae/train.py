"""Training an SAE on a model's activations, with sae-lens."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..hookpoints import decoder_layers


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def fixed_length(ids: Sequence[int], length: int, pad_token_id: int) -> list[int]:
    """Cut or pad on the right. Under a causal mask padding changes nothing before it, and it is left out of training."""
    return [*ids[:length], *[pad_token_id] * (length - len(ids))]


def token_rows(ids: Iterable[Sequence[int]], context_size: int, pad_token_id: int) -> Dataset:
    """Sequences as [`train_sae`] takes them: one a row, cut or padded to `context_size` tokens."""
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": [fixed_length(row, context_size, pad_token_id) for row in ids]})


def train_sae(
    model: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    data: Dataset,
    out: str | Path,
    *,
    layer: int,
    d_sae: int,
    k: int,
    training_tokens: int,
    batch_tokens: int = 4096,
    learning_rate: float | None = None,
    seed: int = 0,
    device: str = "cpu",
    model_name: str | None = None,
    **model_kwargs: Any,
) -> None:
    """Train a BatchTopK SAE on the output of a decoder layer and save it as sae-lens does, as a JumpReLU SAE.

    The token that every sequence starts with (a beginning-of-sequence token, usually) and the padding are left out: their activations
    are outliers by orders of magnitude, and no completion has them.

    Args:
        model: Folder or hub name of the model. Layers after `layer` are not run.
        tokenizer: Its tokenizer.
        data: Rows of `input_ids`, all of one length ([`token_rows`]). It is gone through again as often as needed.
        out: Folder for `cfg.json` and `sae_weights.safetensors`.
        layer: Decoder layer, counted from 0, whose output is read.
        d_sae: Number of features.
        k: Active features a token, on average.
        training_tokens: Tokens to train on.
        batch_tokens: Tokens of a step.
        learning_rate: The peak; by default `2e-4 / sqrt(d_sae / 2**14)`.
        seed: Of initialisation and order.
        device: Where model and SAE are.
        model_name: What the SAE's metadata calls the model, if not `model`.
        **model_kwargs: For the model's `from_pretrained`, such as `dtype`.

    Raises:
        ValueError: If the model has no such layer, `k` is more than there are features, or there are fewer tokens than make a few steps.

    Source: BatchTopK, Bussmann et al. (arXiv 2412.06410), as in Bergen et al. (arXiv 2606.12360); learning rate, Gao et al. (arXiv
    2406.04093, Appendix A.3).
    """
    from sae_lens import (
        BatchTopKTrainingSAEConfig,
        LanguageModelSAERunnerConfig,
        LanguageModelSAETrainingRunner,
        LoggingConfig,
    )
    from sae_lens.llm_sae_training_runner import InterruptedException
    from sae_lens.load_model import HookedProxyLM
    from transformers import AutoModel

    if not 1 <= k <= d_sae:
        raise ValueError(f"`k` is {k}: of {d_sae} features, 1 to {d_sae} can be active.")
    steps = training_tokens // batch_tokens
    if steps < 8:
        raise ValueError(f"{training_tokens} tokens are {steps} batches of {batch_tokens}: too few. Train on more.")
    backbone = AutoModel.from_pretrained(model, **model_kwargs).to(device)
    layers = decoder_layers(backbone)
    if not 0 <= layer < len(layers):
        raise ValueError(f"`layer` is {layer}, but the model has {len(layers)} layers (0 to {len(layers) - 1}).")
    del layers[layer + 1 :]
    hook_name = next(name for name, module in backbone.named_modules() if module is layers[layer])
    first = {row[0] for row in data[:64]["input_ids"]}
    exclude = {tokenizer.pad_token_id, *(first if len(first) == 1 else ())} - {None}
    context_size = len(data[0]["input_ids"])
    config = LanguageModelSAERunnerConfig(
        sae=BatchTopKTrainingSAEConfig(
            d_in=backbone.config.get_text_config().hidden_size,
            d_sae=d_sae,
            k=k,
            normalize_activations="expected_average_only_in",
        ),
        model_name=model_name or str(model),
        model_class_name="AutoModelForCausalLM",
        hook_name=hook_name,
        dataset_path="",
        is_dataset_tokenized=True,
        context_size=context_size,
        training_tokens=training_tokens,
        train_batch_size_tokens=batch_tokens,
        store_batch_size_prompts=min(64, max(1, 2**15 // context_size)),
        n_batches_in_buffer=4 * batch_tokens // context_size + 1,  # contexts of tokens, mixed before they are used
        n_batches_for_norm_estimate=20,
        lr=learning_rate if learning_rate is not None else 2e-4 / (d_sae / 2**14) ** 0.5,
        lr_warm_up_steps=steps // 20,
        lr_decay_steps=steps // 4,
        dead_feature_window=200,
        feature_sampling_window=1_000_000,  # its log would be the only use
        exclude_special_tokens=sorted(exclude),
        seed=seed,
        device=device,
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=str(out),
    )
    torch.manual_seed(seed)
    proxy = HookedProxyLM(backbone, tokenizer, hook_names=[hook_name])
    runner = LanguageModelSAETrainingRunner(config, override_dataset=data, override_model=proxy)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        runner.run()
    except InterruptedException as error:  # what sae-lens makes of Ctrl-C, then and afterwards
        raise KeyboardInterrupt from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    _finish(Path(out), f"{backbone.base_model_prefix}.{hook_name}")


def _finish(out: Path, module: str) -> None:
    """Leave what makes an SAE, and have its metadata name the layer as the whole model does."""
    for name in ("runner_cfg.json", "sparsity.safetensors"):
        (out / name).unlink(missing_ok=True)
    path = out / "cfg.json"
    config = json.loads(path.read_text())
    config["metadata"].update(hook_name=module, hf_hook_name=f"{module}.output")
    path.write_text(json.dumps(config, indent=2) + "\n")
