"""A file of concepts that cannot be read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from shapedpo import ShapedDPOTrainer, load_concepts
from tests.helpers import arguments, build

from . import refused


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "concepts.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "text", ["", "concepts:\n", "concepts: []\n", "[]\n", "other: 1\n", "concepts: goblin\n", "goblin\n", "3"]
)
def test_no_concepts(tmp_path, text):
    path = write(tmp_path, text)
    refused(f"{path}...at least one concept under `concepts:`", lambda: load_concepts(path))
    refused(f"{path}", lambda: build(ShapedDPOTrainer, concepts=str(path)))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("concepts:\n  - name: a\n    readout: {type: regex, pattern: 'x}\n", 3),
        ("concepts:\n  - name: a\n   readout: x\n", 3),
        ("concepts:\n  - name: a\n\treadout: x\n", 3),
        ("concepts: [1, 2\nother: 3", 2),
    ],
)
def test_malformed(tmp_path, text, line):
    path = write(tmp_path, text)
    message = refused(f"{path}...not valid YAML", lambda: load_concepts(path))
    (found,) = re.findall(r"line (\d+)", message)
    assert int(found) in (line, line + 1)  # YAML notices some mistakes a line late


def test_a_key_twice(tmp_path):
    """YAML would take the last, without a word."""
    text = "concepts:\n  - name: a\n    readout: {type: regex, pattern: x}\n    action: hold\n    action: watch\n"
    path = write(tmp_path, text)
    refused(f"{path}, line 5: the key 'action' is there already, on line 4", lambda: load_concepts(path))
    path = write(tmp_path, "- {name: a, readout: {type: regex, pattern: x, pattern: y}}\n")
    refused(f"{path}, line 1: the key 'pattern'", lambda: load_concepts(path))


def test_not_text(tmp_path):
    path = tmp_path / "concepts.yaml"
    path.write_bytes(b"\xff\xfe\x00concepts")
    refused(f"{path}...not valid YAML", lambda: load_concepts(path))


def test_missing(tmp_path):
    refused("no file of concepts...nowhere.yaml", lambda: load_concepts(tmp_path / "nowhere.yaml"), FileNotFoundError)
    refused("nowhere.yaml", lambda: arguments(concepts=str(tmp_path / "nowhere.yaml")), FileNotFoundError)


def test_a_concept_that_does_not_fit(tmp_path):
    text = "concepts:\n  - name: goblin\n    readout: {type: regex, pattern: x}\n    action: hide\n"
    path = write(tmp_path, text)
    refused(f"{path}: Concept 'goblin': ...'hide'", lambda: load_concepts(path))
    path = write(tmp_path, "- goblin\n")
    refused(f"{path}: ...'goblin'", lambda: load_concepts(path))
