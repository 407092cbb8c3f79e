"""Does an SAE belong to the model? A guess from names, for a warning."""

from __future__ import annotations

import re
from typing import Any


# Families by how their models are called. `gemma-2b` is Gemma 1, `gemma-2-2b` is Gemma 2.
_NAMES = {
    "gemma 3": r"gemma-?3(?!\d)",
    "gemma 2": r"gemma-?2(?=-|$)|gemma2",
    "gemma 1": r"gemma-(2|7)b|gemma-1\.1",
    "llama": r"llama|tulu",
    "qwen 3": r"qwen-?3",
    "qwen 2": r"qwen-?2|qwen-?1\.5",
    "olmo 3": r"olmo-?3",
    "olmo 2": r"olmo-?2",
    "olmo 1": r"olmo-(1|7)b",
    "mistral": r"mistral(?!-nemo)",
    "gpt2": r"gpt-?2",
    "gpt-neox": r"pythia|gpt-neox",
}

# Families by `model_type` of a Hugging Face configuration.
_MODEL_TYPES = {
    "gemma3": "gemma 3",
    "gemma3_text": "gemma 3",
    "gemma2": "gemma 2",
    "gemma": "gemma 1",
    "llama": "llama",
    "qwen3": "qwen 3",
    "qwen2": "qwen 2",
    "olmo3": "olmo 3",
    "olmo2": "olmo 2",
    "olmo": "olmo 1",
    "mistral": "mistral",
    "gpt2": "gpt2",
    "gpt_neox": "gpt-neox",
}


def family_mismatch(model_name: str | None, config: Any) -> str | None:
    """Say so if the metadata of an SAE, a probe or a direction names another model family than the model's.

    Args:
        model_name: The model that it was made for, by its metadata.
        config: The model's Hugging Face configuration.

    Returns:
        A text for a warning, or `None` if the families agree or either is unknown.
    """
    expected = _MODEL_TYPES.get(getattr(config, "model_type", None) or "")
    if not model_name or expected is None:
        return None
    # A name may be a path; what lies above the last two parts is someone's folder.
    name = "/".join(re.split(r"[/\\]", model_name.strip("/\\").lower().replace("_", "-"))[-2:])
    found = [family for family, pattern in _NAMES.items() if re.search(pattern, name)]
    if len(found) != 1 or found[0] == expected:
        return None
    return (
        f"its metadata names the model {model_name!r} (family {found[0]}), but the model is of type "
        f"{config.model_type!r} (family {expected}). What it reads may mean nothing here."
    )
