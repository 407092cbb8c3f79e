"""A concept that does not fit together."""

from __future__ import annotations

import math

import pytest

from shapedpo import Concept, Gate, Mask, Regex, ShapedDPOTrainer
from tests.helpers import arguments, build, shaped

from . import goblin, refused


@pytest.mark.parametrize("name", ["", " x", "a/b", "-", "x\n", None, 3])
def test_name(name):
    refused(f"name...{name!r}", lambda: Concept(name, Regex("x")))


def test_a_long_name():
    assert Concept("x" * 100, Regex("x")).name == "x" * 100
    text = refused("up to 100 letters...(5002 characters)", lambda: Concept("x" * 5000, Regex("x")))
    assert len(text) < 400


def test_action():
    refused(
        "Concept 'goblin': ...'supress'. Did you mean 'suppress'?...watch, suppress, amplify",
        lambda: goblin("supress", strength=1.0),
    )


def test_method():
    refused(
        "Concept 'goblin': ...'rewards'...mask, project, residual, reward, reweight...'reward'",
        lambda: goblin("suppress", "rewards", strength=1.0),
    )
    refused(
        "Concept 'goblin': ...'mask'...'share'...fraction, threshold",
        lambda: goblin("suppress", {"name": "mask", "share": 1}),
    )
    refused("Concept 'goblin': ...'reward'...'x'...none", lambda: goblin("suppress", {"name": "reward", "x": 1}, 1.0))
    refused("Concept 'goblin': ...None", lambda: goblin("suppress", {"fraction": 1}))
    refused("Concept 'goblin': ...5", lambda: goblin("suppress", 5))
    refused("Concept 'goblin': Unknown method ['mask']", lambda: goblin("suppress", ["mask"]))
    refused("Concept 'goblin': Unknown method ['mask']", lambda: goblin("suppress", {"name": ["mask"]}))
    refused("Concept 'goblin': ...'mask' is given as a class...Mask(...)", lambda: goblin("suppress", Mask))
    refused("Concept 'goblin': ...'project' cannot amplify...suppress", lambda: goblin("amplify", "project"))


@pytest.mark.parametrize("method", ["reward", "reweight"])
@pytest.mark.parametrize("action", ["suppress", "amplify"])
def test_strength(method, action):
    refused(f"Concept 'goblin': ...{method!r} needs a `strength`", lambda: goblin(action, method))
    for bad in (0, 0.0, -1, -0.5, math.nan, math.inf, -math.inf, True, False, "2", [1.0], 1j):
        refused(
            f"Concept 'goblin': ...`strength` must be a number above 0 and finite, got {bad!r}",
            lambda bad=bad: goblin(action, method, bad),
        )


def test_hold():
    refused(
        "Concept 'goblin': `strength` is given...'hold' finds it by itself, got 1.0...Leave it out",
        lambda: goblin("hold", strength=1.0),
    )
    for method in ("reweight", {"name": "mask", "fraction": 0.1}, "project"):
        name = method if isinstance(method, str) else method["name"]
        refused(f"Concept 'goblin': method {name!r} cannot hold. It can suppress", lambda m=method: goblin("hold", m))
    for bad in (math.nan, math.inf, "high", None, True):
        refused(
            f"Concept 'goblin': ...`target` must be a number finite, in standard deviations of the score, got {bad!r}",
            lambda bad=bad: goblin("hold", target=bad),
        )


@pytest.mark.parametrize(("action", "strength"), [("watch", None), ("suppress", 1.0), ("amplify", 1.0)])
def test_target_without_hold(action, strength):
    refused(
        f"Concept 'goblin': `target` is given...{action!r}...Set action='hold'",
        lambda: goblin(action, strength=strength, target=0.5),
    )


@pytest.mark.parametrize("method", [{"name": "mask", "fraction": 0.1}, "project"])
def test_strength_where_none_is_taken(method):
    name = method if isinstance(method, str) else method["name"]
    refused(f"Concept 'goblin': ...{name!r} takes no `strength`, got 1.0", lambda: goblin("suppress", method, 1.0))


def test_watching_shapes_nothing():
    refused("Concept 'goblin': `strength` is given...'watch'", lambda: goblin(strength=1.0))
    refused("Concept 'goblin': `gate` is given...'watch'", lambda: goblin(gate=Gate(column="creative")))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "`fraction` or `threshold`...None...None"),
        ({"fraction": 0.1, "threshold": 1.0}, "`fraction` or `threshold`...0.1...1.0"),
        ({"fraction": 0}, "`fraction` must be a number above 0 and below 1, got 0"),
        ({"fraction": 1.0}, "`fraction`...1.0"),
        ({"fraction": 5}, "`fraction`...5"),
        ({"fraction": math.nan}, "`fraction`...nan"),
        ({"threshold": -1.0}, "`threshold`...above 0 and finite, got -1.0"),
        ({"threshold": "high"}, "`threshold`...'high'"),
    ],
)
def test_mask(options, text):
    refused(f"Concept 'goblin': ...{text}", lambda: goblin("suppress", {"name": "mask", **options}))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"space": "weights"}, "`space`...'weights'"),
        ({"layers": [1]}, "`layers`...'residual'"),
        ({"space": "residual", "layers": []}, "`layers`...[]"),
        ({"space": "residual", "layers": [-1]}, "`layers`...[-1]"),
        ({"space": "residual", "layers": 1}, "`layers`...1"),
    ],
)
def test_project(options, text):
    refused(f"Concept 'goblin': ...{text}", lambda: goblin("suppress", {"name": "project", **options}))


@pytest.mark.parametrize(
    ("gate", "text"),
    [
        ({}, "`column`...`concept`"),
        ({"column": "a", "concept": "b"}, "`column`...`concept`...'a'...'b'"),
        ({"column": ["a"]}, "must be a name, got ['a']"),
        ({"concept": 3}, "must be a name, got 3"),
        ({"concept": "b", "threshold": math.inf}, "`threshold`...finite, got inf"),
        ({"concept": "b", "threshold": math.nan}, "`threshold`...finite, got nan"),
        ({"column": "a", "above": 1}, "'above'...column, concept, threshold"),
    ],
)
def test_gate(gate, text):
    refused(f"Concept 'goblin': ...{text}", lambda: goblin("suppress", strength=1.0, gate=gate))


@pytest.mark.parametrize("gate", ["creative", 3, True])
def test_a_gate_of_another_kind(gate):
    refused("Concept 'goblin': ...gate", lambda: goblin("suppress", strength=1.0, gate=gate))


def test_unknown_fields():
    data = {"name": "goblin", "readout": {"type": "regex", "pattern": "x"}, "stength": 2.0}
    refused("Concept 'goblin'...'stength'. Did you mean 'strength'?...target", lambda: shaped(data))
    refused("unknown field 'nam'. Did you mean 'name'?", lambda: shaped({"nam": "goblin", "readout": data["readout"]}))
    refused("needs a `name`", lambda: shaped({"readout": data["readout"]}))


def test_two_of_one_name():
    refused("Concept 'goblin' is there 2 times", lambda: shaped(goblin(), Concept("other", Regex("x")), goblin()))


def test_a_single_one_or_none():
    for concepts in (goblin(), goblin().to_dict()):
        refused("must be a list", lambda concepts=concepts: build(ShapedDPOTrainer, concepts=concepts))
    refused("A concept must be a mapping...'goblin'", lambda: build(ShapedDPOTrainer, concepts=["goblin"]))


def test_given_twice():
    args = arguments(concepts=[goblin()])
    refused("both as `concepts=` and in `args.concepts`", lambda: build(ShapedDPOTrainer, args, concepts=[goblin()]))
