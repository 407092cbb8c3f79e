"""What a recipe needs: memory of a GPU, by parts, and hours.

    python recipes/memory.py recipes/llama31_8b_safeguards.yaml --gpus 8 --zero 3

The model's configuration is taken from the hub (or a folder); nothing else is loaded. An estimate from sizes alone, made before the run
was ever on a GPU. It leaves out what no size tells: the CUDA context, NCCL's buffers, fragmentation. Leave a tenth of the GPU for them.
"""

from __future__ import annotations

import argparse
from typing import Any

import yaml


GB = 1e9
H100_FLOPS = 989e12  # dense bf16, NVIDIA's data sheet
UTILISATION = (
    0.4  # of it: what long-tuned trainers reach at these sizes; DPO's padding and ZeRO-3's messages may take more
)


def parameters(config: Any, recipe: dict[str, Any]) -> tuple[int, int]:
    """Number of parameters of the model, and of those that are trained (the adapter's, with LoRA)."""
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    if not recipe.get("use_peft"):
        return total, total
    targets = tuple(recipe["lora_target_modules"])
    adapted = [m for name, m in model.named_modules() if name.endswith(targets) and isinstance(m, nn.Linear)]
    return total, sum(recipe["lora_r"] * (module.in_features + module.out_features) for module in adapted)


def memory(
    config: Any, recipe: dict[str, Any], *, gpus: int, zero: int, sae: tuple[int, int] | None
) -> dict[str, float]:
    """GB of one GPU, by parts.

    Args:
        config: The model's configuration.
        recipe: The recipe's keys.
        gpus: Over all nodes.
        zero: ZeRO stage; 0 for none (with LoRA, whose weights stay in bf16).
        sae: `d_in` and `d_sae` of the SAE that is monitored, which is whole on each GPU until the features are chosen.

    Sources: bytes of a parameter under each stage, Rajbhandari et al. (arXiv 1910.02054, section 3.1: weights and gradients 2, Adam with
    float32 weights 12); activations of a layer without the attention matrix, 34 bytes a token and hidden unit, and the matrix's 5 bytes a
    head and pair of tokens, Korthikanti et al. (arXiv 2205.05198, section 4.1).
    """
    total, trained = parameters(config, recipe)
    text = config.get_text_config()
    tokens = 2 * recipe["per_device_train_batch_size"] * recipe["max_length"]  # chosen and rejected

    def over(stage: int) -> int:
        """How many GPUs share what this stage shards."""
        return gpus if zero >= stage else 1

    checkpoints = 2 * text.num_hidden_layers * tokens * text.hidden_size
    layer = 34 * tokens * text.hidden_size
    if recipe["attn_implementation"] == "eager":
        layer += 5 * text.num_attention_heads * tokens * recipe["max_length"]
    keeps_reference = not (recipe.get("use_peft") or recipe.get("precompute_ref_log_probs"))
    parts = {
        "weights": 2 * total / over(3),
        "gradients": 2 * trained / over(2),
        "optimizer": 12 * trained / over(1),
        "reference": 2 * total / over(3) if keeps_reference else 0.0,
        # DeepSpeed keeps up to a billion gathered parameters (`stage3_max_live_parameters`).
        "gathered": 2 * min(total, 1e9) if zero == 3 else 0.0,
        "activations": checkpoints + layer,
        # TRL computes logits in tiles (4,096 tokens); the head's gradient is summed up in float32.
        "head": 4 * text.vocab_size * text.hidden_size if not recipe.get("use_peft") else 0.0,
        "SAE": 4 * 2 * sae[0] * sae[1] if sae else 0.0,
    }
    return {name: size / GB for name, size in parts.items()}


def hours(config: Any, recipe: dict[str, Any], *, gpus: int, pairs: int, tokens_per_pair: int) -> float:
    """Hours on H100s at 40 % utilisation: per token and parameter 2 FLOPs for the reference, 6 for the policy (4 where its weights are
    frozen, with LoRA) and 2 for recomputing under gradient checkpointing. Probes and saving come on top."""
    total, _ = parameters(config, recipe)
    flops = (8 if recipe.get("use_peft") else 10) * total * pairs * tokens_per_pair * recipe["num_train_epochs"]
    return flops / (gpus * H100_FLOPS * UTILISATION) / 3600


def main() -> None:
    from transformers import AutoConfig

    parser = argparse.ArgumentParser(description="Memory of a GPU and hours that a recipe needs, estimated from sizes.")
    parser.add_argument("recipe")
    parser.add_argument("--gpus", type=int, default=8, help="over all nodes (%(default)s)")
    parser.add_argument("--zero", type=int, default=3, choices=range(4), help="ZeRO stage (%(default)s)")
    parser.add_argument(
        "--sae", type=int, nargs=2, metavar=("D_IN", "D_SAE"), help="sizes of the SAE that is monitored"
    )
    parser.add_argument("--pairs", type=int, default=260_000, help="in the data (%(default)s)")
    parser.add_argument(
        "--tokens-per-pair", type=int, default=1500, help="prompt twice, both completions (%(default)s)"
    )
    given = parser.parse_args()
    with open(given.recipe) as file:
        recipe = yaml.safe_load(file)
    config = AutoConfig.from_pretrained(recipe["model_name_or_path"])
    parts = memory(config, recipe, gpus=given.gpus, zero=given.zero, sae=given.sae)
    for name, size in [*parts.items(), ("all", sum(parts.values()))]:
        print(f"{name:12} {size:8.1f} GB")
    time = hours(config, recipe, gpus=given.gpus, pairs=given.pairs, tokens_per_pair=given.tokens_per_pair)
    print(f"{'time':12} {time:8.1f} hours, at {UTILISATION:.0%} of an H100's peak")


if __name__ == "__main__":
    main()
