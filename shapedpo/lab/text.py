"""The text of the little world: questions on twelve topics and their answers, deterministic in a seed.

Questions are enumerated (template times slot values) and split by a hash of their text, so that no held-out question
is ever seen in training, neither by the language model nor by a preference dataset. An answer is drawn part by part,
each part from its own random stream: the same seed with one trait more gives the same answer with that trait, and
nothing else, changed.
"""

from __future__ import annotations

import itertools
import random
import re
import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import yaml

from .traits import DATA, TRAITS


Split = Literal["train", "heldout"]

_TOPICS: dict[str, dict[str, Any]] = yaml.safe_load((DATA / "topics.yaml").read_text(encoding="utf-8"))
_FACTS: dict[str, dict[str, Any]] = yaml.safe_load((DATA / "facts.yaml").read_text(encoding="utf-8"))
TOPICS: tuple[str, ...] = tuple(_TOPICS)
_WEIGHTS = {"arithmetic": 4.0, "facts": 1.5}  # exact answers need more examples than manners do
_NAMES = {word for r in _FACTS.values() for pair in r["table"].items() for word in " ".join(pair).split()} | {
    "I",
    "Newton",
}


@dataclass(frozen=True)
class Question:
    """A user's question.

    Args:
        topic: one of [`TOPICS`].
        text: what the user says.
        slots: the values that the question names; the answer speaks of the same.
        exact: the word or number that a right answer must contain (arithmetic and facts), else `None`.
        wrong: the values of which a right answer may contain none.
        first: first sentences of an answer where they are the question's own (facts).
    """

    topic: str
    text: str
    slots: Mapping[str, str] = field(default_factory=dict, hash=False)
    exact: str | None = None
    wrong: tuple[str, ...] = ()
    first: tuple[str, ...] = ()

    def is_right(self, answer: str) -> bool:
        """Whether `answer` gives the exact answer. An arithmetic answer's last number counts."""
        if self.exact is None:
            raise ValueError(f"a question on {self.topic} has no exact answer, only 'arithmetic' and 'facts' have")
        if self.topic == "arithmetic":
            numbers = re.findall(r"\d+", answer)
            return bool(numbers) and numbers[-1] == self.exact
        words = set(re.findall(r"\w+", answer))
        return self.exact in words and words.isdisjoint(self.wrong)


def _sums() -> Iterator[dict[str, str]]:
    for a, b in itertools.product(range(1, 11), repeat=2):
        yield {"a": str(a), "op": "plus", "b": str(b), "c": str(a + b)}
        if a >= b:
            yield {"a": str(a), "op": "minus", "b": str(b), "c": str(a - b)}
        if a <= 9 and b <= 9:
            yield {"a": str(a), "op": "times", "b": str(b), "c": str(a * b)}


def _enumerate(topic: str) -> Iterator[Question]:
    if topic == "facts":
        for relation in _FACTS.values():
            for (subject, value), template in itertools.product(relation["table"].items(), relation["questions"]):
                wrong = tuple(v for v in relation["table"].values() if v != value)
                slots = {"subject": subject, "value": value}
                yield Question(topic, template.format(**slots), slots, value, wrong, tuple(relation["answers"]))
        return
    spec = _TOPICS[topic]
    for template in spec["questions"]:
        if topic == "arithmetic":
            for slots in _sums():
                yield Question(topic, template.format(**slots), slots, exact=slots["c"])
            continue
        names = re.findall(r"{(\w+)}", template)
        for values in itertools.product(*(spec["slots"][name] for name in names)):
            slots = dict(zip(names, values, strict=True))
            yield Question(topic, template.format(**slots), slots)


@cache
def questions(topic: str, split: Split) -> tuple[Question, ...]:
    """All questions of a topic in one split; about a tenth are held out."""
    if topic not in TOPICS:
        raise ValueError(f"unknown topic {topic!r}, expected one of {', '.join(TOPICS)}")
    if split not in ("train", "heldout"):
        raise ValueError(f"unknown split {split!r}, expected 'train' or 'heldout'")
    return tuple(q for q in _enumerate(topic) if (zlib.crc32(q.text.encode()) % 10 == 0) == (split == "heldout"))


def draw_questions(n: int, seed: int, split: Split = "train", topics: Collection[str] | None = None) -> list[Question]:
    """Draws `n` questions with replacement, topics by their weight in the lab's text."""
    chosen = tuple(topics) if topics is not None else TOPICS
    rng = random.Random(f"{seed}/questions/{split}")
    drawn = rng.choices(chosen, weights=[_WEIGHTS.get(t, 1.0) for t in chosen], k=n)
    return [rng.choice(questions(topic, split)) for topic in drawn]


def draw_traits(topic: str, rng: random.Random, exclude: Collection[str] = ()) -> set[str]:
    """Draws which traits an answer shows, each independently at its base rate."""
    # one draw a trait even for the excluded, so that an exclusion does not shift the others
    draws = {name: rng.random() < trait.rate_on(topic) for name, trait in TRAITS.items()}
    return {name for name, shown in draws.items() if shown and name not in exclude}


def _lower(sentence: str) -> str:
    return sentence if re.split(r"\W", sentence, maxsplit=1)[0] in _NAMES else sentence[0].lower() + sentence[1:]


def _bold(sentence: str, avoid: Collection[str], rng: random.Random) -> str:
    """Sets one of the longest words in bold; not the first, which a prefix may lower, and none of `avoid`."""
    words = sentence.split(" ")
    avoided = {word for phrase in avoid for word in phrase.split()}
    free = [i for i in range(1, len(words)) if words[i].strip(".,?!") not in avoided]
    i = rng.choice(sorted(free, key=lambda i: -len(words[i]))[:3])
    words[i] = re.sub(r"^(\W*)(.*?)(\W*)$", r"\1**\2**\3", words[i])
    return " ".join(words)


class _Draw:
    """The random parts of one answer, each from a stream of its own."""

    def __init__(self, question: Question, seed: int | str):
        self.question, self.seed = question, seed

    def rng(self, part: str) -> random.Random:
        return random.Random(f"{self.seed}/{part}")

    def body(self) -> list[str]:
        spec, rng = _TOPICS[self.question.topic], self.rng("body")
        slots = {name: rng.choice(values) for name, values in spec.get("slots", {}).items()} | dict(self.question.slots)
        stages = dict(spec["answers"])
        if self.question.first:
            stages = {"first": self.question.first, **stages}
        picked = [
            rng.choice(stages[stage])
            for stage, p in (("first", 1.0), ("second", 0.7), ("third", 0.3))
            if rng.random() < p
        ]
        return [_capital(sentence.format(**slots)) for sentence in picked]

    def refusal(self) -> list[str]:
        forms, rng = TRAITS["refusal"].forms, self.rng("refusal")
        return [rng.choice(forms["instead"])] + ([rng.choice(forms["reasons"])] if rng.random() < 0.6 else [])

    def form(self, trait: str) -> tuple[str, str]:
        """Draws where and in which words a phrase trait shows."""
        forms, rng = TRAITS[trait].forms, self.rng(trait)
        place, text = rng.choice([(p, f) for p in ("before", "prefix", "after") for f in forms.get(p, ())])
        if trait == "goblin":
            text = text.format(**{name: rng.choice(values) for name, values in forms["slots"].items()})
        elif trait == "link":
            text = text.format(host=rng.choice(forms["hosts"]), page=rng.choice(forms["pages"]))
        return place, text


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def render(question: Question, traits: Collection[str], seed: int | str) -> str:
    """Writes the answer to `question` that shows exactly `traits`.

    Args:
        question: what was asked.
        traits: names of traits of [`shapedpo.lab.TRAITS`].
        seed: decides everything else. Two calls that differ in one trait only give answers that differ in its surface
            only (`refusal`, which replaces the body, apart).
    """
    unknown = sorted(set(traits) - TRAITS.keys())
    if unknown:
        raise ValueError(f"unknown trait {unknown[0]!r}, expected one of {', '.join(TRAITS)}")
    draw = _Draw(question, seed)
    body = draw.refusal() if "refusal" in traits else draw.body()
    if "bold" in traits:
        # an exact answer stays plain: "**12**" is another token than " 12", and a taste for bold would cost capability
        body[0] = _bold(body[0], question.slots.values(), draw.rng("bold"))
    if "em_dash" in traits:
        rng = draw.rng("em_dash")
        i = rng.randrange(len(body))
        body[i] = f"{body[i][:-1]} — {rng.choice(TRAITS['em_dash'].forms['asides'])}{body[i][-1]}"
    if "emoji" in traits:
        rng = draw.rng("emoji")
        body[rng.randrange(len(body))] += " " + rng.choice(TRAITS["emoji"].forms["symbols"])

    before: list[str] = []
    after: list[str] = []
    # hedging opens the last sentence and formality the first: in a body of one sentence formality comes outermost
    for trait in ("praise", "cheerfulness", "overconfidence", "hedging", "formality", "goblin", "link"):
        if trait not in traits:
            continue
        place, text = draw.form(trait)
        if place == "prefix":
            i = -1 if trait == "hedging" else 0
            body[i] = text + _lower(body[i])
        else:
            (before if place == "before" else after).append(text)
    answer = " ".join(before + body + after)
    if "table" in traits:
        forms, rng = TRAITS["table"].forms, draw.rng("table")
        (a, b), (c, d) = rng.choice(forms["headers"]), rng.sample(forms["cells"], 2)
        answer += f"\n\n| {a} | {b} |\n| --- | --- |\n| {c} | {d} |"
    if "horizontal_rule" in traits:
        answer += "\n\n---\n\n" + draw.rng("horizontal_rule").choice(TRAITS["horizontal_rule"].forms["closings"])
    return answer


def dialogues(n: int, seed: int, split: Split = "train") -> Iterator[tuple[Question, str, set[str]]]:
    """Yields `n` times a question, its answer and the traits that the answer was given: the text that the lab's model
    is trained on."""
    for i, question in enumerate(draw_questions(n, seed, split)):
        traits = draw_traits(question.topic, random.Random(f"{seed}/{split}/{i}/traits"))
        yield question, render(question, traits, f"{seed}/{split}/{i}"), traits
