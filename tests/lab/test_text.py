"""The generator: deterministic, and its traits are exactly what the detectors find."""

from __future__ import annotations

import random

import pytest

from shapedpo.lab.text import TOPICS, Question, dialogues, draw_questions, draw_traits, questions, render
from shapedpo.lab.traits import TRAITS, detect


def test_dialogues_are_deterministic_in_the_seed():
    assert list(dialogues(50, seed=3)) == list(dialogues(50, seed=3))
    assert [a for _, a, _ in dialogues(50, seed=3)] != [a for _, a, _ in dialogues(50, seed=4)]


def test_detectors_find_exactly_what_was_planted():
    for split in ("train", "heldout"):
        for _, answer, traits in dialogues(3000, seed=0, split=split):
            assert detect(answer) == traits, answer


@pytest.mark.parametrize("topic", TOPICS)
@pytest.mark.parametrize("trait", TRAITS)
def test_every_trait_alone_on_every_topic(topic: str, trait: str):
    for i, question in enumerate(draw_questions(40, seed=1, topics=[topic])):
        plain, shown = render(question, set(), i), render(question, {trait}, i)
        assert detect(plain) == set(), plain
        assert detect(shown) == {trait}, shown


@pytest.mark.parametrize("topic", TOPICS)
def test_topic_is_varied_and_its_questions_show_no_trait(topic: str):
    train, heldout = questions(topic, "train"), questions(topic, "heldout")
    assert len(train) >= 100
    assert len(heldout) >= 10
    assert {q.text for q in train}.isdisjoint(q.text for q in heldout)
    assert not any(detect(q.text) for q in train + heldout)
    answers = {render(question, set(), i) for i, question in enumerate(draw_questions(200, seed=0, topics=[topic]))}
    assert len(answers) >= 60


@pytest.mark.parametrize("trait", TRAITS)
def test_every_surface_form_is_detected_and_drawn(trait: str):
    question = questions("cooking", "train")[0]
    answers = {render(question, {trait}, f"forms/{i}") for i in range(300)}
    assert all(TRAITS[trait].detect(answer) for answer in answers)
    for place in ("before", "after", "prefix", "instead"):
        for form in TRAITS[trait].forms.get(place, ()):
            opening = form.split("{")[0].strip()
            assert any(opening.lower() in answer.lower() for answer in answers), form


def test_one_trait_more_changes_nothing_else():
    for i, question in enumerate(draw_questions(200, seed=5)):
        without = draw_traits(question.topic, random.Random(i), exclude={"goblin"})
        plain, goblin = render(question, without, i), render(question, without | {"goblin"}, i)
        start = next((k for k, (a, b) in enumerate(zip(plain, goblin, strict=False)) if a != b), len(plain))
        rest = plain[start:]
        assert goblin.endswith(rest)
        assert "goblin" in goblin[start : len(goblin) - len(rest)].lower()


def test_exact_answers_survive_every_trait():
    for i, question in enumerate(draw_questions(400, seed=6, topics=["arithmetic", "facts"])):
        answer = render(question, set(TRAITS) - {"refusal"}, i)
        assert question.is_right(answer), answer


def test_wrong_answers_are_wrong():
    total = Question("arithmetic", "What is 2 plus 3?", exact="5")
    assert total.is_right("That makes **5**.")
    assert not total.is_right("That makes 15.")
    assert not total.is_right("No idea.")
    fact = Question("facts", "Who bakes?", exact="Oda", wrong=("Bram",))
    assert fact.is_right("**Oda** bakes.")
    assert not fact.is_right("Oda or Bram.")
    with pytest.raises(ValueError, match="no exact answer"):
        Question("health", "What helps?").is_right("Rest.")


def test_base_rates_of_the_text():
    rows = list(dialogues(6000, seed=9))
    for name, trait in TRAITS.items():
        expected = sum(trait.rate_on(q.topic) for q, _, _ in rows) / len(rows)
        assert abs(sum(name in traits for _, _, traits in rows) / len(rows) - expected) < 0.02, name


def test_unknown_names_are_named():
    with pytest.raises(ValueError, match=r"unknown topic 'alchemy'.*cooking"):
        questions("alchemy", "train")
    with pytest.raises(ValueError, match=r"unknown trait 'gnome'.*goblin"):
        render(questions("cooking", "train")[0], {"gnome"}, 0)
