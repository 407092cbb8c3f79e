"""Reading a recipe: a YAML file that knows on which line each of its keys stands."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError, suggest


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


def read_yaml(path: str | Path) -> tuple[Any, yaml.Node | None]:
    """Read a YAML file.

    Returns:
        Its content, and its root node, which knows lines. A duplicate key at the top level, where YAML keeps the last, is an error here.

    Raises:
        UserError: If there is no such file, or it is not YAML; the text has line and column.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"There is no file {str(path)!r}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Cannot read {str(path)!r}: {error}") from None
    try:
        return yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{path}{place}: not valid YAML: {error.problem or error.context}.") from None
    except yaml.YAMLError as error:  # bytes that no YAML may hold: no mark, but a text of its own
        raise UserError(f"{path}: not valid YAML: {error}") from None


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
    lines: dict[str, int] = {}
    for node, _ in root.value:
        key, line = str(node.value), node.start_mark.line + 1
        if key in lines:
            raise UserError(f"{path}, line {line}: the key {key!r} is there already, on line {lines[key]}.")
        lines[key] = line
    values = {str(key): value for key, value in values.items()}
    env = values.pop("env", None) or {}
    if not isinstance(env, dict):
        raise UserError(f"{path}, line {lines['env']}: `env` must be a mapping of names to values.")
    recipe = Recipe(path, values, {str(name): str(value) for name, value in env.items()}, lines)
    if "concepts" in values and not values["concepts"]:
        raise UserError(f"{recipe.at('concepts')}: `concepts` is empty. Name one, or remove the key for plain DPO.")
    return recipe
