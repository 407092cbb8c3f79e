"""A concept is data: a name, what reads it, and what is to be done about it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import suggest
from .readouts import Readout, TextFunction, readout_from_dict
from .shapers import Residual, Shaper, shaper_from_config
from .shapers.base import check_number
from .yaml_files import read_yaml


ACTIONS = ("watch", "suppress", "amplify", "hold")
"""What can be done about a concept: read and log it only, teach less or more of it than the data does, or keep it where it was."""


@dataclass(frozen=True)
class Gate:
    """Where a concept is shaped: on the rows that pass.

    Args:
        column: A column of the dataset, boolean or between 0 and 1; a row's value is how much of the shaping it gets.
        concept: The name of another concept of the list, read on the **prompt**. Rows pass where its own score (whatever it is
            `given`) is above the threshold.
        threshold: In standard deviations of the prompts' scores.

    Raises:
        ValueError: Unless exactly one of `column` and `concept` is given and the threshold is finite.

    Source: gated reward shaping, Bergen et al. (arXiv 2606.12360).
    """

    column: str | None = None
    concept: str | None = None
    threshold: float = 0.0

    def __post_init__(self) -> None:
        if (self.column is None) == (self.concept is None):
            raise ValueError(
                "A gate takes either `column` (of the dataset) or `concept` (the name of another concept, read on the "
                f"prompt); got column={self.column!r} and concept={self.concept!r}."
            )
        if not isinstance(name := self.column if self.concept is None else self.concept, str):
            raise ValueError(f"A gate's `column` or `concept` must be a name, got {name!r}.")
        check_number("A gate", "threshold", self.threshold)


@dataclass(frozen=True)
class Concept:
    """Something that completions can show, what reads it, and what is to be done about it.

    Args:
        name: Up to 100 letters, digits, spaces and `_ - .`. Metrics are logged under `concepts/<name>/`.
        readout: What reads it: [`SAEFeatures`], [`Direction`], [`Regex`], or any function from text to number.
        action: `"watch"` reads and logs only; `"suppress"` and `"amplify"` shape the training signal by a given strength; `"hold"`
            finds the strength by itself, step by step, at which the concept stays where the reference has it (see below).
        method: How, by name (`"reward"`, `"reweight"`, `"mask"`, `"filter"`, `"tokens"`, `"project"`, `"steer"`, `"ablate"`, `"inoculate"`,
            `"residual"`) or with options (`Mask(fraction=0.05)`, in YAML `{name: mask, fraction: 0.05}`).
        strength: How strongly, positive either way. Needed by `reward` and `reweight` (in nats of reward margin per standard deviation
            of the score), `residual` (per nat) and `steer` (in the units of the hidden states), taken by no other method.
        gate: Where it is shaped. Everywhere by default.
        given: Names of other concepts of the list, without which it is read: its score is taken less the best linear prediction from
            theirs, and its direction orthogonal to theirs, so that to shape a table need not shape all formatting (see `structure.py`). Their
            own scores count, whatever they are given themselves, so concepts can be given each other. Strengths and targets keep their
            meaning, in standard deviations of the concept's own score.
        spare: For `hold`: names of other concepts of the list that are to be learned as if nothing were held, where the same pairs teach both. The
            whole score is held, but only what the pairs do not share with these is acted on (see `shapers/hold.py`).
        target: For `hold`: how far the mean score is to be from the reference's (on the gate's rows), in standard deviations of the
            score; negative for less of the concept. 0, the default, is the level before training.

    `hold` is DPO under a constraint: what the pairs teach of what the readout reads is taken out of the gradient, and what other lessons
    bring along is leant against (see `shapers/hold.py`). With `probe_steps` set, what rollouts show corrects what it reads off the pairs, on the
    prompts of its gate; it takes some hundred rollouts a probe (see `docs/hold.md`).
    It cannot work

    - where the data have no signal to counter with: no pair has a delta in the concept, on either side;
    - where the readout does not see the behaviour, or sees something else as well: the score stays level and the behaviour moves;
    - where amplification is a bad gauge: far from the reference (very high learning rates, a policy that breaks down), or with fewer
      than some hundred pairs. Look at rollouts;
    - for a target other than 0 that the data cannot teach: the strength goes to its bound and stays there.

    Where the held concept decides most pairs, these pairs teach less of the rest than they do with `suppress`.

    Raises:
        ValueError: If a field does not fit; the text names the concept, what was found and what is expected.

    Example:
        ```python
        Concept("goblin", SAEFeatures("path/to/sae", features=[412, 77]), action="suppress", strength=2.0)
        ```
    """

    name: str
    readout: Readout | Callable[[str], float]
    action: str = "watch"
    method: str | Mapping[str, Any] | Shaper = "reward"
    strength: float | None = None
    gate: Gate | Mapping[str, Any] | None = None
    target: float = 0.0
    given: Sequence[str] = ()
    spare: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"\w[\w .-]{,99}", self.name):
            name: Any = self.name
            yaml_word = isinstance(name, bool)
            hint = " (YAML takes yes, no, on and off for true and false: quote them)" if yaml_word else ""
            raise ValueError(
                f"A concept's name must be up to 100 letters, digits, spaces or any of `_-.`; got {_short(self.name)}{hint}."
            )
        with _Blame(f"Concept {self.name!r}"):
            if not isinstance(self.readout, Readout):
                if not callable(self.readout):
                    raise ValueError(
                        f"`readout` must be a readout such as SAEFeatures(...) or a function of text, got {self.readout!r}."
                    )
                object.__setattr__(self, "readout", TextFunction(self.readout))
            if self.action not in ACTIONS:
                near = suggest(str(self.action), ACTIONS)
                raise ValueError(f"unknown action {self.action!r}.{near} Actions are {', '.join(ACTIONS)}.")
            object.__setattr__(self, "method", shaper_from_config(self.method))
            if isinstance(self.gate, Mapping):
                object.__setattr__(self, "gate", _from_mapping(Gate, self.gate, "gate"))
            if not isinstance(self.gate, Gate | None):
                raise ValueError(
                    f"`gate` must be Gate(...) or a mapping with `column` or `concept`, got {self.gate!r}."
                )
            self._check_target()
            self._check_shaping()
            object.__setattr__(self, "given", self._names("given"))
            object.__setattr__(self, "spare", self._names("spare"))
            self._check_others()

    def _check_target(self) -> None:
        check_number("action 'hold'", "target", self.target, unit=", in standard deviations of the score")
        if self.action != "hold" and self.target != 0:
            raise ValueError(
                f"`target` is given, but the action is {self.action!r}, which has none. Set action='hold', or leave it out."
            )

    def _check_shaping(self) -> None:
        if self.action == "watch":
            if self.strength is not None or self.gate is not None:
                field = "strength" if self.strength is not None else "gate"
                raise ValueError(
                    f"`{field}` is given, but the action is 'watch', which shapes nothing. Set action='suppress' or "
                    f"'amplify', or leave `{field}` out."
                )
            return
        if self.action == "hold" and self.strength is not None:
            raise ValueError(
                f"`strength` is given, but action 'hold' finds it by itself, got {self.strength!r}. Leave it out, or set "
                "action='suppress' or 'amplify'."
            )
        if self.action not in self.shaper.actions:
            raise ValueError(
                f"method {self.shaper.name!r} cannot {self.action}. It can {' or '.join(self.shaper.actions)}."
            )
        if self.shaper.needs_strength and self.action != "hold":
            if self.strength is None:
                raise ValueError(
                    f"method {self.shaper.name!r} needs a `strength`, a positive number; {self.shaper.strength_hint}."
                )
            check_number("method " + repr(self.shaper.name), "strength", self.strength, above=0)
        elif self.strength is not None:
            raise ValueError(f"method {self.shaper.name!r} takes no `strength`, got {self.strength!r}. Leave it out.")

    def _names(self, field: str) -> tuple[str, ...]:
        value = getattr(self, field)
        names = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [None]
        if not all(isinstance(name, str) for name in names):
            raise ValueError(f"`{field}` must be a list of the names of other concepts, got {value!r}.")
        if self.name in names or len(set(names)) < len(names):
            raise ValueError(f"`{field}` names other concepts, each once; got {', '.join(map(repr, names))}.")
        return tuple(name for name in names if name is not None)

    def _check_others(self) -> None:
        if self.given and self.shapes and isinstance(self.shaper, Residual) and self.shaper.instruction:
            raise ValueError(
                "method 'residual' with an instruction acts by no score or direction: `given` has no meaning. Leave it out."
            )
        if self.spare and self.action != "hold":
            raise ValueError(
                f"`spare` is for action 'hold', got {self.action!r}. Name the concepts in `given`, or leave `spare` out."
            )
        if twice := [name for name in self.spare if name in self.given]:
            raise ValueError(
                f"{twice[0]!r} is in both `given` and `spare`: what is read without it has nothing to spare it from. Leave it out of one."
            )

    @property
    def shaper(self) -> Shaper:
        """The method as an object."""
        assert isinstance(self.method, Shaper)  # by __post_init__
        return self.method

    @property
    def shapes(self) -> bool:
        """Whether the concept changes the training signal."""
        return self.action != "watch"

    @property
    def signed_strength(self) -> float:
        """Positive to suppress, negative to amplify; of size 1 where the method takes no strength."""
        size = 1.0 if self.strength is None else float(self.strength)
        return -size if self.action == "amplify" else size

    def to_dict(self) -> dict[str, Any]:
        """The concept as plain data, as YAML has it."""
        assert isinstance(self.readout, Readout)  # by __post_init__
        data: dict[str, Any] = {"name": self.name, "readout": self.readout.to_dict(), "action": self.action}
        if self.shapes:
            data["method"] = self.shaper.to_config()
        if self.strength is not None:
            data["strength"] = float(self.strength)
        if self.target != 0:
            data["target"] = float(self.target)
        for field in ("given", "spare"):
            if names := getattr(self, field):
                data[field] = list(names)
        if isinstance(self.gate, Gate):
            data["gate"] = (
                {"column": self.gate.column}
                if self.gate.column is not None
                else {"concept": self.gate.concept, "threshold": self.gate.threshold}
            )
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Concept:
        """Build a concept from plain data.

        Raises:
            ValueError: If a field is missing, unknown or does not fit.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"A concept must be a mapping with a `name` and a `readout`, got {data!r}.")
        fields = dict(data)
        with _Blame(f"Concept {fields.get('name')!r}"):
            if "readout" not in fields:
                raise ValueError("`readout` is missing, for example {type: regex, pattern: 'https?://'}.")
            if not isinstance(fields["readout"], Readout):
                fields["readout"] = readout_from_dict(fields["readout"])
        return _from_mapping(cls, fields, f"Concept {fields.get('name')!r}")


def _short(name: Any) -> str:
    text = repr(name)
    return text if len(text) <= 120 else f"{text[:120]}... ({len(text)} characters)"


class _Blame:
    """Context manager: puts the name of what is at fault before the text of a `ValueError`."""

    def __init__(self, owner: str) -> None:
        self.owner = owner

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, ValueError) and not str(error).startswith(self.owner):
            raise ValueError(f"{self.owner}: {error}") from error


def _from_mapping(cls: type[Any], fields: Mapping[str, Any], owner: str) -> Any:
    unknown = [name for name in fields if name not in cls.__dataclass_fields__]
    if unknown:
        known = cls.__dataclass_fields__
        raise ValueError(
            f"{owner}: unknown field {unknown[0]!r}.{suggest(str(unknown[0]), known)} Fields are {', '.join(known)}."
        )
    if "name" in cls.__dataclass_fields__ and "name" not in fields:
        raise ValueError("A concept needs a `name`.")
    return cls(**fields)


def resolve_concepts(concepts: str | Path | Iterable[Concept | Mapping[str, Any]] | None) -> list[Concept]:
    """Concepts from any of the forms a user may give: a list of concepts or mappings, or a YAML file.

    Raises:
        ValueError: If one does not fit, two have one name, a gate names a concept that is not there, or the list is empty where
            a file was to hold one.
    """
    if concepts is None:
        return []
    if isinstance(concepts, str | Path):
        return load_concepts(concepts)
    if isinstance(concepts, Concept | Mapping):
        raise ValueError("`concepts` must be a list of concepts, got a single one. Put it into a list.")
    resolved = [concept if isinstance(concept, Concept) else Concept.from_dict(concept) for concept in concepts]
    _check_together(resolved)
    return resolved


def load_concepts(path: str | Path) -> list[Concept]:
    """Read the concepts of a YAML file: a list, or a mapping (such as a recipe) with a list, or another file, under `concepts`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not YAML (the text has the line), holds no concept, or one does not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file of concepts at {str(path)!r}.")
    data, _ = read_yaml(path)
    concepts = data.get("concepts") if isinstance(data, Mapping) else data
    if (
        isinstance(data, Mapping) and isinstance(concepts, str) and Path(concepts).is_file()
    ):  # a recipe that names a file
        return load_concepts(concepts)
    if not isinstance(concepts, Sequence) or isinstance(concepts, str) or not concepts:
        raise ValueError(f"{path}: expected a list of at least one concept under `concepts:`, found {concepts!r}.")
    with _Blame(str(path)):
        return resolve_concepts(concepts)


def _check_together(concepts: Sequence[Concept]) -> None:
    names = [concept.name for concept in concepts]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"Concept {name!r} is there {names.count(name)} times. Each needs a name of its own.")
    for concept in concepts:
        if isinstance(concept.gate, Gate) and concept.gate.concept is not None and concept.gate.concept not in names:
            raise ValueError(
                f"Concept {concept.name!r}: its gate names the concept {concept.gate.concept!r}, which is not in the list. "
                f"There are {', '.join(names)}; add it with action: watch."
            )
        for field in ("given", "spare"):
            if missing := [name for name in getattr(concept, field) if name not in names]:
                raise ValueError(
                    f"Concept {concept.name!r}: `{field}` names the concept {missing[0]!r}, which is not in the list. There are "
                    f"{', '.join(names)}; add it with action: watch."
                )
