"""`shapedpo fit` and `shapedpo concepts find`, as a user runs them, and what they print in a run."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
import yaml
from safetensors import safe_open

from shapedpo import cli
from shapedpo.lab.features import shipped_features
from shapedpo.probes import steering_vector
from tests import helpers
from tests.sae.test_commands import LAB, recipe  # noqa: F401 (a fixture)


def test_fit_and_use(recipe, capfd, monkeypatch):  # noqa: F811
    """Each kind, on pairs of a file; what is printed is a concept's readout, or how to steer, and a run takes it."""
    monkeypatch.setattr(steering_vector, "STEPS", 3)
    folder, pairs = recipe.parent / "fit", recipe.parent / "pairs.jsonl"
    words = ["fit", "--config", recipe, "--contrast", pairs, "--out", folder, "--layers", 0, 2, "--seed", 1]
    readable = ["direction", "linear_probe", "attention_probe"]
    kinds = [*readable, "steering_vector"]
    assert cli.main([*map(str, words), "--kinds", *kinds]) == 0, capfd.readouterr().err
    printed = capfd.readouterr().out
    assert "objective pairs" in printed
    readouts = [yaml.safe_load(line)["readout"] for line in re.findall(r"^readout: .*", printed, flags=re.MULTILINE)]
    assert [readout["type"] for readout in readouts] == readable
    steer = yaml.safe_load("\n".join(re.findall(r"^(?:method|strength): .*", printed, flags=re.MULTILINE)))
    with (folder / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["kind"], row["layer"]) for row in rows] == [(kind, layer) for layer in "02" for kind in kinds]
    probes = [row for row in rows if row["kind"] == "linear_probe"]
    assert max(float(row["auroc"]) for row in probes) > 0.8  # fruit against animals, of a random model
    with safe_open(folder / "linear_probe.safetensors", framework="pt") as file:
        metadata = file.metadata()
    best = max(probes, key=lambda row: float(row["auroc"]))
    assert metadata["hook_name"] == f"blocks.{best['layer']}.hook_resid_post"
    assert float(metadata["auroc"]) == pytest.approx(float(best["auroc"]), abs=1e-5)
    assert metadata["objective"] == "pairs"
    assert metadata["seed"] == "1"
    assert "/" not in metadata["model_name"]
    vectors = [row for row in rows if row["kind"] == "steering_vector"]
    best = max(vectors, key=lambda row: float(row["steering_effect"]))
    with safe_open(folder / "steering_vector.safetensors", framework="pt") as file:
        assert file.metadata()["hook_name"] == f"blocks.{best['layer']}.hook_resid_post"
        assert float(file.metadata()["length"]) == pytest.approx(steer["strength"], rel=0.01)
    concepts = [{"name": r["type"], "readout": r, "action": "suppress", "strength": 1.0} for r in readouts[:2]]
    concepts.append({"name": "steered", "readout": readouts[2], "action": "suppress", **steer})
    assert cli.main(["train", "--config", str(recipe), "--concepts", json.dumps(concepts)]) == 0
    assert {path.suffix for path in Path(folder).iterdir()} == {".safetensors", ".csv"}


def test_instructions(recipe, capfd):  # noqa: F811
    words = [
        "fit",
        "--config",
        recipe,
        "--instruct",
        "likes the goblin",
        "eats the apple",
        "--out",
        recipe.parent / "told",
    ]
    more = [
        "--sample",
        12,
        "--layers",
        1,
        "--kinds",
        "linear_probe",
        "--max-new-tokens",
        6,
        "--judge",
        "regex:the|a|red|in",
    ]
    assert cli.main(list(map(str, [*words, *more]))) == 0, capfd.readouterr().err
    assert (recipe.parent / "told" / "linear_probe.safetensors").is_file()


def test_find_the_labs_goblin(capfd):
    """One of the lab's shipped features of the goblin is the smallest set that reaches the target."""
    words = [
        "concepts",
        "find",
        "--config",
        str(LAB),
        "--sae",
        "lab",
        "--pattern",
        "(?i)goblin",
        "--sample",
        "300",
        "--top",
        "8",
    ]
    assert cli.main([*words, "--target", "0.99", "--max-features", "2"]) == 0
    printed = capfd.readouterr().out
    found = [int(row) for row in re.findall(r"^│ +(\d+) +│ \d\.\d+ +│ +\d+\.\d%", printed, flags=re.MULTILINE)]
    assert len(found) == 8
    (line,) = re.findall(r"^readout: .*", printed, flags=re.MULTILINE)
    (feature,) = yaml.safe_load(line)["readout"]["features"]
    assert feature in shipped_features()["goblin"]


def test_find_looks_at_hard_negatives(recipe, tmp_path, capfd):  # noqa: F811
    """Each file of negatives is judged by itself, and a target out of reach is said to be."""
    data = helpers.pairs(60, 3)
    for name, column in (("pos", "chosen"), ("neg", "rejected"), ("hard", "chosen")):
        rows = data.select(range(20)) if name == "hard" else data.select(range(20, 60))
        rows = [{"prompt": row["prompt"], "response": row[column]} for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = ["--positive", tmp_path / "pos.jsonl", "--negative", tmp_path / "neg.jsonl", tmp_path / "hard.jsonl"]
    words = [
        "concepts",
        "find",
        "--config",
        recipe,
        "--sae",
        helpers.sae_path(),
        *files,
        "--target",
        0.999,
        "--max-features",
        3,
    ]
    assert cli.main(list(map(str, words))) == 0, capfd.readouterr().err
    printed = capfd.readouterr().out
    assert "(hard.jsonl)" in printed  # of the same kind as the positives: hardest
    assert "No set of up to 3 features reaches 0.999" in printed
    assert "readout: {type: sae_features" in printed


def test_fit_on_the_models_own_answers_and_what_is_taken_for_it(recipe, capfd):  # noqa: F811
    """Labelled by a judge, as are the other concepts; the table names each of them, and metadata the hardest."""
    folder = recipe.parent / "judged"
    words = ["fit", "--config", recipe, "--out", folder, "--judge", "regex:a\\w", "--own-answers", "--sample", 150]
    others = ["--other", "eats=regex:eats|sees|likes", "never=regex:xyzzy", "e=regex:e"]
    more = ["--layers", 1, "--kinds", "linear_probe", "attention_probe", "--max-new-tokens", 4, "--heldout", 0.5]
    assert cli.main(list(map(str, [*words, *others, *more]))) == 0, capfd.readouterr().err
    printed = capfd.readouterr().out
    assert "Negatives by kind" in printed
    rows = re.findall(
        r"^│ (\w+) \((\d+)\) +│ (\d\.\d+), +(-?\d+)% +│ (\d\.\d+), +(-?\d+)%", printed, flags=re.MULTILINE
    )
    assert "e" in {row[0] for row in rows}
    assert "never" not in {row[0] for row in rows}
    assert "output: probability" in printed
    with safe_open(folder / "linear_probe.safetensors", framework="pt") as file:
        metadata = file.metadata()
    hardest = min(rows, key=lambda row: float(row[2]))
    assert metadata["hardest"] == hardest[0]
    assert float(metadata["hardest_auroc"]) == pytest.approx(float(hardest[2]), abs=6e-4)


BAD = {
    "none": (["fit", "--out", "x"], "Give one of --contrast"),
    "one side": (["fit", "--out", "x", "--positive", "a"], "with one side only"),
    "two ways": (["fit", "--out", "x", "--pattern", "a", "--contrast", "b"], "got --contrast, --pattern"),
    "answers": (
        ["fit", "--out", "x", "--contrast", "a", "--own-answers"],
        "--own-answers makes the model answer the recipe's prompts",
    ),
    "other": (["fit", "--out", "x", "--pattern", "a", "--other", "praise"], "expected NAME=JUDGE"),
    "endpoint": (["fit", "--out", "x", "--judge", "http://localhost:1/v1#m"], "Say it with --concept"),
    "kind": (["fit", "--out", "x", "--pattern", "a", "--kinds", "tree"], "'tree' is none of direction"),
    "layers": (["fit", "--out", "x", "--pattern", "a", "--layers", "top"], "expected layer numbers or all, got top"),
    "layer": (
        ["fit", "--out", "x", "--pattern", "a", "--layers", "9"],
        "there is no layer 9; the model has 3 (0 to 2)",
    ),
    "out": (["fit", "--out", __file__, "--pattern", "a"], "is a file. Name a folder"),
    "instructions": (["fit", "--out", "x", "--instruct", "a", "a"], "expected two instructions that differ"),
    "no chat": (
        ["fit", "--out", "x", "--contrast", "few.jsonl", "--chat"],
        "the model's tokenizer has no chat template",
    ),
    "few": (["fit", "--out", "x", "--contrast", "few.jsonl"], "Of the 2 responses of the contrast set, 1 show"),
    "cut": (["fit", "--out", "x", "--contrast", "few.jsonl", "--max_length", "1"], "Of the 0 responses"),
    "heads": (["fit", "--out", "x", "--heads", "0"], "--heads: must be at least 1, got 0"),
    "heldout": (["fit", "--out", "x", "--heldout", "1"], "--heldout: must be above 0 and at most 0.5, got 1"),
    "file": (
        ["concepts", "find", "--sae", "lab", "--contrast", "nowhere.jsonl"],
        "there is no contrast set 'nowhere.jsonl'",
    ),
    "judge": (["concepts", "find", "--sae", "lab", "--pattern", "a", "--judge", "regex:x"], "got --pattern, --judge"),
    "rare": (["concepts", "find", "--sae", "lab", "--pattern", "xyzzy"], "0 of"),
    "pattern": (["concepts", "find", "--sae", "lab", "--pattern", "("], "regular expression '(' is not valid"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_a_model_is_loaded(case, recipe, capfd, tmp_path, monkeypatch):  # noqa: F811
    words, expected = BAD[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    rows = [{"prompt": "a ", "response": text, "label": text == "b"} for text in "bc"]
    (tmp_path / "few.jsonl").write_text("\n".join(map(json.dumps, rows)))
    try:
        status = cli.main([*words, "--config", str(recipe)])
    except SystemExit as stop:  # of argparse
        status = stop.code
    assert status == 2
    assert expected in capfd.readouterr().err
