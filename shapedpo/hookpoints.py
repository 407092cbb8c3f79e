"""Hook points: from a name, in either convention, to a module of the model.

A name is TransformerLens's (`blocks.3.hook_resid_post`) or a module's in Hugging Face's model, with an optional side
(`model.layers.3`, `model.layers.3.mlp.output`, `model.layers.3.self_attn.o_proj.input`).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from torch import nn


Side = Literal["input", "output"]

LENS_HOOKS = (
    "hook_resid_pre",
    "hook_resid_mid",
    "hook_resid_post",
    "hook_attn_out",
    "hook_mlp_out",
    "attn.hook_z",
    "mlp.hook_in",
)
"""TransformerLens's names that are understood, each after `blocks.{layer}.`"""

# Where the decoder layers are. The first hit counts, so multimodal wrappers come before what they wrap.
_LAYERS = (
    "model.language_model.layers",  # Gemma 3 with images
    "language_model.model.layers",
    "language_model.layers",
    "model.layers",  # Llama, Mistral, Gemma, Qwen, OLMo
    "transformer.h",  # GPT-2
    "gpt_neox.layers",  # GPT-NeoX, Pythia
    "layers",  # the same without their head
    "h",
)
# Wrappers that may stand before a module's name in one setting and not in another.
_WRAPPERS = {"base_model", "module", "model", "language_model", "text_model", "transformer", "gpt_neox"}
_ATTENTION = ("self_attn", "attn", "attention")
_PROJECTION = ("o_proj", "c_proj", "dense", "out_proj")


class Site(NamedTuple):
    """A place to read activations at.

    Attributes:
        module: The module to hook.
        side: Whether its input or its output is meant.
        width: Size of the last dimension there.
    """

    module: nn.Module
    side: Side
    width: int


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a causal language model. A PEFT model is unwrapped, anything else (DDP, an engine) is not.

    Raises:
        ValueError: If they are not where any supported architecture keeps them.
    """
    return _find_layers(_unwrap(model))[1]


def resolve_site(model: nn.Module, hook_name: str) -> Site:
    """Find the module that a hook name means.

    `hook_attn_out` and `hook_mlp_out` are what the block adds to the residual stream: in Gemma 2 and 3 and OLMo 2 and
    3, what the norm after them gives (as in TransformerLens). `attn.hook_z` is the input of the attention's output
    projection, heads side by side; `mlp.hook_in` is what the MLP takes in, which transcoders read.

    Args:
        model: A causal language model of the layout of Llama, Mistral, Gemma 1 to 3, Qwen 2 and 3, OLMo 1 to 3, GPT-2
            or GPT-NeoX, or a PEFT model over one.
        hook_name: TransformerLens's name, or a module's name with an optional `.input` or `.output` (the default). A
            module's name may carry another wrapper's prefix than this model's.

    Raises:
        ValueError: If the model has no such layer or module.
    """
    base = _unwrap(model)
    if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", hook_name):
        return _lens_site(base, hook_name, int(match[1]), match[2])
    for name, side in _sides(hook_name):
        module = _find_module(base, name)
        if module is not None:
            return Site(module, side, _width(base, module, side))
    raise ValueError(_not_found(base, hook_name))


def _unwrap(model: nn.Module) -> nn.Module:
    unwrap: Any = getattr(model, "get_base_model", None)  # PEFT
    return model if unwrap is None else unwrap()


def _find_layers(base: nn.Module) -> tuple[str, nn.ModuleList]:
    for path in _LAYERS:
        layers = _submodule(base, path)
        if isinstance(layers, nn.ModuleList) and len(layers) > 0:
            return path, layers
    raise ValueError(
        f"Cannot find the decoder layers of {type(base).__name__}. They are looked for at {', '.join(_LAYERS)}."
    )


def _submodule(root: nn.Module, name: str) -> nn.Module | None:
    try:
        return root.get_submodule(name)
    except AttributeError:
        return None


def _lens_site(base: nn.Module, hook_name: str, layer: int, hook: str) -> Site:
    path, layers = _find_layers(base)
    if layer >= len(layers):
        raise ValueError(_no_layer(hook_name, layer, len(layers)))
    block, hidden = layers[layer], _hidden_size(base)
    # A norm after the feed-forward part means that the block norms what it adds (Gemma 2 and 3, OLMo 2 and 3). In other
    # architectures `post_attention_layernorm` stands after the addition, before the feed-forward part.
    norms_out = hasattr(block, "post_feedforward_layernorm")
    if hook == "hook_resid_pre":
        return Site(block, "input", hidden)
    if hook == "hook_resid_post":
        return Site(block, "output", hidden)
    if hook == "hook_attn_out":
        names = ("post_attention_layernorm",) if norms_out else _ATTENTION
        return Site(_child(block, names, hook_name), "output", hidden)
    if hook == "hook_mlp_out":
        names = ("post_feedforward_layernorm",) if norms_out else ("mlp",)
        return Site(_child(block, names, hook_name), "output", hidden)
    if hook == "mlp.hook_in":
        return Site(_child(block, ("mlp",), hook_name), "input", hidden)
    if hook == "attn.hook_z":
        projection = _child(_child(block, _ATTENTION, hook_name), _PROJECTION, hook_name)
        return Site(projection, "input", _width(base, projection, "input"))
    if hook == "hook_resid_mid" and not getattr(block, "use_parallel_residual", False):
        # The first thing that sees the stream after attention: a norm, or the MLP itself in OLMo 2 and 3.
        names = ("pre_feedforward_layernorm", "mlp" if norms_out else "post_attention_layernorm", "ln_2")
        return Site(_child(block, names, hook_name), "input", hidden)
    known = ", ".join(f"blocks.{layer}.{name}" for name in LENS_HOOKS)
    near = f"the module's own name, such as '{path}.{layer}.mlp.input'"
    raise ValueError(f"{hook_name!r} is not a hook point of {type(base).__name__}. Use one of {known}, or {near}.")


def _child(parent: nn.Module, names: Sequence[str], hook_name: str) -> nn.Module:
    for name in names:
        child = getattr(parent, name, None)
        if isinstance(child, nn.Module):
            return child
    raise ValueError(
        f"{hook_name!r} has no place in {type(parent).__name__}, which has none of {', '.join(names)}. Give the "
        "module's own name instead."
    )


def _sides(hook_name: str) -> Iterator[tuple[str, Side]]:
    yield hook_name, "output"
    name, _, side = hook_name.rpartition(".")
    if side == "input":
        yield name, "input"
    elif side == "output":
        yield name, "output"


def _find_module(base: nn.Module, name: str) -> nn.Module | None:
    """A module by its name, or by that name without its wrappers' names among those that hold the decoder layers."""
    if not name:
        return None
    if (module := _submodule(base, name)) is not None:
        return module
    backbone = base.get_submodule(_find_layers(base)[0].rpartition(".")[0])
    parts = name.split(".")
    while True:
        for root in (base, backbone):
            if (module := _submodule(root, ".".join(parts))) is not None:
                return module
        if len(parts) == 1 or parts[0] not in _WRAPPERS:
            return None
        parts = parts[1:]


def _hidden_size(base: nn.Module) -> int:
    config: Any = base.config
    return int(getattr(config, "text_config", config).hidden_size)


def _width(base: nn.Module, module: nn.Module, side: Side) -> int:
    # From attributes, not from the weight, which is empty under ZeRO-3 and packed if quantised.
    attributes = ("in_features", "nx") if side == "input" else ("out_features", "nf")  # nn.Linear, GPT-2's Conv1D
    for attribute in attributes:
        if isinstance(width := getattr(module, attribute, None), int):
            return width
    return _hidden_size(base)


def _no_layer(hook_name: str, layer: int, layers: int) -> str:
    return f"{hook_name!r} names layer {layer}, but the model has {layers} layers (0 to {layers - 1})."


def _not_found(base: nn.Module, hook_name: str) -> str:
    path, layers = _find_layers(base)
    parent = path.rpartition(".")[2]
    if (match := re.search(rf"(?:^|\.){parent}\.(\d+)(?:\.|$)", hook_name)) and int(match[1]) >= len(layers):
        return _no_layer(hook_name, int(match[1]), len(layers))
    names = [name for name, _ in base.named_modules() if name]
    near = difflib.get_close_matches(re.sub(r"\.(in|out)put$", "", hook_name), names, n=3)
    return (
        f"{type(base).__name__} has no hook point {hook_name!r}. "
        + (f"Near matches: {', '.join(near)}. " if near else "")
        + f"Use a module's name, such as '{path}.0', or blocks.LAYER. and one of {', '.join(LENS_HOOKS)}."
    )
