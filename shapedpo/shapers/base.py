"""What a shaper is: data that says how a concept's scores change the training signal.

A shaper never sees a model or a text: it is handed a [`ConceptSignal`], the scores of one concept on one batch, and answers
with one of these, which [`~shapedpo.shaping.Shaping`] carries to the opening of TRL's loss that takes it:

| a shaper gives | where it enters | method |
| --- | --- | --- |
| `reward`, an offset of each completion's reward | the reference log-probabilities | `reward`, `residual` |
| `pair_weight`, a factor of each pair's loss | TRL's own pair weights (those of WPO) | `reweight`, `mask` |

`project` gives neither: its concepts are projected out of the gradient together (see `projection.py`). `tokens` says which of a
completion's tokens stay in the loss ([`~shapedpo.tokens.TokenFilter`]), `steer` and `ablate` how the policy's hidden states change
([`~shapedpo.steering.Steering`]), `inoculate` what prompt it reads, `filter` which rows leave the
data before training.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..errors import suggest


class ConceptSignal(NamedTuple):
    """Standardised scores of one concept on a batch of B pairs, all float32 and without gradient.

    Attributes:
        scores: `(2B,)`, chosen completions first. Both are 0 where a pair has a completion without tokens.
        delta: `(B,)`, chosen minus rejected.
        gate: `(B,)`, 1 where the concept is shaped and 0 elsewhere.
        residual: `(2B,)`, for method `residual`: how much likelier, in nats, a reference that shows the concept finds each completion.
            0 as the scores are.
    """

    scores: Tensor
    delta: Tensor
    gate: Tensor
    residual: Tensor | None = None


@dataclass(frozen=True)
class Shaper(ABC):
    """One way to shape the signal. A subclass is a method: a frozen dataclass of its options, registered under `name`."""

    name: ClassVar[str]
    """What `Concept(method=...)` and YAML call it."""
    needs_strength: ClassVar[bool] = False
    """Whether the concept must give a strength (else it must not)."""
    strength_hint: ClassVar[str] = "0.5 to 5 is the usual range"
    """How large it is to be, for an error text."""
    actions: ClassVar[tuple[str, ...]] = ("suppress", "amplify")
    """The actions that the method can carry out."""
    per_pair: ClassVar[bool] = False
    """Whether it needs a loss that is a mean over pairs, each with a loss of its own."""
    reads_first: ClassVar[bool] = False
    """Whether the reference must be read before the policy's forward pass. (TRL runs the policy first.)"""
    fits_sft: ClassVar[bool] = False
    """Whether it has a meaning for the loss type `sft` alone, which compares no pairs and reads no reference."""

    def reward(self, signal: ConceptSignal, strength: float) -> Tensor | None:
        """What to add to each completion's reward: `(2B,)` in units of the margin, or `None`.

        Args:
            signal: The batch's scores.
            strength: Positive to suppress the concept, negative to amplify it.
        """
        return None

    def pair_weight(self, signal: ConceptSignal, strength: float, calibration: ConceptSignal) -> Tensor | None:
        """Factor of each pair's loss: `(B,)`, not negative, or `None`.

        Args:
            signal: The batch's scores.
            strength: Positive to suppress the concept, negative to amplify it. Of size 1 if the method takes no strength.
            calibration: The scores of the calibration sample, for what depends on the data as a whole. Not on the batch: a
                pair's weight must not change with its company.
        """
        return None

    def to_config(self) -> str | dict[str, Any]:
        """The method as YAML has it: its name, or a mapping with `name` where an option is not at its default."""
        options = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }
        return {"name": self.name, **options} if options else self.name


ShaperT = TypeVar("ShaperT", bound=Shaper)
SHAPERS: dict[str, type[Shaper]] = {}
"""All methods by name."""


def register(cls: type[ShaperT]) -> type[ShaperT]:
    """Class decorator: make a method known under its `name`."""
    SHAPERS[cls.name] = cls
    return cls


def shaper_from_config(config: str | Mapping[str, Any] | Shaper) -> Shaper:
    """Build a method from its name or a mapping of `name` and options.

    Raises:
        ValueError: If there is no such method or option, or an option's value does not fit.
    """
    if isinstance(config, Shaper):
        return config
    options = dict(config) if isinstance(config, Mapping) else {}
    name = options.pop("name", None) if isinstance(config, Mapping) else config
    if isinstance(name, type) and issubclass(name, Shaper):
        raise ValueError(f"Method {name.name!r} is given as a class. Give {name.__name__}(...), with its options.")
    if not isinstance(name, str) or name not in SHAPERS:
        hint = suggest(str(name), SHAPERS)
        raise ValueError(f"Unknown method {name!r}. Methods are {', '.join(sorted(SHAPERS))}.{hint}")
    cls = SHAPERS[name]
    known = [field.name for field in dataclasses.fields(cls)]
    unknown = [option for option in options if option not in known]
    if unknown:
        raise ValueError(
            f"Method {name!r} has no option {unknown[0]!r}.{suggest(str(unknown[0]), known)} "
            + (f"Its options are {', '.join(known)}." if known else "It has none.")
        )
    return cls(**options)


def top_threshold(sample: Tensor, fraction: float) -> Tensor:
    """The threshold that the top fraction of a sample reaches, half-way to the next lower value.

    Not a value of the sample: read again in other company, a score differs in its last bits.

    Args:
        sample: `(N,)`, nan where it does not count.
        fraction: Between 0 and 1.
    """
    least = torch.nanquantile(sample, 1 - fraction, interpolation="higher")
    below = torch.where(sample < least, sample, -torch.inf).amax()
    return torch.where(below.isfinite(), (least + below) / 2, least)


def check_number(
    owner: str, field: str, value: Any, above: float = -math.inf, below: float = math.inf, unit: str = ""
) -> None:
    """Raise `ValueError` unless `value` is a finite number strictly between `above` and `below`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not above < value < below:
        bounds = "finite"
        if above > -math.inf:
            bounds = f"above {above:g}" + (f" and below {below:g}" if below < math.inf else " and finite")
        raise ValueError(f"{owner}: `{field}` must be a number {bounds}{unit}, got {value!r}.")
