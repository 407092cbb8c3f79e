"""Reading what was fitted from safetensors files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor


def read_tensors(path: str | Path, names: Sequence[str], what: str) -> tuple[list[Tensor], dict[str, str]]:
    """Some tensors of a safetensors file, and its metadata.

    Args:
        path: The file.
        names: Of the tensors.
        what: They are, for error texts.

    Raises:
        ValueError: If the file is missing, is not safetensors, or lacks a tensor.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"There is no file '{path}' to read {what} from.")
    try:
        with safe_open(path, framework="pt") as file:
            held = list(file.keys())
            if missing := [name for name in names if name not in held]:
                raise ValueError(f"'{path}' has no tensor {missing[0]!r}. It holds {', '.join(held) or 'none'}.")
            return [file.get_tensor(name) for name in names], dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"'{path}' is not a safetensors file: {error}") from error


def read_place(path: str | Path, metadata: Mapping[str, str]) -> str:
    """The hook point that a file's metadata names, by `hook_name` or `layer`.

    Raises:
        ValueError: If it names none.
    """
    layer = metadata.get("layer", "")
    hook_name = metadata.get("hook_name") or (residual(int(layer)) if re.fullmatch(r"\d+", layer) else None)
    if hook_name is None:
        raise ValueError(f"The metadata of '{path}' says neither hook_name nor layer. Pass `layer=` or `hook_name=`.")
    return hook_name


def residual(layer: int) -> str:
    """The hook point of the residual stream after a decoder layer, counted from 0."""
    return f"blocks.{layer}.hook_resid_post"
