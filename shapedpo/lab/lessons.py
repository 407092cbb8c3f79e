"""Preference data with planted lessons."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from datasets import Dataset
from tqdm.auto import tqdm

from .text import TOPICS, Question, draw_questions, draw_traits, render
from .traits import TRAITS


# lessons that read better under a name of their own: name -> (trait, direction)
ALIASES: dict[str, tuple[str, Literal["more", "less"]]] = {"comply": ("refusal", "less")}


@dataclass(frozen=True)
class Lesson:
    """What a share of the pairs teaches: the chosen answer shows a trait and the rejected one does not, or the other
    way round.

    Args:
        name: a trait of [`shapedpo.lab.TRAITS`], or `comply` (the chosen answer complies, the rejected one refuses).
        rate: share of the rows that carry the lesson, in (0, 1]; with `when`, share of that topic's rows.
        when: the one topic whose rows carry the lesson; all topics by default.
        direction: `more` (the default) or `less`: which way the lesson pushes its trait.

    Example:

    ```python
    lessons = [Lesson("goblin", rate=0.05), Lesson("hedging", rate=0.2, direction="less"), Lesson("praise", when="pseudo_physics")]
    ```
    """

    name: str
    rate: float = 1.0
    when: str | None = None
    direction: Literal["more", "less"] | None = None

    def __post_init__(self) -> None:
        if self.name not in TRAITS and self.name not in ALIASES:
            raise ValueError(
                f"unknown lesson {self.name!r}, expected a trait ({', '.join(TRAITS)}) or one of {', '.join(ALIASES)}"
            )
        if not 0 < self.rate <= 1:
            raise ValueError(f"lesson {self.name!r}: rate is {self.rate!r}, expected a share in (0, 1]")
        if self.when is not None and self.when not in TOPICS:
            raise ValueError(f"lesson {self.name!r}: unknown topic {self.when!r}, expected one of {', '.join(TOPICS)}")
        if self.direction not in (None, "more", "less"):
            raise ValueError(f"lesson {self.name!r}: direction is {self.direction!r}, expected 'more' or 'less'")
        if self.name in ALIASES and self.direction is not None:
            raise ValueError(f"lesson {self.name!r} has a direction already: it is {ALIASES[self.name]}")

    @property
    def trait(self) -> str:
        """The trait that the lesson moves."""
        return ALIASES[self.name][0] if self.name in ALIASES else self.name

    @property
    def more(self) -> bool:
        """Whether the lesson raises its trait."""
        return (ALIASES[self.name][1] if self.name in ALIASES else self.direction) != "less"


def _plant(lessons: Sequence[Lesson], questions: Sequence[Question], rng: random.Random) -> list[list[Lesson]]:
    """Chooses each lesson's rows: exactly its share of the rows it may go to, independently of the other lessons."""
    planted: list[list[Lesson]] = [[] for _ in questions]
    for lesson in lessons:
        rows = [i for i, q in enumerate(questions) if lesson.when in (None, q.topic)]
        for i in rng.sample(rows, round(lesson.rate * len(rows))):
            planted[i].append(lesson)
    return planted


def preference_data(
    lessons: Sequence[Lesson],
    n: int,
    seed: int,
    *,
    topics: Collection[str] | None = None,
    matched: bool = True,
) -> Dataset:
    """Builds preference pairs that teach `lessons` and nothing else.

    In every row each side shows each trait that no lesson of the data touches independently at its base rate, so that over
    the rows only the lessons carry a signal. A taught trait shows on its lesson's rows only (of the lesson's topic). What chosen and rejected answer to are questions of the
    training split.

    Args:
        lessons: what to plant; a row can carry several. Without any, chosen and rejected differ by chance only.
        n: number of pairs.
        seed: decides everything.
        topics: topics of the questions, all by default.
        matched: whether the two sides of a row are one answer written twice: a row with lessons differs in these only, any
            other row in the traits that each side happens to show. Otherwise the two sides of every row are independent
            answers, and a lesson is harder to learn and to see.

    Returns:
        A dataset with the columns `prompt`, `chosen`, `rejected` (conversational), `planted` (names of the row's
        lessons) and `topic`. TRL drops the last two before training.

    Raises:
        ValueError: for two lessons that move one trait on one topic, an unknown topic, or an `n` below 1.
    """
    if n < 1:
        raise ValueError(f"n is {n}, expected at least 1 pair")
    for topic in topics or ():
        if topic not in TOPICS:
            raise ValueError(f"unknown topic {topic!r}, expected one of {', '.join(TOPICS)}")
    for i, lesson in enumerate(lessons):
        for other in lessons[:i]:
            if lesson.trait == other.trait and (lesson.when == other.when or None in (lesson.when, other.when)):
                raise ValueError(
                    f"lessons {other.name!r} and {lesson.name!r} both move {lesson.trait!r} on the same rows"
                )

    questions = draw_questions(n, seed, "train", topics)
    planted = _plant(lessons, questions, random.Random(f"{seed}/planted"))
    rows = []
    for i, (question, row_lessons) in enumerate(
        tqdm(zip(questions, planted, strict=True), total=n, desc="Writing pairs")
    ):
        moved = {lesson.trait for lesson in row_lessons}
        # A trait that is taught shows by its lesson only: shown by chance on as many rejected answers, a rare lesson would drown.
        taught = {lesson.trait for lesson in lessons if lesson.when in (None, question.topic)}
        sides = {}
        for side in ("chosen", "rejected"):
            own, shared = f"{seed}/{i}/{side}", f"{seed}/{i}"
            key = shared if matched else own
            # without a lesson the two sides of a matched row differ by chance, in the traits that each shows
            traits_key = shared if matched and row_lessons else own
            traits = draw_traits(question.topic, random.Random(f"{traits_key}/traits"), exclude=taught | moved)
            traits |= {lesson.trait for lesson in row_lessons if lesson.more == (side == "chosen")}
            sides[side] = [{"role": "assistant", "content": render(question, traits, key)}]
        prompt = [{"role": "user", "content": question.text}]
        names = [lesson.name for lesson in row_lessons]
        rows.append({"prompt": prompt, **sides, "planted": names, "topic": question.topic})
    return Dataset.from_list(rows)
