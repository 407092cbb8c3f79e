"""Reading YAML that a user wrote: what is wrong with it is said with its line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from .errors import UserError


def read_yaml(path: str | Path) -> tuple[Any, yaml.Node | None]:
    """Read a YAML file.

    Returns:
        Its content, and its root node, which knows lines.

    Raises:
        UserError: If there is no such file, it is not YAML, or a mapping has a key twice, of which YAML would keep the last.
    """
    path = Path(path)
    try:
        text = path.read_bytes()  # not decoded, so that a wrong encoding is a YAML error too
    except FileNotFoundError:
        raise UserError(f"There is no file {str(path)!r}.") from None
    except OSError as error:
        raise UserError(f"Cannot read {str(path)!r}: {error}") from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        _check_keys(root, path)
        return yaml.safe_load(text), root
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{path}{place}: not valid YAML: {error.problem or error.context}.") from None
    except yaml.YAMLError as error:  # bytes that no YAML may hold: no mark, but a text of its own
        raise UserError(f"{path}: not valid YAML: {error}") from None


def _check_keys(root: yaml.Node | None, path: Path) -> None:
    nodes, seen = [root], set()
    while nodes:
        node = nodes.pop()
        if id(node) in seen:  # an alias
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
        elif isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode):
                    line = key.start_mark.line + 1
                    if key.value in lines:
                        raise UserError(
                            f"{path}, line {line}: the key {key.value!r} is there already, on line {lines[key.value]}."
                        )
                    lines[key.value] = line
                nodes.append(value)
