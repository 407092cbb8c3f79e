"""Concepts as data: in Python, in YAML, in the trainer's configuration."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from pathlib import Path

import pytest
import torch
import yaml
from trl import TrlParser

from shapedpo import (
    Concept,
    Direction,
    Gate,
    Mask,
    Project,
    Regex,
    Reward,
    Reweight,
    SAEFeatures,
    ShapedDPOConfig,
    TextFunction,
    load_concepts,
)
from shapedpo.concept import resolve_concepts


def shout(text: str) -> float:
    return sum(letter.isupper() for letter in text) / max(len(text), 1)


CONCEPTS = """
concepts:
  - name: goblin
    readout: {type: sae_features, sae: some/folder, features: [412, 77], pooling: mean}
    action: suppress
    strength: 2
    gate: {column: creative}
  - name: links
    readout: {type: regex, pattern: 'https?://', flags: i}
    action: suppress
    method: {name: mask, fraction: 0.05}
  - name: way
    readout: {type: direction, path: way.safetensors, layer: 3}
    action: suppress
    method: {name: project, space: residual, layers: [1, 2]}
  - name: shouting
    readout: {type: function, function: 'tests.test_concept:shout'}
    action: amplify
    method: reweight
    strength: 0.5
    gate: {concept: links, threshold: 0.5}
  - name: seen
    readout: {type: regex, pattern: seen}
  - name: steady
    readout: {type: regex, pattern: steady}
    action: hold
  - name: raised
    readout: {type: regex, pattern: raised}
    action: hold
    method: reward
    target: 0.5
    gate: {column: creative}
"""


def in_python() -> list[Concept]:
    return [
        Concept(
            "goblin",
            SAEFeatures("some/folder", [412, 77], pooling="mean"),
            action="suppress",
            strength=2.0,
            gate=Gate(column="creative"),
        ),
        Concept("links", Regex("https?://", flags="i"), action="suppress", method=Mask(fraction=0.05)),
        Concept(
            "way", Direction(path="way.safetensors", layer=3), "suppress", Project(space="residual", layers=[1, 2])
        ),
        Concept(
            "shouting",
            TextFunction("tests.test_concept:shout"),
            "amplify",
            Reweight(),
            strength=0.5,
            gate=Gate(concept="links", threshold=0.5),
        ),
        Concept("seen", Regex("seen")),
        Concept("steady", Regex("steady"), action="hold"),
        Concept("raised", Regex("raised"), action="hold", target=0.5, gate=Gate(column="creative")),
    ]


@pytest.fixture
def path(tmp_path) -> Path:
    path = tmp_path / "concepts.yaml"
    path.write_text(CONCEPTS)
    return path


class TestConcept:
    def test_watches_by_default(self):
        concept = Concept("goblin", Regex("goblin"))
        assert (concept.action, concept.method, concept.strength, concept.gate) == ("watch", Reward(), None, None)
        assert not concept.shapes
        assert concept.to_dict() == {
            "name": "goblin",
            "readout": {"type": "regex", "pattern": "goblin"},
            "action": "watch",
        }

    def test_is_frozen(self):
        concept = Concept("goblin", Regex("goblin"))
        with pytest.raises(dataclasses.FrozenInstanceError):
            concept.action = "suppress"  # type: ignore[misc]
        assert concept == Concept("goblin", Regex("goblin"))
        assert concept != Concept("goblin", Regex("goblins"))

    @pytest.mark.parametrize(("action", "sign"), [("suppress", 1), ("amplify", -1)])
    def test_the_sign_is_never_the_users_problem(self, action, sign):
        assert Concept("goblin", Regex("goblin"), action, strength=2).signed_strength == sign * 2.0
        assert Concept("goblin", Regex("goblin"), action, Mask(threshold=1.0)).signed_strength == sign * 1.0

    @pytest.mark.parametrize(
        ("method", "strength", "shaper", "config"),
        [
            ("reward", 1.0, Reward(), "reward"),
            (Reward(), 1.0, Reward(), "reward"),
            ({"name": "reweight"}, 1.0, Reweight(), "reweight"),
            ({"name": "mask", "threshold": 2}, None, Mask(threshold=2), {"name": "mask", "threshold": 2}),
            ("project", None, Project(), "project"),
            (
                {"name": "project", "space": "residual"},
                None,
                Project("residual"),
                {"name": "project", "space": "residual"},
            ),
        ],
    )
    def test_methods(self, method, strength, shaper, config):
        concept = Concept("goblin", Regex("goblin"), "suppress", method, strength)
        assert concept.shaper == shaper
        assert concept.to_dict()["method"] == config

    def test_a_function_is_a_readout(self):
        concept = Concept("shouting", shout)
        assert concept.readout == TextFunction(shout)
        assert concept.to_dict()["readout"] == {"type": "function", "function": "tests.test_concept:shout"}
        (again,) = resolve_concepts([concept.to_dict()])
        assert again.readout.load().score(["AB", "Ab"]).tolist() == [1.0, 0.5]

    @pytest.mark.parametrize("name", ["a", "goblin_2", "em-dash", "v1.2 links", "愛"])
    def test_names(self, name):
        assert Concept(name, Regex("x")).name == name

    def test_gates_from_mappings(self):
        concept = Concept("goblin", Regex("g"), "suppress", strength=1.0, gate={"concept": "links"})
        assert concept.gate == Gate(concept="links", threshold=0.0)


class TestYaml:
    def test_reads_the_same_as_python(self, path):
        assert load_concepts(path) == load_concepts(str(path)) == in_python()

    def test_round_trip(self, tmp_path):
        for concept in in_python():
            assert Concept.from_dict(concept.to_dict()) == concept
        file = tmp_path / "again.yaml"
        file.write_text(yaml.safe_dump([concept.to_dict() for concept in in_python()]))  # a bare list will do
        assert load_concepts(file) == in_python()

    def test_is_plain_data(self):
        for concept in in_python():
            assert json.loads(json.dumps(concept.to_dict())) == concept.to_dict()

    def test_nothing_runs(self, tmp_path):
        """A tag that would run code is not obeyed."""
        file = tmp_path / "evil.yaml"
        file.write_text(f"concepts: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']\n")
        with pytest.raises(ValueError, match="not valid YAML"):
            load_concepts(file)
        assert not (tmp_path / "made").exists()


class TestTogether:
    def test_forms(self, path):
        assert resolve_concepts(None) == []
        assert resolve_concepts([]) == []
        assert resolve_concepts(path) == resolve_concepts(in_python()) == in_python()
        mixed = [in_python()[1], {"name": "seen", "readout": {"type": "regex", "pattern": "seen"}}]
        assert resolve_concepts(iter(mixed)) == [in_python()[1], in_python()[4]]

    def test_a_gate_may_name_a_later_concept(self):
        late = Concept("goblin", Regex("g"), "suppress", strength=1.0, gate=Gate(concept="links"))
        assert resolve_concepts([late, Concept("links", Regex("l"))])[0].gate == Gate(concept="links")


class TestConfig:
    def test_from_a_list_or_a_file(self, path, tmp_path):
        for concepts in (in_python(), [concept.to_dict() for concept in in_python()], str(path)):
            assert ShapedDPOConfig(str(tmp_path), concepts=concepts, use_cpu=True).concepts == in_python()
        config = ShapedDPOConfig(str(tmp_path), use_cpu=True)
        assert (config.concepts, config.weight_column, config.calibration_size) == (None, "weight", 512)

    def test_as_plain_data(self, tmp_path):
        config = ShapedDPOConfig(str(tmp_path), concepts=in_python(), use_cpu=True)
        plain = [concept.to_dict() for concept in in_python()]
        assert config.to_dict()["concepts"] == plain
        assert json.loads(config.to_json_string())["concepts"] == plain
        assert "goblin" in str(config.to_sanitized_dict()["concepts"])
        assert config.concepts == in_python()

    def test_pickles_hold_no_code(self, tmp_path):
        """`training_args.bin` is one: a lambda or a tensor of a readout must not be in its way."""
        concepts = [Concept("long", lambda text: len(text)), Concept("way", Direction(torch.ones(4), layer=0))]
        config = pickle.loads(pickle.dumps(ShapedDPOConfig(str(tmp_path), concepts=concepts, use_cpu=True)))
        assert [concept["name"] for concept in config.concepts] == ["long", "way"]

    def test_copies_keep_the_concepts(self, tmp_path):
        """Frameworks copy their settings: a sweep, or a callback that restores them."""
        config = ShapedDPOConfig(str(tmp_path), concepts=in_python(), use_cpu=True)
        for other in (copy.copy(config), copy.deepcopy(config), dataclasses.replace(config, beta=0.5)):
            assert resolve_concepts(other.concepts) == in_python()

    def test_command_line(self, path, tmp_path):
        """As TRL's scripts take it: a recipe's list, a file, or JSON."""
        plain = [concept.to_dict() for concept in in_python()]
        base = ["--output_dir", str(tmp_path), "--use_cpu"]
        for given in (str(path), json.dumps(plain)):
            (config,) = TrlParser(ShapedDPOConfig).parse_args_and_config([*base, "--concepts", given])
            assert config.concepts == in_python()
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(CONCEPTS + "beta: 0.3\n")
        (config,) = TrlParser(ShapedDPOConfig).parse_args_and_config([*base, "--config", str(recipe)])
        assert (config.concepts, config.beta) == (in_python(), 0.3)
        (config,) = TrlParser(ShapedDPOConfig).parse_args_and_config(base)
        assert config.concepts is None

    @pytest.mark.parametrize("size", [1, 0, -3])
    def test_calibration_size(self, tmp_path, size):
        with pytest.raises(ValueError, match=rf"`calibration_size` must be a whole number of at least 2, got {size}"):
            ShapedDPOConfig(str(tmp_path), calibration_size=size, use_cpu=True)
