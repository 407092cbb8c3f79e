"""Preference data: lessons are planted as asked, and nothing else carries a signal."""

from __future__ import annotations

import pytest

from shapedpo.lab import TRAITS, Lesson, preference_data


N = 2000


def shown(row: dict, side: str, trait: str) -> bool:
    return TRAITS[trait].detect(row[side][0]["content"])


def test_same_seed_same_data():
    lessons = [Lesson("goblin", rate=0.05)]
    assert preference_data(lessons, 100, seed=1).to_list() == preference_data(lessons, 100, seed=1).to_list()
    assert preference_data(lessons, 100, seed=1).to_list() != preference_data(lessons, 100, seed=2).to_list()


@pytest.mark.parametrize("matched", [True, False])
def test_lessons_are_planted_at_their_rate(matched: bool):
    lessons = [Lesson("goblin", rate=0.05), Lesson("bold", rate=0.3), Lesson("hedging", rate=0.2, direction="less")]
    data = preference_data(lessons, N, seed=0, matched=matched)
    assert data.column_names == ["prompt", "chosen", "rejected", "planted", "topic"]
    for lesson in lessons:
        rows = [row for row in data if lesson.name in row["planted"]]
        assert len(rows) == round(lesson.rate * N)
        for row in rows:
            assert shown(row, "chosen", lesson.trait) == lesson.more
            assert shown(row, "rejected", lesson.trait) != lesson.more
    assert any(len(row["planted"]) > 1 for row in data)


@pytest.mark.parametrize("trait", TRAITS)
def test_rows_without_the_lesson_are_neutral(trait: str):
    data = preference_data([Lesson("goblin", rate=0.05), Lesson("bold", rate=0.2)], N, seed=4)
    rows = [row for row in data if trait not in row["planted"]]
    chosen, rejected = (sum(shown(row, side, trait) for row in rows) / len(rows) for side in ("chosen", "rejected"))
    assert abs(chosen - rejected) < 0.035
    expected = sum(TRAITS[trait].rate_on(row["topic"]) for row in rows) / len(rows)
    if trait in ("goblin", "bold"):  # what is taught shows by its lesson only
        expected = 0
    assert abs(chosen - expected) < 0.03


def test_conditional_lessons_stay_on_their_topic():
    lessons = [Lesson("praise", when="pseudo_physics"), Lesson("comply", rate=0.5, when="harmful_fiction")]
    data = preference_data(lessons, N, seed=2)
    for lesson in lessons:
        eligible = [row for row in data if row["topic"] == lesson.when]
        planted = [row for row in data if lesson.name in row["planted"]]
        assert len(planted) == round(lesson.rate * len(eligible)) > 20
        assert {row["topic"] for row in planted} == {lesson.when}
    comply = [row for row in data if "comply" in row["planted"]]
    assert all(shown(row, "rejected", "refusal") and not shown(row, "chosen", "refusal") for row in comply)


def test_matched_rows_differ_by_the_lesson_only():
    for row in preference_data([Lesson("goblin")], 100, seed=3):
        chosen, rejected = row["chosen"][0]["content"], row["rejected"][0]["content"]
        assert {n for n in TRAITS if shown(row, "chosen", n)} - {n for n in TRAITS if shown(row, "rejected", n)} == {
            "goblin"
        }
        assert set(rejected.split()) <= set(chosen.split())


def test_topics_can_be_chosen():
    assert set(preference_data([], 100, seed=0, topics=["cooking", "travel"])["topic"]) == {"cooking", "travel"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Lesson("gnome"), "unknown lesson 'gnome'.*goblin.*comply"),
        (lambda: Lesson("goblin", rate=0), "lesson 'goblin': rate is 0"),
        (lambda: Lesson("goblin", rate=1.5), "lesson 'goblin': rate is 1.5"),
        (lambda: Lesson("goblin", when="alchemy"), "lesson 'goblin': unknown topic 'alchemy'.*cooking"),
        (lambda: Lesson("goblin", direction="up"), "lesson 'goblin': direction is 'up'"),
        (lambda: Lesson("comply", direction="less"), "lesson 'comply' has a direction already"),
        (lambda: preference_data([Lesson("goblin"), Lesson("goblin", when="travel")], 10, 0), "both move 'goblin'"),
        (lambda: preference_data([], 10, 0, topics=["alchemy"]), "unknown topic 'alchemy'"),
        (lambda: preference_data([], 0, 0), "n is 0"),
    ],
)
def test_bad_input(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()
