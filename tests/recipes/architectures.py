"""What the recipes' models and SAEs are, as published: nothing can be downloaded where the tests run.

The configurations are the models' `config.json` on the hub, without what changes neither shapes nor names. That they are right shows
in the number of parameters that they give, which is the one that the hub shows for each model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Model:
    """A model of a recipe.

    Attributes:
        config: Arguments of `AutoConfig.for_model`.
        parameters: Their published number.
        base: What the SAEs that fit were trained on, as sae-lens's directory names it.
    """

    config: dict[str, Any]
    parameters: int
    base: tuple[str, ...] = ()


@dataclass(frozen=True)
class Published:
    """An SAE of a release.

    Attributes:
        d_in: Width of what it reads.
        d_sae: Number of features.
        hook_name: Where it reads; `{layer}` stands for the layer.
        architecture: sae-lens's name of its kind.
    """

    d_in: int
    d_sae: int
    hook_name: str
    architecture: str
    config: dict[str, Any] = field(default_factory=dict)


_LLAMA = {"model_type": "llama", "vocab_size": 128264, "num_key_value_heads": 8, "tie_word_embeddings": False}

MODELS = {
    # hub: config.json of each; Tulu 3 adds eight tokens to Llama 3.1's 128,256
    "allenai/Llama-3.1-Tulu-3-8B-SFT": Model(
        {**_LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
        8_030_326_784,
        ("meta-llama/Llama-3.1-8B",),
    ),
    "allenai/Llama-3.1-Tulu-3-70B-SFT": Model(
        {**_LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
        70_553_837_568,
    ),
    "google/gemma-2-2b-it": Model(
        {
            "model_type": "gemma2",
            "vocab_size": 256000,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
        },
        2_614_341_888,
        ("gemma-2-2b",),
    ),
    "Qwen/Qwen3-4B": Model(
        {
            "model_type": "qwen3",
            "vocab_size": 151936,
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "tie_word_embeddings": True,
        },
        4_022_468_096,
        ("qwen3-4b",),
    ),
    "allenai/Olmo-3-7B-Instruct-SFT": Model(
        {
            "model_type": "olmo3",
            "vocab_size": 100278,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "sliding_window": 4096,
            "tie_word_embeddings": False,
        },
        7_298_011_136,
    ),
}

SAES = {
    # model card of fnlp/Llama-Scope: 32K features, 8 x 4096; sae-lens loads it as JumpReLU with one threshold
    "llama_scope_lxr_8x": Published(4096, 32768, "blocks.{layer}.hook_resid_post", "jumprelu"),
    # model card of google/gemma-scope: 2^14 features; sae-lens's `get_gemma_2_config_from_hf` says the same without a network
    "gemma-scope-2b-pt-res-canonical": Published(2304, 16384, "blocks.{layer}.hook_resid_post", "jumprelu"),
    # Neuronpedia, qwen3-4b/17-transcoder-hp: 163,840 features, hook blocks.17.mlp.hook_in, MLP's input to its output
    "mwhanna-qwen3-4b-transcoders": Published(
        2560,
        163840,
        "blocks.{layer}.mlp.hook_in",
        "transcoder",
        {"d_out": 2560, "hook_name_out": "blocks.{layer}.hook_mlp_out"},
    ),
}
