"""Concepts that are given others, against least squares written out, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from shapedpo import Ablate, Concept, Direction, Gate, Project, Regex, Residual, ShapedDPOTrainer, Tokens
from shapedpo.calibration import load_calibration
from shapedpo.concept import resolve_concepts
from tests.helpers import pairs, shaped, vector
from tests.slow import BETA, Slow, standardise, trainer_of


LAYER, STRENGTH = 1, 1.3
PARENT, COUSIN = vector(1), vector(2)
CHILD = vector(0) + vector(1)
"""It shares much with the parent."""


def concepts(*given, method="reward", strength=STRENGTH, **fields):
    parent = Concept("parent", Direction(PARENT, hook_name=f"model.layers.{LAYER}"))  # the same place
    cousin = Concept("cousin", Direction(COUSIN, layer=LAYER, pooling="mean"))
    child = Concept(
        "child",
        Direction(CHILD, layer=LAYER),
        "suppress",
        method,
        strength,
        given=given or ("parent", "cousin"),
        **fields,
    )
    return [child, parent, cousin]  # the child before what it is given


def own_scores(slow):
    """`(3, 2B)`, each concept's own standardised scores: child, parent, cousin."""
    pools = ((CHILD, torch.amax), (PARENT, torch.amax), (COUSIN, torch.mean))
    return torch.stack([standardise([pool(t, 0) for t in slow.token_scores(v, LAYER)]) for v, pool in pools])


def least_squares(scores, rows=None):
    """`(2,)`: what parent and cousin predict of the child's delta on some pairs."""
    chosen, rejected = scores.chunk(2, dim=1)
    deltas = (chosen - rejected)[:, rows if rows is not None else slice(None)]
    deltas = deltas - deltas.mean(dim=1, keepdim=True)
    return torch.linalg.lstsq(deltas[1:].T, deltas[:1].T).solution[:, 0]


@pytest.mark.parametrize("gated", [False, True])
def test_reward(gated):
    """The child's reward is what the others do not predict of its score; its delta is uncorrelated with theirs."""
    gate = [index % 4 != 0 for index in range(12)]
    fields = {"gate": Gate(column="fruity")} if gated else {}
    slow = Slow(trainer_of(*concepts(**fields), data=pairs(12, fruity=gate)))
    scores = own_scores(slow)
    rows = torch.tensor(gate) if gated else torch.ones(12).bool()
    coefficients = least_squares(scores, rows)
    assert coefficients.abs().min() > 0.01
    child = scores[0] - coefficients @ scores[1:]
    tilt = STRENGTH / BETA * child * rows.repeat(2)
    slow.assert_step(slow.loss(slow.logps(slow.policy), slow.logps(slow.reference) - tilt))
    calibration = slow.trainer._calibration
    deltas = calibration.deltas.double()[rows]
    chosen, rejected = child.chunk(2)
    torch.testing.assert_close(deltas[:, 0], (chosen - rejected)[rows], atol=1e-5, rtol=1e-5)
    correlations = torch.corrcoef(deltas.T)
    assert correlations[0, 1:].abs().max() < 1e-5


def test_siblings_are_given_each_other():
    """Their own scores count, so there is no circle."""
    both = [
        Concept("a", Direction(CHILD, layer=LAYER), "suppress", strength=1.0, given=["b"]),
        Concept("b", Direction(PARENT, layer=LAYER), "suppress", strength=1.0, given=["a"]),
    ]
    slow = Slow(trainer_of(*both))
    slow.step()
    scores = own_scores(slow)[:2]
    chosen, rejected = scores.chunk(2, dim=1)
    a, b = chosen - rejected
    found = slow.trainer._calibration.deltas.double()
    shared, of_a, of_b = torch.cov(torch.stack([a, b]))[[0, 0, 1], [1, 0, 1]]
    torch.testing.assert_close(found[:, 0], a - shared / of_b * b, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[:, 1], b - shared / of_a * a, atol=1e-5, rtol=1e-5)


def orthogonal(unit, *others):
    q, _ = torch.linalg.qr(torch.stack(others).double().T)
    return F.normalize(unit.double() - q @ (q.T @ unit.double()), dim=0)


def test_directions():
    """What acts by directions acts by what is orthogonal to the others'."""
    trainer = trainer_of(*concepts(method=Ablate(), strength=None))
    expected = orthogonal(CHILD, PARENT, COUSIN)
    basis = trainer._steering._edits[0].basis[:, 0].double()
    torch.testing.assert_close(basis * (basis @ expected).sign(), expected, atol=1e-5, rtol=0)
    trainer = trainer_of(*concepts("parent", method=Project("residual"), strength=None))
    basis = trainer._residual_projection._bases[0]
    expected = orthogonal(CHILD, PARENT)
    torch.testing.assert_close(
        basis[:, 0].double() * (basis[:, 0].double() @ expected).sign(), expected, atol=1e-5, rtol=0
    )


def test_tokens():
    """A token's score is mixed as a completion's is."""
    trainer = trainer_of(*concepts("parent", method=Tokens("both", threshold=0.5), strength=None))
    slow = Slow(trainer)
    scores = own_scores(slow)
    chosen, rejected = scores.chunk(2, dim=1)
    covariance = torch.cov((chosen - rejected)[:2])
    coefficient = covariance[0, 1] / covariance[1, 1]
    tokens = []
    for v in (CHILD, PARENT):
        raw = slow.token_scores(v, LAYER)
        pooled = torch.stack([t.max() for t in raw])
        tokens.append([(t - pooled.mean()) / pooled.std() for t in raw])
    left = [c - coefficient * p > 0.5 for c, p in zip(*tokens, strict=True)]
    assert 0 < sum(int(part.sum()) for part in left) < sum(len(part) for part in left)
    kept = [
        torch.stack([t[~out].sum() for t, out in zip(slow.token_logps(run), left, strict=True)])
        for run in (slow.policy, slow.reference)
    ]
    slow.assert_step(slow.loss(*kept))


def test_a_checkpoint_keeps_the_coefficients(tmp_path):
    trainer = shaped(*concepts("parent"))
    trainer._make_ready()
    trainer.save_model(str(tmp_path))
    found = load_calibration(tmp_path, trainer.concepts, trainer._reader.fingerprint, allow_change=False)
    assert torch.equal(found.statistics.given, trainer._calibration.statistics.given)
    assert found.statistics.given[0, 1] > 0.01
    with pytest.raises(ValueError, match=r"given of 'child' was .*'parent'"):
        load_calibration(tmp_path, concepts("cousin"), trainer._reader.fingerprint, allow_change=False)


def test_yaml():
    data = [
        {
            "name": "table",
            "readout": {"type": "regex", "pattern": r"\|"},
            "action": "hold",
            "given": ["bold"],
            "spare": ["dash"],
        },
        {"name": "bold", "readout": {"type": "regex", "pattern": r"\*\*"}, "action": "watch"},
        {"name": "dash", "readout": {"type": "regex", "pattern": "—"}, "action": "watch"},
    ]
    found = resolve_concepts(data)
    assert found[0].given == ("bold",)
    assert found[0].spare == ("dash",)
    assert Concept.from_dict(found[0].to_dict()) == found[0]
    assert found[0].to_dict()["given"] == ["bold"]
    assert found[0].to_dict()["spare"] == ["dash"]
    assert not {"given", "spare"} & found[1].to_dict().keys()


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"given": "bold"}, "must be a list of the names"),
        ({"given": ["table"]}, "names other concepts, each once"),
        ({"given": ["bold", "bold"]}, "names other concepts, each once"),
        ({"given": ["emoji"]}, "'emoji', which is not in the list. There are table, bold"),
        (
            {"given": ["bold"], "action": "suppress", "strength": 1.0, "method": Residual(instruction="x")},
            "by no score or direction",
        ),
        ({"action": "hold", "spare": "bold"}, "`spare` must be a list of the names"),
        ({"action": "hold", "spare": ["emoji"]}, "`spare` names the concept 'emoji', which is not in the list"),
        ({"action": "hold", "spare": ["bold"], "given": ["bold"]}, "'bold' is in both `given` and `spare`"),
        ({"action": "suppress", "strength": 1.0, "spare": ["bold"]}, "`spare` is for action 'hold', got 'suppress'"),
    ],
)
def test_bad_names(fields, text):
    with pytest.raises(ValueError, match=f"Concept 'table': .*{text}"):
        resolve_concepts([Concept("table", Regex("x"), **fields), Concept("bold", Regex("y"))])


@pytest.mark.parametrize(
    ("method", "parent", "text"),
    [
        (Ablate(), Regex("goblin"), "acts by directions, and 'parent', which it is given, is read from text"),
        (Ablate(), Direction(PARENT, layer=2), "Read both at one place"),
        (Ablate(), Direction(-CHILD, layer=LAYER), "nothing is left of its direction, given parent"),
        (
            Tokens(threshold=1.0),
            Regex("goblin"),
            "reads every token, and 'parent', which it is given, is read from whole texts",
        ),
    ],
)
def test_what_does_not_fit(method, parent, text):
    child = Concept("child", Direction(CHILD, layer=LAYER), "suppress", method, given=["parent"])
    with pytest.raises(ValueError, match=f"Concept 'child': method .*{text}"):
        shaped(child, Concept("parent", parent))


def test_nothing_of_its_own(caplog):
    child = Concept("child", Direction(-PARENT, layer=LAYER, pooling="mean"), given=["parent"])
    trainer = shaped(child, Concept("parent", Direction(PARENT, layer=LAYER, pooling="mean")))
    assert isinstance(trainer, ShapedDPOTrainer)
    trainer._make_ready()
    assert trainer._calibration.deltas[:, 0].abs().max() < 1e-4
    assert "Concept 'child': given parent, 0.0% of its deltas' variance" in caplog.text
