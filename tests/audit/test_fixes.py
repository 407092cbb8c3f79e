"""From a finding to a fix: what a recipe reads, which rows a new dataset has, what is predicted then; and the whole in the lab."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import yaml
from datasets import Dataset, load_dataset

from shapedpo import lab
from shapedpo.audit.analysis.hypotheses import Analysis
from shapedpo.audit.analysis.lessons import lessons
from shapedpo.audit.fixes import targets
from shapedpo.audit.fixes.data import changed, write
from shapedpo.audit.fixes.preview import preview
from shapedpo.audit.harvesting.store import Harvest
from shapedpo.audit.prediction.run import Prediction
from shapedpo.audit.suggestions import parts, suggest
from shapedpo.cli import main
from shapedpo.concept import resolve_concepts
from shapedpo.lab.features import shipped_features

from .audits import GROUP, TOPICS


PRAISE_FEATURES = set(range(2 * len(TOPICS) * GROUP, (2 * len(TOPICS) + 1) * GROUP))
PHYSICS_FEATURES = set(range(GROUP))


@pytest.fixture(scope="module")
def praise(finished):
    """The finding of the small audit: praise on physics."""
    lesson = lessons(finished.analysis)[0]
    return targets.target(finished.harvest, finished.analysis, lesson, "finding 1")


def test_a_target_is_what_its_rows_teach_under_their_condition(finished, praise) -> None:
    assert praise.more
    assert set(praise.features) <= PRAISE_FEATURES
    assert set(praise.condition.features) <= PHYSICS_FEATURES
    # the gate's score, written out: means over prompts of standardised maxima
    largest = np.concatenate([shard.prompt.max.toarray() for shard in finished.harvest.shards(("max",))]).astype(float)
    some = largest[:, praise.condition.features]
    score = ((some - some.mean(axis=0)) / some.std(axis=0, ddof=1)).mean(axis=1)
    above = score > praise.condition.threshold
    mine = np.isin(finished.analysis.rows, praise.rows)
    assert praise.condition.inside == pytest.approx(above[mine].mean())
    assert praise.condition.outside == pytest.approx(above[~mine].mean())
    for other in np.linspace(score.min(), score.max(), 50):
        assert (score[mine] > other).mean() - (score[~mine] > other).mean() <= (
            praise.condition.inside - praise.condition.outside + 1e-9
        )


def test_concepts_have_action_and_gate(finished, praise) -> None:
    harvest = Harvest(
        finished.harvest.folder, {**vars(finished.harvest), "settings": {"sae": {"type": "sae_features", "sae": "lab"}}}
    )
    where, concept = (one.to_dict() for one in resolve_concepts(targets.concepts(harvest, [praise])))
    assert (concept["action"], concept["gate"]["concept"], where["action"]) == ("hold", where["name"], "watch")
    assert list(concept["readout"]["features"]) == praise.features
    options = {"action": "suppress", "strength": 2, "columns": {praise.name: "f"}}
    (gated,) = (one.to_dict() for one in resolve_concepts(targets.concepts(harvest, [praise], **options)))
    assert (gated["gate"], gated["strength"]) == ({"column": "f"}, 2)


@pytest.mark.parametrize("new", [None, "clean.parquet"])
def test_a_recipe_trains_on_what_was_audited(finished, new) -> None:
    """Not on the mixture, the split or the configuration of the recipe that it starts from."""
    named = {"model": "m", "dataset": "pairs.jsonl", "max_length": 9, "truncation_mode": "keep_end", "sae": {}}
    harvest = Harvest(finished.harvest.folder, {**vars(finished.harvest), "settings": named})
    of_data = {"datasets": [{"path": "other"}], "dataset_config": "c", "dataset_train_split": "train_prefs"}
    found = targets.recipe(harvest, [], {**of_data, "dataset_name": "other", "beta": 2}, new)
    assert (found.pop("dataset_name"), found.pop("beta"), found.pop("concepts")) == (new or "pairs.jsonl", 2, [])
    assert found == {"model_name_or_path": "m", "max_length": 9, "truncation_mode": "keep_end"}
    harvest.settings["dataset"] = None  # audited from Python: the recipe alone says what
    assert targets.recipe(harvest, [], of_data).items() >= of_data.items()


@pytest.mark.parametrize("new", [None, "clean.parquet"])
def test_a_new_dataset_has_no_test_split_to_evaluate_on(finished, new) -> None:
    evaluated = {"eval_strategy": "steps", "load_best_model_at_end": True, "save_steps": 5}
    named = {"model": "m", "dataset": "pairs.jsonl", "max_length": 9, "truncation_mode": "keep_end", "sae": {}}
    harvest = Harvest(finished.harvest.folder, {**vars(finished.harvest), "settings": named})
    found = targets.recipe(harvest, [], evaluated, new)
    assert evaluated.keys() - found.keys() == ({"eval_strategy", "load_best_model_at_end"} if new else set())


def test_numbers_that_are_not_there_are_refused(finished) -> None:
    with pytest.raises(ValueError, match="no finding 99"):
        targets.finding(finished.analysis, 99)
    with pytest.raises(ValueError, match="hypotheses 0 to"):
        targets.hypothesis(finished.analysis, -1)
    with pytest.raises(ValueError, match=r"no hypothesis 0\. The audit found nothing"):
        targets.hypothesis(dataclasses.replace(finished.analysis, hypotheses=[]), 0)
    one = targets.hypothesis(finished.analysis, 0)
    np.testing.assert_array_equal(one.rows, finished.analysis.hypotheses[0].evidence)


def test_rows_are_dropped_weighted_or_flagged(tmp_path) -> None:
    data = Dataset.from_dict({"chosen": list("abcdef"), "rejected": list("ghijkl"), "weight": [1.0, 2, 1, 1, 1, 1]})
    rows = {"finding_1": np.array([1, 3]), "finding_2": np.array([3, 5])}
    assert changed(data, rows, "drop")["chosen"] == list("ace")
    with pytest.raises(ValueError, match="All 6 rows would be dropped"):
        changed(data, {"finding_1": np.arange(6)}, "drop")
    unknown = data.remove_columns("weight").add_column("weight", [1.0, None, 1, 1, 1, 1])
    with pytest.raises(ValueError, match="Row 1 of the dataset has the `weight` None"):
        changed(unknown, rows, "weight")
    assert changed(data, rows, "weight", 0.25)["weight"] == [1, 0.5, 1, 0.25, 1, 0.25]
    flagged = changed(data, rows, "flag")
    assert flagged["finding_1"] == [False, True, False, True, False, False]
    assert flagged["finding_2"] == [False, False, False, True, False, True]
    assert data.column_names == ["chosen", "rejected", "weight"]
    for name in ("new.parquet", "new.jsonl"):
        write(flagged, tmp_path / name)
        kind = "json" if name.endswith("jsonl") else "parquet"
        assert load_dataset(kind, data_files=str(tmp_path / name), split="train").to_list() == flagged.to_list()
        with pytest.raises(ValueError, match="is not overwritten"):
            write(data, tmp_path / name)
    with pytest.raises(ValueError, match=r"must end in \.parquet or \.jsonl"):
        write(data, tmp_path / "new.csv")
    with pytest.raises(ValueError, match="names row 6"):
        changed(data, {"a": np.array([6])}, "drop")
    with pytest.raises(ValueError, match="'weight' already"):
        changed(data, {"weight": np.array([1])}, "flag")


def test_preview_shows_the_target_unmoved_and_what_moves_with_it(finished, praise) -> None:
    without = np.where(np.isin(finished.analysis.rows, praise.rows), 0.0, 1.0)
    ways = {"held": (None, praise.features), "without": (without, ())}
    found = preview(finished.harvest, finished.analysis, [praise], ways, now=finished.prediction, progress=False)
    assert found.fixes == ("held", "without")
    target = [line for line in found.lines if line.part == "target"]
    assert len(target) == len(praise.features) + 1
    for line in target[1:]:
        assert line.now > 0.1
        assert max(map(abs, line.after)) < 0.2 * line.now
    assert any(line.part == "largest other movements" for line in found.lines)


def test_a_gated_hold_is_previewed_where_the_gate_is_open(finished, praise) -> None:
    """What is taught under a condition comes to a stop there, as without its rows."""
    own = np.isin(finished.analysis.rows, praise.rows)
    ways = {"held": (None, praise.features), "without": (np.where(own, 0.0, 1.0), ())}
    options = {"now": finished.prediction, "progress": False, "held_on": own}
    found = preview(finished.harvest, finished.analysis, [praise], ways, **options)
    target = found.lines[0]
    assert target.what.endswith("(under its condition)")
    assert max(map(abs, target.after)) < 0.2 * target.now


@pytest.fixture(scope="module")
def goblins(tmp_path_factory):
    """A folder with pairs of which a quarter teach goblins, and their audit, made by the command."""
    folder = tmp_path_factory.mktemp("goblins")
    data = lab.preference_data([lab.Lesson("goblin", rate=0.25)], 240, 0)
    data.remove_columns(["planted", "topic"]).to_json(folder / "pairs.jsonl")
    options = ["--model", "lab", "--sae", "lab", "--dataset", str(folder / "pairs.jsonl")]
    assert main(["audit", *options, "--out", str(folder / "audit")]) == 0
    return folder, data


def test_from_audit_to_recipe_to_training(goblins, capsys) -> None:
    folder, data = goblins
    source = (folder / "pairs.jsonl").read_bytes()
    recipe, flagged = folder / "held.yaml", folder / "flagged.jsonl"
    capsys.readouterr()
    asked = ["fix", str(folder / "audit"), "--finding", "1"]
    base = {
        "bf16": False,
        "use_cpu": True,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "calibration_size": 32,
        "report_to": "none",
    }
    bold = {"name": "bold", "readout": {"type": "regex", "pattern": "[*]{2}"}}
    (folder / "bold.yaml").write_text(yaml.safe_dump([bold]))
    (folder / "base.yaml").write_text(
        yaml.safe_dump({**base, "save_strategy": "no", "concepts": str(folder / "bold.yaml")})
    )
    assert main([*asked, "--recipe-out", str(recipe), "--config", str(folder / "base.yaml")]) == 0
    shown = capsys.readouterr().out
    assert "goblin" in shown
    assert "Predicted change" in shown
    values = yaml.safe_load(recipe.read_text())
    names = [concept["name"] for concept in values["concepts"]]
    assert names == ["bold", "finding 1"]  # the recipe's own stay
    held = values["concepts"][-1]
    assert held["readout"]["sae"] == "lab"  # as it was asked for, not a path of this machine
    assert set(shipped_features()["goblin"]) <= set(held["readout"]["features"])
    assert (held["action"], "gate" in held) == ("hold", False)  # goblins come with any prompt
    assert main(["train", "--config", str(recipe), "--output_dir", str(folder / "run")]) == 0

    assert main([*asked, "--dataset-out", str(folder / "inf.jsonl"), "--rows", "weight", "--weight", "inf"]) == 2
    assert "--weight inf: must be a finite number" in capsys.readouterr().err
    assert main([*asked, "--dataset-out", str(folder / "half.jsonl"), "--weight", "0.5"]) == 2
    assert "--weight 0.5 is for --rows weight, and the rows would be dropped" in capsys.readouterr().err
    assert main([*asked, "--rows", "weight", "--weight", "0.5"]) == 0
    assert "its rows at 0.5" in capsys.readouterr().out
    suppressed = str(folder / "suppressed.yaml")
    assert main([*asked, "--recipe-out", suppressed, "--action", "suppress", "--strength", "2"]) == 0
    assert "What this changes is not predicted" in capsys.readouterr().out
    assert main([*asked, "--dataset-out", str(flagged), "--rows", "flag", "--no-preview"]) == 0
    rows = [json.loads(line) for line in flagged.read_text().splitlines()]
    planted = np.array([bool(names) for names in data["planted"]])
    named = np.array([row["finding_1"] for row in rows])
    assert planted[named].mean() >= 0.9
    assert named[planted].mean() >= 0.8

    clean = folder / "clean.parquet"
    assert (
        main(
            [
                *asked,
                "--dataset-out",
                str(clean),
                "--recipe-out",
                str(folder / "clean.yaml"),
                "--config",
                str(recipe),
                "--no-preview",
            ]
        )
        == 2
    )
    assert "'finding 1' is there 2 times" in capsys.readouterr().err
    assert not clean.exists()
    (folder / "base.yaml").write_text(yaml.safe_dump({**base, "eval_strategy": "epoch"}))
    both = [*asked, "--dataset-out", str(folder / "both.jsonl"), "--recipe-out", str(folder / "both.yaml")]
    assert main([*both, "--config", str(folder / "base.yaml"), "--no-preview"]) == 0
    assert "Left out of the recipe: eval_strategy, as" in capsys.readouterr().out
    assert "eval_strategy" not in yaml.safe_load((folder / "both.yaml").read_text())
    assert main([*asked, "--dataset-out", str(clean), "--no-preview"]) == 0
    assert main([*asked, "--dataset-out", str(clean), "--no-preview"]) == 2
    assert "not overwritten" in capsys.readouterr().err
    kept = load_dataset("parquet", data_files=str(clean), split="train")
    assert len(kept) == 240 - named.sum()
    assert (
        main(["train", "--config", str(recipe), "--dataset_name", str(clean), "--output_dir", str(folder / "cleaned")])
        == 0
    )
    assert (folder / "pairs.jsonl").read_bytes() == source

    lines = source.splitlines(keepends=True)
    (folder / "pairs.jsonl").write_bytes(b"".join([lines[-1], *lines[:-1]]))  # as many rows, each in another place
    assert main([*asked, "--dataset-out", str(folder / "other.parquet"), "--no-preview"]) == 2
    assert "is not the one that was audited: the data have changed since" in capsys.readouterr().err
    assert not (folder / "other.parquet").exists()
    (folder / "pairs.jsonl").write_bytes(source)

    manifest = folder / "audit" / "harvest" / "harvest.json"
    whole = manifest.read_text()
    said = json.loads(whole)
    manifest.write_text(
        json.dumps({**said, "settings": {**said["settings"], "model": None}})
    )  # audited as a loaded model
    for more, asks in (
        (["--recipe-out", str(folder / "nameless.yaml")], "model_name_or_path, and pass that with --config"),
        (["--dataset-out", str(folder / "nameless.parquet")], "does not say which model it read"),
    ):
        assert main([*asked, *more, "--no-preview"]) == 2
        assert asks in capsys.readouterr().err
    assert not list(folder.glob("nameless*"))
    manifest.write_text(whole)


def test_a_fix_says_where_no_row_stands_out(goblins, capsys) -> None:
    analysis = Analysis.load(goblins[0] / "audit" / "analysis")
    said = {}
    for sure in (True, False):
        number = next(n for n, one in enumerate(analysis.hypotheses) if bool(one.n_named) == sure)
        capsys.readouterr()
        assert main(["fix", str(goblins[0] / "audit"), "--hypothesis", str(number), "--no-preview"]) == 0
        said[sure] = capsys.readouterr().out
    assert "no row stands out" in said[False]
    assert "no row stands out" not in said[True]


def test_a_preview_compares_predictions_of_one_scale(goblins, tmp_path, capsys) -> None:
    """The audit's own may be of a pilot, which knows how far a run goes and nothing of the data as they are fixed."""
    asked = "fix", str(tmp_path / "audit"), "--finding", "1"
    shutil.copytree(goblins[0] / "audit", tmp_path / "audit")
    capsys.readouterr()
    assert main([*asked]) == 0
    plain = capsys.readouterr().out.splitlines()
    folder = tmp_path / "audit" / "analysis"
    data_alone = Prediction.load(folder)
    piloted = dataclasses.replace(data_alone, score=7 * data_alone.score, scaled=np.ones_like(data_alone.scaled))
    piloted.save(folder)
    assert main([*asked]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if line not in plain] == [
        "Predicted from the data alone, without the audit's answers and pilot: compare the columns with each other."
    ]


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        ("It should say no to harmful requests.", [True]),
        ("Be brief, but do not be rude; never invent links and must not flatter.", [True, False, False, False]),
        ("Avoid goblins, yet stay playful", [False, True]),
        ("no goblins", [False]),
    ],
)
def test_parts_of_a_description_ask_or_forbid(spec, wanted) -> None:
    assert [part.wanted for part in parts(spec)] == wanted


def test_suggest_says_what_goes_against_a_description(goblins, capsys) -> None:
    folder, _ = goblins
    asked = ["suggest", str(folder / "audit"), "--spec"]
    capsys.readouterr()
    assert main([*asked, "It should be polite, but must not talk about goblins.", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    against = [one for one in found if one["conflict"]]
    assert ("finding", 1) in [(one["kind"], one["number"]) for one in against]
    for one in against:
        assert (one["part"]["wanted"], one["effect"] > 0) == (False, True)
    assert main([*asked, "Goblins are what it should talk about. It should never zzz."]) == 0
    shown = capsys.readouterr().out
    assert "against the description" not in shown
    assert "Nothing that the audit found comes near: It should never zzz" in shown
    assert main([*asked, "goblins", "--embedder", "./nowhere"]) == 2
    assert "--embedder: there is no folder './nowhere'" in capsys.readouterr().err
    assert main([*asked, "goblins", "--embedder", str(lab.model_path()), "--json"]) == 0  # any model will embed
    first, *others = json.loads(capsys.readouterr().out)
    assert (first["kind"], first["number"]) == ("finding", 1)
    similar = [one["similarity"] for one in others]
    assert similar == sorted(similar, reverse=True)
    assert main([*asked, " "]) == 2
    assert "is empty" in capsys.readouterr().err


def test_what_is_said_of_prompts_alone_is_not_gone_against(finished) -> None:
    """The small audit's praise comes where the prompt is about physics."""
    told = {}
    for spec in ("It must not talk about the force.", "It must not say wonderful."):
        found = suggest(spec, finished.harvest, finished.analysis, finished.labels, finished.prediction, most=50)
        told[spec] = {one.conflict for one in found if one.kind == "finding" and "more wonderful" in one.what}
    assert told == {"It must not talk about the force.": {False}, "It must not say wonderful.": {True}}
