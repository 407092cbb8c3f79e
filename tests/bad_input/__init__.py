"""Bad input: an error at construction that names the concept, what was found and what is expected; or a run that stops in time."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from shapedpo import Concept, Regex, SAEFeatures
from tests.helpers import sae_path


def refused(text: str, make: Any, kind: type[Exception] = ValueError) -> str:
    """Check that `make` raises, with all of these parts (between `...`) in the text, in this order."""
    with pytest.raises(kind) as error:
        make()
    pattern = ".*".join(re.escape(part) for part in text.split("..."))
    assert re.search(pattern, str(error.value), re.DOTALL), f"expected {text!r}, got: {error.value}"
    return str(error.value)


def features(sae: Path | None = None, indices: Any = (3,), **fields: Any) -> Concept:
    return Concept("goblin", SAEFeatures(str(sae or sae_path()), indices, **fields))


def goblin(*args: Any, **fields: Any) -> Concept:
    return Concept("goblin", Regex("goblin"), *args, **fields)
