"""The small model of a lesson's rows, on rows made of independent bits."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from shapedpo.audit.analysis.attribution import Columns, Model, Shown, attributed
from shapedpo.audit.analysis.lessons import _Draft


N, FEATURES = 1200, 60
TOPIC, RESPONSE = np.arange(6), np.arange(10, 14)


def shown(seed: int, taught: bool = True) -> tuple[Shown, np.ndarray, np.ndarray]:
    """Pairs of which a fifth are on a topic, two thirds of these with a response that others show on either side by chance; the topic's
    rows and the taught rows."""
    draw = np.random.default_rng(seed)
    topic = draw.random(N) < 0.2
    rows = topic & (draw.random(N) < 2 / 3) & taught
    on = draw.random((3, N, FEATURES)) < 0.2
    on[0][:, TOPIC] = draw.random((N, len(TOPIC))) < np.where(topic, 0.9, 0.1)[:, None]
    for side in (1, 2):
        on[side][:, RESPONSE] = (draw.random(N) < np.where(rows, side == 1, 0.15))[:, None]
    prompt, chosen, rejected = on
    parts = (chosen & ~rejected, rejected & ~chosen, prompt)
    return Shown(np.arange(N), *(sparse.csr_matrix(part.astype(np.float32)) for part in parts)), topic, rows


def test_all_rows_of_a_lesson_are_found_from_some() -> None:
    pairs, _, rows = shown(0)
    seeds = rows & (np.arange(N) % 3 == 0)
    model, found = attributed(pairs, seeds, np.zeros(N, bool), 20, 0.1)
    assert (found & rows).sum() >= 0.9 * rows.sum()
    assert (found & rows).sum() >= 0.9 * found.sum()
    assert model.told_by_prompt(pairs, found) > 0.9
    np.testing.assert_array_equal(model.named(*model.log_odds(pairs)), found)


@pytest.mark.parametrize(("shown_by", "most", "doubts"), [(0.6, 0.75, False), (0.5, 0.5, True)])
def test_doubtful_rows_are_not_lost_round_after_round(shown_by: float, most: float, doubts: bool) -> None:
    draw = np.random.default_rng(0)
    rows = draw.random(N) < 0.15
    on = draw.random((3, N, FEATURES)) < 0.12
    faint = np.arange(10, 18)
    on[1][:, faint] |= rows[:, None] & (draw.random((N, len(faint))) < shown_by)
    prompt, chosen, rejected = on
    pairs = Shown(
        np.arange(N),
        *(sparse.csr_matrix(part.astype(np.float32)) for part in (chosen & ~rejected, rejected & ~chosen, prompt)),
    )
    seeds = rows & (draw.random(N) < 0.6)
    model, found = attributed(pairs, seeds, np.zeros(N, bool), 20, 0.1)
    assert (found & rows).sum() >= most * rows.sum()
    assert (found & rows).sum() >= 0.85 * found.sum()
    real, mirrored = model.log_odds(pairs)
    largest = np.maximum(real, mirrored)
    doubtful = (largest < model.least) & (largest >= model.doubtful)  # most of which go the lesson's way, too
    assert doubtful.any() == doubts
    assert (doubtful & rows).sum() >= 0.5 * doubtful.sum()
    assert (doubtful & (real < mirrored)).sum() <= 0.25 * (doubtful & (real > mirrored)).sum()


def test_a_lesson_is_found_from_rows_many_of_which_go_its_way_by_chance() -> None:
    """As of a hypothesis of one feature, which others show on either side."""
    draw = np.random.default_rng(0)
    rows = draw.random(N) < 0.15
    on = draw.random((3, N, FEATURES)) < 0.1
    on[1][:, 10] |= rows
    on[2][:, 10] &= ~rows
    on[1][:, 11:21] |= rows[:, None] & (draw.random((N, 10)) < 0.4)
    chance, side = draw.random(N) < 0.15, draw.random(N) < 0.5
    on[1][:, 10] |= chance & side & ~rows
    on[2][:, 10] |= chance & ~side & ~rows
    prompt, chosen, rejected = on
    parts = (chosen & ~rejected, rejected & ~chosen, prompt)
    pairs = Shown(np.arange(N), *(sparse.csr_matrix(part.astype(np.float32)) for part in parts))
    seeds = pairs.more[:, [10]].toarray()[:, 0] > 0
    assert (seeds & rows).sum() < 0.6 * seeds.sum()
    _, found = attributed(pairs, seeds, np.zeros(N, bool), 20, 0.1, mixed=True)
    assert (found & rows).sum() >= 0.75 * rows.sum()
    assert (found & rows).sum() >= 0.85 * found.sum()


@pytest.mark.filterwarnings("error")
def test_a_lesson_that_every_row_teaches_has_every_row() -> None:
    draw = np.random.default_rng(0)
    on = draw.random((3, N, FEATURES)) < 0.2
    on[1][:, RESPONSE], on[2][:, RESPONSE] = True, False
    prompt, chosen, rejected = on
    parts = (chosen & ~rejected, rejected & ~chosen, prompt)
    pairs = Shown(np.arange(N), *(sparse.csr_matrix(part.astype(np.float32)) for part in parts))
    model, found = attributed(pairs, np.ones(N, bool), np.zeros(N, bool), 20, 0.1)
    assert found.all()
    assert set(RESPONSE) <= set(model.columns.response)
    assert model.told_by_prompt(pairs, found) == 0.5


def test_rows_that_agree_by_chance_are_no_lesson() -> None:
    pairs, topic, _ = shown(1, taught=False)
    more = pairs.more[:, RESPONSE].sum(axis=1) == len(RESPONSE)  # in the topic as many go the other way
    assert attributed(pairs, topic & np.asarray(more).ravel(), np.zeros(N, bool), 20, 0.1) is None


@pytest.mark.parametrize("mirrored", [False, True])
def test_log_odds_are_those_of_the_fold_that_did_not_see_the_row(mirrored) -> None:
    pairs, _, _ = shown(2)
    draw = np.random.default_rng(0)
    columns = Columns(np.array([3, 10, 40]), np.array([0, 7]))
    weights, bias = draw.normal(size=(4, 8)), draw.normal(size=4)
    found = Model(columns, weights, bias, 0.0, 0.0).log_odds(pairs)[int(mirrored)]
    more, less, prompt = (part.toarray() for part in (pairs.more, pairs.less, pairs.prompt))
    if mirrored:
        more, less = less, more
    for row in range(0, N, 37):
        values = [*more[row, columns.response], *less[row, columns.response], *prompt[row, columns.prompt]]
        fold = row // 2 % 4
        assert found[row] == pytest.approx(sum(w * v for w, v in zip(weights[fold], values, strict=True)) + bias[fold])


def test_a_lesson_grows_by_what_a_later_hypothesis_finds_of_it() -> None:
    """Nearly all its rows and many more are the lesson's, unless they are another's too; a set that lost many of them is not."""

    def draft(*spans: tuple[int, int]) -> _Draft:
        rows = np.zeros(200, bool)
        for start, end in spans:
            rows[start:end] = True
        return _Draft([0], rows)

    lesson, other = draft((0, 40)), draft((100, 150))
    assert lesson.grown(draft((2, 90)).rows, [lesson, other])
    assert not lesson.grown(draft((2, 50)).rows, [lesson, other])  # hardly more
    assert not lesson.grown(draft((10, 90)).rows, [lesson, other])  # a quarter is lost
    assert not lesson.grown(draft((0, 90), (100, 120)).rows, [lesson, other])  # two lessons in one
