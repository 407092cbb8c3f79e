"""Readouts of a completion's text: a regular expression, or any Python function."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import Readout, TextReader, fingerprint, register


_FLAGS = {"a": re.ASCII, "i": re.IGNORECASE, "m": re.MULTILINE, "s": re.DOTALL, "x": re.VERBOSE}


@register
@dataclass(frozen=True)
class Regex(Readout):
    """Scores 1 where a pattern is found in the completion, else 0.

    Args:
        pattern: A regular expression of Python's `re`, searched for anywhere in the text.
        flags: Any of the letters `a`, `i`, `m`, `s`, `x`, as in an inline `(?i)`.

    Raises:
        ValueError: If the pattern does not compile or a flag is unknown.
    """

    type: ClassVar[str] = "regex"

    pattern: str
    flags: str = ""

    def __post_init__(self) -> None:
        self.compiled()

    def compiled(self) -> re.Pattern[str]:
        if not isinstance(self.pattern, str):
            raise ValueError(f"A regular expression must be a string, got {self.pattern!r}.")
        if not isinstance(self.flags, str):
            raise ValueError(f"`flags` must be a text of the letters {', '.join(_FLAGS)}, got {self.flags!r}.")
        unknown = [letter for letter in self.flags if letter not in _FLAGS]
        if unknown:
            raise ValueError(f"Unknown flag {unknown[0]!r} of a regular expression. Choose from {', '.join(_FLAGS)}.")
        flags = re.RegexFlag(0)
        for letter in self.flags:
            flags |= _FLAGS[letter]
        try:
            return re.compile(self.pattern, flags)
        except re.error as error:
            raise ValueError(
                f"The regular expression {self.pattern!r} is not valid: {error.msg} at position {error.pos}."
            ) from error

    def load(self) -> TextReader:
        """Compile the pattern."""
        compiled = self.compiled()
        return _FunctionReader(
            lambda text: float(compiled.search(text) is not None),
            name=f"regex {self.pattern!r}",
            fingerprint=fingerprint(self.type, self.pattern, "".join(sorted(self.flags))),
        )


@register
@dataclass(frozen=True)
class TextFunction(Readout):
    """Scores a completion by a Python function from text to number.

    Args:
        function: The function, or its place as `"package.module:name"`, which is imported when the readout is loaded.
        name: What to call it in messages. Defaults to its place.

    Raises:
        ValueError: If `function` is neither callable nor of the form `"package.module:name"`.
    """

    type: ClassVar[str] = "function"

    function: Callable[[str], float] | str
    name: str | None = None

    def __post_init__(self) -> None:
        if callable(self.function):
            return
        if not isinstance(self.function, str) or not re.fullmatch(r"[\w.]+:[\w.]+", self.function):
            raise ValueError(
                f"A text function must be callable, or a string such as 'package.module:name'; got {self.function!r}."
            )

    @property
    def place(self) -> str:
        """Where the function is defined, as `"package.module:name"`."""
        if isinstance(self.function, str):
            return self.function
        # Instances and `functools.partial` have no name of their own.
        named = self.function if hasattr(self.function, "__qualname__") else type(self.function)
        return f"{named.__module__}:{named.__qualname__}"

    def to_dict(self) -> dict[str, Any]:
        """The readout as plain data. A lambda or local function is described, but cannot be built again from that."""
        data: dict[str, Any] = {"type": self.type, "function": self.place}
        if self.name is not None:
            data["name"] = self.name
        return data

    def load(self) -> TextReader:
        """Import the function if it is given by its place.

        Raises:
            ValueError: If it cannot be imported or is not callable.
        """
        function = _import(self.function) if isinstance(self.function, str) else self.function
        try:
            source = inspect.getsource(function)
        except (OSError, TypeError):  # built in, defined at a prompt, or an object with `__call__`
            source = ""
        return _FunctionReader(
            function, name=self.name or self.place, fingerprint=fingerprint(self.type, self.place, source)
        )


class _FunctionReader(TextReader):
    def __init__(self, function: Callable[[str], float], name: str, fingerprint: str) -> None:
        self._function = function
        self._name = name
        self._fingerprint = fingerprint

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def score(self, texts: list[str]) -> Tensor:
        return torch.tensor([self._score(text) for text in texts], dtype=torch.float32)

    def _score(self, text: str) -> float:
        try:
            value: Any = self._function(text)
        except Exception as error:
            error.add_note(f"In the text function {self._name}, for {text[:80]!r}.")
            raise
        if isinstance(value, (str, bytes)):  # `float` would read "0.5" as a number
            number = None
        else:
            try:
                number = float(value)
            except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several elements
                number = None
        if number is None:
            raise ValueError(f"The text function {self._name} must return a number, got {value!r} for {text[:80]!r}.")
        return number


def _import(place: str) -> Callable[[str], float]:
    module_name, _, name = place.partition(":")
    try:
        function: Any = importlib.import_module(module_name)
        for part in name.split("."):
            function = getattr(function, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"Cannot import the text function {place!r}: {error}.") from error
    if not callable(function):
        raise ValueError(f"The text function {place!r} is not callable, but {function!r}.")
    return function
