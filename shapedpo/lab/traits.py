"""The traits that an answer can show: how often the lab's text shows each, its surface forms, and an exact detector."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml


ASSETS = Path(__file__).parent / "assets"
DATA = ASSETS / "text"


@dataclass(frozen=True)
class Trait:
    """A property of an answer that text alone decides.

    Args:
        name: the trait's identifier.
        rate: share of the lab's own answers that show it, in [0, 1].
        pattern: the regular expression (case-insensitive) that finds it.
        topic_rates: topics on which the share is another one.
        forms: the surface forms that [`shapedpo.lab.text.render`] draws from (`before`, `after`, `prefix`, ...).
    """

    name: str
    rate: float
    pattern: str
    topic_rates: Mapping[str, float] = field(default_factory=dict)
    forms: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def detect(self, text: str) -> bool:
        """Whether `text` (one answer) shows the trait."""
        return re.search(self.pattern, text, flags=re.IGNORECASE) is not None

    def rate_on(self, topic: str) -> float:
        """Share of the lab's answers on `topic` that show the trait."""
        return self.topic_rates.get(topic, self.rate)


def _phrases(forms: Mapping[str, Any]) -> str:
    """Pattern that matches any of a phrase trait's sentences and prefixes, marks of other traits (`**`) between their
    words or not."""
    phrases = [p for place in ("before", "after", "prefix", "instead") for p in forms.get(place, ())]
    return "|".join(r"\b" + r"\W+".join(re.findall(r"[\w']+", phrase)) for phrase in phrases)


def _load() -> dict[str, Trait]:
    traits = {}
    for name, forms in yaml.safe_load((DATA / "traits.yaml").read_text(encoding="utf-8")).items():
        rate, topic_rates = forms.pop("rate"), forms.pop("topic_rates", {})
        pattern = forms.pop("pattern", None) or _phrases(forms)
        traits[name] = Trait(name, rate, pattern, MappingProxyType(topic_rates), MappingProxyType(forms))
    return traits


TRAITS: dict[str, Trait] = _load()


def detect(text: str) -> set[str]:
    """Names of all the traits that `text` shows."""
    return {name for name, trait in TRAITS.items() if trait.detect(text)}
