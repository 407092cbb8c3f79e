"""`shapedpo concepts show`: check a file of concepts and print them as a table."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from ..concept import Concept, Gate
from ..errors import UserError, as_user_error
from ..readouts import Readout
from ..sources import concepts_from


def show(file: str, *, load: bool = False) -> int:
    """Print the concepts of a file, or of a recipe.

    Args:
        file: Path of the YAML.
        load: Whether to load each readout's weights, which finds what only they can tell (a feature outside the SAE).

    Returns:
        The exit status.

    Raises:
        UserError: If the file, a concept or a readout is at fault.
    """
    concepts = concepts_from(file)
    table = Table("name", "reads", "action", "method", "strength", "gate", "given", title=file)
    for concept in concepts:
        if load:
            with as_user_error(ValueError, OSError, ImportError, prefix=f"Concept {concept.name!r}: "):
                _readout(concept).load()
        table.add_row(concept.name, _reads(concept), concept.action, *_shaping(concept), ", ".join(concept.given))
    Console().print(table)
    return 0


def _readout(concept: Concept) -> Readout:
    if not isinstance(concept.readout, Readout):
        raise UserError(f"Concept {concept.name!r} has no readout that a file can hold: {concept.readout!r}.")
    return concept.readout


def _reads(concept: Concept) -> str:
    """The readout in one line: its type, then its fields."""
    data = _readout(concept).to_dict()
    return f"{data.pop('type')}: " + ", ".join(f"{key}={value}" for key, value in data.items())


def _shaping(concept: Concept) -> tuple[str, str, str]:
    if not concept.shapes:
        return "", "", ""
    gate = ""
    if isinstance(concept.gate, Gate):
        gate = concept.gate.column or f"{concept.gate.concept} > {concept.gate.threshold:g} sd"
    config = "" if concept.action == "hold" else concept.shaper.to_config()  # its controller has none
    return str(config), "" if concept.strength is None else f"{concept.strength:g}", gate
