"""Reading a recipe: a YAML file that knows on which line each of its keys stands."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError, suggest
from ..yaml_files import read_yaml


@dataclass(frozen=True)
class Recipe:
    """A YAML file's content.

    Attributes:
        path: The file.
        values: What it says, without `env`.
        env: Environment variables to set.
        lines: The line, counted from 1, of each top-level key.
    """

    path: Path
    values: dict[str, Any]
    env: dict[str, str]
    lines: dict[str, int]

    def at(self, key: str) -> str:
        """`file, line n` of a key, for error texts."""
        return f"{self.path}, line {self.lines[key]}" if key in self.lines else str(self.path)

    def check_keys(self, known: Iterable[str]) -> None:
        """Raise `UserError` for the first key that is not one of `known`, with the nearest one that is."""
        known = list(known)
        for key in self.values:
            if key not in known:
                raise UserError(f"{self.at(key)}: unknown key {key!r}.{suggest(key, known)}")


def read_recipe(path: str | Path) -> Recipe:
    """Read a recipe.

    Raises:
        UserError: If the file is not there, is not YAML, is not a mapping, has a key twice, or has `concepts` without one.
    """
    path = Path(path)
    values, root = read_yaml(path)
    if not isinstance(values, dict) or not isinstance(root, yaml.MappingNode):
        found = "nothing" if values is None else f"a {type(values).__name__}"
        raise UserError(f"{path}: a recipe must be a mapping of keys to values, found {found}.")
    lines = {str(node.value): node.start_mark.line + 1 for node, _ in root.value}
    values = {str(key): value for key, value in values.items()}
    env = values.pop("env", None) or {}
    if not isinstance(env, dict):
        raise UserError(f"{path}, line {lines['env']}: `env` must be a mapping of names to values.")
    recipe = Recipe(path, values, {str(name): str(value) for name, value in env.items()}, lines)
    if "concepts" in values and not values["concepts"]:
        raise UserError(f"{recipe.at('concepts')}: `concepts` is empty. Name one, or remove the key for plain DPO.")
    return recipe
