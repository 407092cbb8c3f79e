"""Probes against scikit-learn's regressions and against loops, and what they find."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression

from shapedpo.probes import steering_vector
from shapedpo.probes.contrast import Contrast
from shapedpo.probes.fitting import difference_of_means, fit_attention, fit_linear
from shapedpo.probes.quality import auroc_interval, confusions, judge_scores, steering_effect
from shapedpo.probes.steering_vector import fit_steering_vector
from shapedpo.probes.study import Options, best, fit_readouts
from shapedpo.readouts import Direction
from shapedpo.readouts.probe import AttentionProbeReader
from shapedpo.sae.check import auroc
from tests.helpers import HIDDEN, load_model, tokenizer, vector


def dice(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LABELS = np.arange(40) % 4 == 0
MEANS = 2 * dice(40, 6) + 3 + torch.from_numpy(LABELS)[:, None] * dice(6, seed=1)
PAIRS = np.array([(a, b) for a in np.flatnonzero(LABELS) for b in np.flatnonzero(~LABELS) if a // 8 == b // 8])


def inputs():
    x = MEANS.double().numpy()
    return (x - x.mean(axis=0)) / (x.std(axis=0, ddof=1) * np.sqrt(6))


@pytest.mark.parametrize("l2", [1e-2, 1.0])
def test_bce_is_balanced_logistic_regression(l2):
    x = inputs()
    theirs = LogisticRegression(C=1 / (l2 * len(x)), class_weight="balanced", tol=1e-10, max_iter=10_000).fit(x, LABELS)
    found = fit_linear(MEANS, LABELS, PAIRS, "bce", l2)
    scores = MEANS.double() @ found["weight"].double() + found["bias"].double()
    torch.testing.assert_close(scores, torch.from_numpy(theirs.decision_function(x)), atol=2e-4, rtol=1e-3)


WEIGHTS = np.where(LABELS, 1.0, 0.2 + np.arange(40) % 3)


def test_weights_are_sample_weights():
    x = inputs()
    each = np.where(LABELS, WEIGHTS / WEIGHTS[LABELS].sum(), WEIGHTS / WEIGHTS[~LABELS].sum()) / 2
    theirs = LogisticRegression(C=1 / 1e-2, tol=1e-10, max_iter=10_000).fit(x, LABELS, sample_weight=each)
    found = fit_linear(MEANS, LABELS, PAIRS, "bce", 1e-2, WEIGHTS)
    scores = MEANS.double() @ found["weight"].double() + found["bias"].double()
    torch.testing.assert_close(scores, torch.from_numpy(theirs.decision_function(x)), atol=2e-4, rtol=1e-3)

    apart, each = x[PAIRS[:, 0]] - x[PAIRS[:, 1]], WEIGHTS[PAIRS[:, 1]] / WEIGHTS[PAIRS[:, 1]].sum() / 2
    both, kinds = np.concatenate([apart, -apart]), np.arange(2 * len(apart)) < len(apart)
    theirs = LogisticRegression(C=1 / 1e-2, fit_intercept=False, tol=1e-10, max_iter=10_000)
    theirs.fit(both, kinds, sample_weight=np.concatenate([each, each]))
    found = fit_linear(MEANS, LABELS, PAIRS, "pairs", 1e-2, WEIGHTS)
    scores = (MEANS.double() @ found["weight"].double()).numpy()
    np.testing.assert_allclose(scores[PAIRS[:, 0]] - scores[PAIRS[:, 1]], apart @ theirs.coef_[0], atol=2e-4, rtol=1e-3)

    means, w = MEANS.double().numpy(), WEIGHTS[:, None]
    expected = means[LABELS].mean(axis=0) - (w * means)[~LABELS].sum(axis=0) / w[~LABELS].sum()
    found = difference_of_means(MEANS, LABELS, WEIGHTS).numpy()
    np.testing.assert_allclose(found, expected / np.linalg.norm(expected), atol=1e-7)


def test_confusions_against_loops():
    scores, labels = np.random.default_rng(0).normal(size=60), np.arange(60) % 4 == 0
    kinds = {"praise": (np.arange(60) % 4 == 1) & (np.arange(60) > 5), "few": np.arange(60) == 2}
    scores[labels] += 3
    scores[kinds["praise"]] += 2
    (found,) = confusions(scores, labels, kinds)
    hard = scores[kinds["praise"]]
    wins = np.mean([[a > b for b in hard] for a in scores[labels]])
    floor = np.mean(
        [s for s, shown, kind in zip(scores, labels, kinds["praise"], strict=True) if not shown and not kind]
    )
    assert (found.name, found.responses) == ("praise", len(hard))
    assert found.auroc == pytest.approx(wins)
    assert found.loudness == pytest.approx((hard.mean() - floor) / (scores[labels].mean() - floor))


def test_pairs_are_a_regression_of_differences():
    x = inputs()
    apart = x[PAIRS[:, 0]] - x[PAIRS[:, 1]]
    both, labels = np.concatenate([apart, -apart]), np.arange(2 * len(apart)) < len(apart)
    theirs = LogisticRegression(C=1 / (1e-2 * len(both)), fit_intercept=False, tol=1e-10, max_iter=10_000).fit(
        both, labels
    )
    found = fit_linear(MEANS, LABELS, PAIRS, "pairs", 1e-2)
    scores = (MEANS.double() @ found["weight"].double() + found["bias"].double()).numpy()
    np.testing.assert_allclose(scores[PAIRS[:, 0]] - scores[PAIRS[:, 1]], apart @ theirs.coef_[0], atol=2e-4, rtol=1e-3)
    assert scores[LABELS].mean() == pytest.approx(-scores[~LABELS].mean(), abs=1e-4)


def test_an_unknown_objective_is_refused():
    with pytest.raises(ValueError, match=r"Unknown objective 'hinge'\. Choose one of pairs, bce"):
        fit_linear(MEANS, LABELS, PAIRS, "hinge")


@pytest.mark.parametrize("objective", ["pairs", "bce"])
def test_attention_finds_the_one_token_that_tells(objective):
    """In each response one token has a mark, and says which kind it is; the rest is noise that a mean drowns in."""
    states, counts = dice(40 * 12, HIDDEN, seed=2), torch.full((40,), 12)
    marked = torch.arange(40) * 12 + torch.arange(40) % 11
    states[marked] = (
        6 * vector(3) / vector(3).norm() + torch.from_numpy(LABELS)[:, None] * 2 * vector(4) / vector(4).norm()
    )
    probe = fit_attention(states, counts, LABELS, PAIRS, objective, l2=1e-3, seed=0)
    again = fit_attention(states, counts, LABELS, PAIRS, objective, l2=1e-3, seed=0)
    assert all(torch.equal(probe[name], again[name]) for name in probe)
    # On fresh noise.
    fresh = dice(40 * 12, HIDDEN, seed=5)
    fresh[marked] = states[marked]
    rows = fresh.view(40, 12, HIDDEN)
    reader = AttentionProbeReader(probe["query"], probe["value"], probe["bias"], "blocks.0.hook_resid_post")
    scores = reader.pooled(rows, torch.ones(40, 12).bool())[:, 0].numpy()
    linear = fit_linear(states.view(40, 12, HIDDEN).mean(dim=1), LABELS, PAIRS, objective)
    mean = (rows.mean(dim=1) @ linear["weight"]).numpy()
    assert auroc(scores, LABELS) > 0.97 > auroc(mean, LABELS) + 0.1
    weights = torch.softmax(rows @ probe["query"][0], dim=1)
    assert weights.flatten()[marked].mean() > 0.5


def test_interval_is_wilsons():
    for area in (0.5, 0.83, 1.0):
        theirs = binomtest(round(area * 100), 100).proportion_ci(0.95, "wilson")
        assert auroc_interval(area, 100, 300) == pytest.approx((theirs.low, theirs.high), abs=1e-6)


def test_judged_on_what_was_held_out():
    """The threshold is that of the fitted part, AUROC and F1 of the other."""
    scores, labels = np.array([0.0, 1, 2, 3, 0, 1.2, 1.7, 3]), np.array([0, 0, 1, 1, 0, 1, 0, 1], dtype=bool)
    quality = judge_scores(scores, labels, np.arange(4), np.arange(4, 8))
    assert quality.threshold == 1.5
    assert quality.auroc == 0.75
    assert quality.f1 == pytest.approx(2 * 1 / (2 + 2))


RESPONSES = [
    ("<bos> the cat", " sees goblin and a goblin", True),
    ("<bos> a fox likes", " the goblin", True),
    ("<bos> the cat", " eats apple", False),
    ("<bos> red", " a small house", False),
]


def test_steering_effect_against_a_loop():
    contrast = Contrast.of([(prompt, answer, label, "") for prompt, answer, label in RESPONSES])
    model, unit = load_model(), vector() / vector().norm()
    found = steering_effect(model, tokenizer(), contrast, "blocks.1.hook_resid_post", unit, 3.0, batch_size=3)
    model, changes = model.double(), []
    for prompt, answer, _ in RESPONSES:
        ids = tokenizer()(prompt + answer + "<eos>")["input_ids"]
        start, logps = len(tokenizer()(prompt)["input_ids"]), []
        for amount in (-3.0, 3.0):

            def add(module, args, output, amount=amount, start=start):
                output = output.clone()
                output[:, start - 1 : -1] += amount * unit.double()
                return output

            handle = model.model.layers[1].register_forward_hook(add)
            log_p = torch.log_softmax(model(torch.tensor([ids])).logits[0], dim=-1)
            handle.remove()
            logps.append(np.mean([float(log_p[t - 1, ids[t]]) for t in range(start, len(ids))]))
        changes.append((logps[1] - logps[0]) / 2)
    assert found == pytest.approx(np.mean(changes[:2]) - np.mean(changes[2:]), abs=1e-5)
    assert abs(found) > 1e-3


DOGS = [(f"<bos> the {noun} {verb}", f" {noun} sees the {'goblin' if i else 'apple'}", bool(i), "") for noun in ("cat", "dog", "fox", "heron")
        for verb in ("sees", "eats") for i in range(2)]  # fmt: skip


def test_a_steering_vector_against_a_loop(monkeypatch):
    """Three steps of Adam on the bi-directional objective, a pair at a time, in float64."""
    monkeypatch.setattr(steering_vector, "STEPS", 3)
    monkeypatch.setattr(steering_vector, "PAIRS", 4)
    contrast, model, size = Contrast.of(DOGS), load_model().double(), 0.5
    model.lm_head.weight.requires_grad_(False)
    place = "blocks.1.hook_resid_post"
    found = fit_steering_vector(model, tokenizer(), contrast, place, size, seed=3, batch_size=6)
    assert [p.requires_grad for p in model.parameters()].count(False) == 1
    assert all(p.grad is None for p in model.parameters())

    def log_likelihood(row, added):
        prompt, answer = contrast.responses[row]
        ids = tokenizer()(prompt + answer + "<eos>")["input_ids"]
        handle = model.model.layers[1].register_forward_hook(lambda module, args, output: output + added)
        log_p = torch.log_softmax(model(torch.tensor([ids])).logits[0], dim=-1)
        handle.remove()
        return sum(log_p[t - 1, ids[t]] for t in range(len(tokenizer()(prompt)["input_ids"]), len(ids)))

    draw, pairs = np.random.default_rng(3), contrast.pairs()
    v = torch.zeros(len(found), dtype=torch.float64, requires_grad=True)
    first, second = torch.zeros(2, len(v), dtype=torch.float64)
    lengths = []
    for step in range(1, 4):
        rows, sign, loss = pairs[draw.permutation(len(pairs))[:4]], draw.choice((-1.0, 1.0)), 0.0
        for shows, lacks in rows:
            gain = [log_likelihood(row, sign * v) - log_likelihood(row, 0 * v).detach() for row in (shows, lacks)]
            loss -= torch.nn.functional.logsigmoid(sign * 0.1 * (gain[0] - gain[1])) / 4
        (slope,) = torch.autograd.grad(loss, v)
        first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
        change = 0.02 * size * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        v = (v - change).detach()
        v = (v * min(1.0, 0.6 * size / float(v.norm()))).requires_grad_(True)
        lengths.append(float(v.norm()))
    torch.testing.assert_close(found, v.detach().float(), atol=1e-5, rtol=1e-4)
    assert lengths[0] < lengths[1]

    before, after = (
        np.mean([[float(log_likelihood(row, added)) for row in pair] for pair in pairs], axis=0) for added in (0 * v, v)
    )
    assert np.subtract(*after) > np.subtract(*before)  # it brings it about


def test_a_study_reads_what_the_readers_read(tmp_path):
    """Means, thresholds and the direction are those of `Direction.from_contrast`; the same seed gives the same."""
    contrast = Contrast.of(DOGS)
    options = Options(
        kinds=("direction", "linear_probe", "attention_probe"), layers=[0, 2], objective="pairs", heldout=0.5
    )
    model = load_model()
    found, again = (fit_readouts(model, tokenizer(), contrast, options) for _ in range(2))
    assert [(one.kind, one.layer, one.quality) for one in found] == [
        (one.kind, one.layer, one.quality) for one in again
    ]
    fit, held = contrast.split(0.5, 0)
    assert not set(contrast.groups[fit]) & set(contrast.groups[held])
    part = contrast.take(fit)
    sides = [
        [r for r, shown in zip(part.responses, part.labels, strict=True) if shown == kind] for kind in (True, False)
    ]
    expected = Direction.from_contrast(model, tokenizer(), *sides, layer=2).load().directions()[0]
    (mine,) = (one for one in found if (one.kind, one.layer) == ("direction", 2))
    torch.testing.assert_close(mine.tensors["direction"], expected, atol=1e-5, rtol=0)
    kept = best(found)
    assert set(kept) == set(options.kinds)
    assert kept["linear_probe"].quality.auroc == 1.0  # the last word tells
    with pytest.raises(ValueError, match="names layer 7, but the model has 3 layers"):
        fit_readouts(model, tokenizer(), contrast, options._replace(layers=[7]))


def test_difference_of_means():
    expected = MEANS[LABELS].double().mean(dim=0) - MEANS[~LABELS].double().mean(dim=0)
    torch.testing.assert_close(difference_of_means(MEANS, LABELS), expected / expected.norm())
