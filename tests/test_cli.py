"""The command line: answers fast, trains from a recipe, and says what is wrong with its input."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from shapedpo import cli
from shapedpo.errors import UserError
from shapedpo.scripts.recipe import read_recipe
from shapedpo.sources import concepts_from, lab_preferences, load_preferences, local_source, model_source


REPO = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "trl", "sae_lens", "datasets", "numpy", "wandb")
LINKS = {"name": "links", "readout": {"type": "regex", "pattern": "https?://"}, "action": "suppress", "strength": 1.0}


def command_line(*args: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m shapedpo` as a user does, in a process of its own."""
    return subprocess.run([sys.executable, "-m", "shapedpo", *args], capture_output=True, text=True, timeout=120)


def run(*args: object) -> int:
    """Run the command line in this process, which has imported everything already."""
    return cli.main([str(arg) for arg in args])


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe of the lab, two small steps, with changes; gives its path."""

    def write(**changes: object) -> Path:
        values = {
            "model_name_or_path": "lab",
            "dataset_name": "lab:goblin_world?n=40",
            "concepts": [LINKS],
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "max_length": 160,
            "calibration_size": 16,
            "learning_rate": 1e-4,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "logging_steps": 1,
            "report_to": "none",
            "disable_tqdm": True,
            "output_dir": str(tmp_path / "out"),
            **changes,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
        return path

    return write


# --- help ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [[], ["train"], ["demo"], ["concepts"], ["concepts", "show"], ["sae"], ["sae", "train"], ["wandb-report"]],
    ids=" ".join,
)
def test_help_answers_at_once(command):
    start = time.perf_counter()
    done = command_line(*command, "--help")
    assert done.returncode == 0
    assert "usage: shapedpo" in done.stdout
    assert time.perf_counter() - start < 3


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom shapedpo import cli\n"
        "try: cli.main(['train', '--help'])\nexcept SystemExit: pass\n"
        f"print('loaded:', [name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "loaded: []"


def test_help_all_lists_every_key(capsys):
    assert run("train", "--help-all") == 0
    printed = capsys.readouterr().out
    for key in ("--loss_type", "--concepts", "--lora_r", "--dataset_name", "--calibration_size"):
        assert key in printed


def test_version():
    import shapedpo

    assert command_line("--version").stdout == f"shapedpo {shapedpo.__version__}\n"


@pytest.mark.parametrize(
    ("words", "usage", "text"),
    [
        (["demo", "--output", "x"], "shapedpo demo", "unknown argument '--output'."),
        (["fix", "x", "--reciep-out=a.yaml"], "shapedpo fix", "'--reciep-out'. Did you mean '--recipe-out'?"),
        (["concepts", "show", "x", "--laod"], "shapedpo concepts show", "'--laod'. Did you mean '--load'?"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_unknown_argument(words, usage, text, capsys):
    with pytest.raises(SystemExit) as error:
        run(*words)
    assert error.value.code == 2
    said = capsys.readouterr().err
    assert f"usage: {usage} " in said
    assert text in said


def documented() -> list[tuple[str, str]]:
    """Every line of README, docs, recipes and help texts that calls `shapedpo`, with the file it stands in."""
    texts = {str(path.relative_to(REPO)): path.read_text() for path in (REPO / "README.md", *REPO.glob("docs/*.md"))}
    texts |= {path.name: path.read_text() for path in REPO.glob("recipes/*") if path.suffix in (".md", ".yaml")}
    texts |= {f"{path.name} --help": path.read_text() for path in REPO.glob("shapedpo/scripts/*.py")}
    texts["cli.py --help"] = cli.TRAIN_HELP
    return [
        (where, line)
        for where, text in texts.items()
        for line in re.findall(r"^(?:# +|  )?shapedpo (.+)$", re.sub(r"\\\n(# +)?", "", text), flags=re.MULTILINE)
    ]


def test_documented_commands_are_known():
    found, parser = documented(), cli.build_parser()
    assert len({shlex.split(line)[0] for _, line in found}) > 8
    for where, line in found:
        words = shlex.split(line, comments=True)
        try:
            _, rest = parser.parse_known_args(words)
        except SystemExit:
            pytest.fail(f"{where}: shapedpo {line}")
        keys = words[0] in ("train", "fit", "sae") or words[:2] == ["concepts", "find"]
        assert keys or not rest, f"{where}: shapedpo {line}"


# --- training ------------------------------------------------------------------------------------------------------------


def state(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "trainer_state.json").read_text())


def test_train_with_override_then_resume(recipe, tmp_path, capsys):
    """The command line beats the recipe; `resume_from_checkpoint true` goes on from the last checkpoint."""
    path = recipe(lr_scheduler_type="constant", save_steps=1)  # a resumed scheduler keeps its learning rate
    assert run("train", "--config", path, "--learning_rate", "3e-5", "--beta=0.2") == 0
    out = tmp_path / "out"
    assert f"Model saved to {out}" in capsys.readouterr().out
    assert (out / "model.safetensors").is_file()
    first = state(out / "checkpoint-2")
    assert [entry["learning_rate"] for entry in first["log_history"]] == [3e-5, 3e-5]
    assert "concepts/links/delta" in first["log_history"][0]

    assert run("train", "--config", path, "--max_steps", "3", "--resume_from_checkpoint", "true") == 0
    second = state(out / "checkpoint-3")
    assert second["log_history"][:2] == first["log_history"]
    assert second["global_step"] == 3


def test_train_lora_with_evaluation(recipe, tmp_path):
    path = recipe(use_peft=True, lora_r=4, eval_strategy="steps", eval_steps=2, save_steps=2)
    assert run("train", "--config", path) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert any("eval_loss" in entry for entry in state(tmp_path / "out" / "checkpoint-2")["log_history"])


@pytest.mark.parametrize("form", ["file", "json", "none"])
def test_concepts_on_the_command_line(form, recipe, tmp_path):
    from shapedpo.scripts.train import parse

    file = tmp_path / "concepts.yaml"
    file.write_text(yaml.safe_dump({"concepts": [{**LINKS, "name": "other"}]}))
    given = {"file": str(file), "json": json.dumps([{**LINKS, "name": "other"}]), "none": "none"}[form]
    _, args, _, _ = parse(read_recipe(recipe()), ["--concepts", given])
    assert [concept.name for concept in args.concepts or []] == ([] if form == "none" else ["other"])


def test_recipe_names_a_file_of_concepts(recipe, tmp_path):
    file = tmp_path / "concepts.yaml"
    file.write_text(yaml.safe_dump([LINKS]))
    from shapedpo.scripts.train import parse

    _, args, _, _ = parse(read_recipe(recipe(concepts=str(file))), [])
    assert args.concepts[0].to_dict() == concepts_from([LINKS])[0].to_dict()


def test_environment_is_set_before_imports_and_deepspeed_is_not_needed(tmp_path):
    """`env` reaches what reads the environment when it is imported, the hub client for one. And none of it needs deepspeed, an extra."""
    path = tmp_path / "recipe.yaml"
    path.write_text("env: {HF_HUB_OFFLINE: 0, HF_HOME: %s}\nmodel_name_or_path: ./nowhere\n" % (tmp_path / "home"))
    code = (
        "import sys\nsys.modules['deepspeed'] = None\n"
        "import shapedpo\nfrom shapedpo import cli\n"
        f"assert cli.main(['train', '--config', {str(path)!r}, '--bf16', 'false', '--use_cpu']) == 2\n"
        "from huggingface_hub import constants\nprint(constants.HF_HUB_OFFLINE, constants.HF_HOME)\n"
        "print(shapedpo.ShapedDPOTrainer.__name__, shapedpo.ShapedDPOConfig.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-2:] == [f"False {tmp_path / 'home'}", "ShapedDPOTrainer ShapedDPOConfig"], (
        done.stderr
    )


# --- what is wrong with the input ------------------------------------------------------------------------------------------


BAD_RECIPES = {
    "unclosed list": ("beta: 0.1\nloss_type: [sigmoid\nseed: 1\n", ["line 3, column 5", "not valid YAML"]),
    "tab": ("beta: 0.1\nconcepts:\n\t- name: x\n", ["line 3, column 1", "not valid YAML"]),
    "unknown key": ("beta: 0.1\nlearning_rat: 1.0e-5\n", ["line 2", "'learning_rat'", "'learning_rate'"]),
    "key twice": ("beta: 0.1\nseed: 1\nbeta: 0.2\n", ["line 3", "'beta'", "line 1"]),
    "no concept": ("beta: 0.1\nconcepts: []\n", ["line 2", "`concepts` is empty"]),
    "concepts without a value": ("beta: 0.1\nconcepts:\n", ["line 2", "`concepts` is empty"]),
    "a list": ("- beta: 0.1\n", ["must be a mapping", "a list"]),
    "nothing": ("# only a comment\n", ["must be a mapping", "nothing"]),
    "env": ("env: [A]\n", ["line 1", "`env` must be a mapping"]),
    "concept's field": (
        "concepts: [{name: x, readout: {type: regex, pattern: a}, strenght: 1}]",
        ["'x'", "'strenght'"],
    ),
    "action": (
        "concepts: [{name: x, readout: {type: regex, pattern: a}, action: hide}]",
        ["'x'", "'hide'", "suppress"],
    ),
    "file of concepts": ("concepts: nowhere.yaml\n", ["'nowhere.yaml'"]),
    "trait": ("concepts: [{name: x, readout: {type: lab, trait: goblins}}]", ["goblins"]),
}


@pytest.mark.parametrize("case", BAD_RECIPES)
def test_bad_recipe(case, tmp_path, capsys):
    text, expected = BAD_RECIPES[case]
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert run("train", "--config", path) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("shapedpo: error: ")
    for part in expected:
        assert part in printed


def test_bad_recipe_leaves_no_traceback(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("beta: [0.1\n")
    done = command_line("train", "--config", str(path))
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        f"shapedpo: error: {path}, line 2, column 1: not valid YAML: expected ',' or ']', but got '<stream end>'."
    ]


def test_traceback_on_request(tmp_path, monkeypatch):
    monkeypatch.setenv("SHAPEDPO_TRACEBACK", "1")
    with pytest.raises(UserError, match="There is no file"):
        run("train", "--config", tmp_path / "nowhere.yaml")


def test_an_interrupt_ends_without_a_traceback(monkeypatch, capsys):
    def interrupted(args: object) -> None:
        raise KeyboardInterrupt  # no signal: a process that was started in the background may have been told to ignore it

    monkeypatch.setattr("shapedpo.scripts.suggest.main", interrupted)
    assert run("suggest", "audit", "--spec", "a") == 130
    assert capsys.readouterr().err == "shapedpo: interrupted\n"


def test_a_file_that_cannot_be_written_is_named(recipe, monkeypatch, capsys):
    """What the system refuses is said; a library's error that only calls itself one of the system's keeps its traceback."""
    monkeypatch.setattr("shapedpo.scripts.suggest.main", lambda args: Path("/dev/null/x").write_text(""))
    assert run("suggest", "audit", "--spec", "a") == 2
    assert capsys.readouterr().err.startswith("shapedpo: error: [Errno 20] Not a directory: '/dev/null/x'\n")

    def fails(args: object) -> None:
        raise OSError("a library's")

    monkeypatch.setattr("shapedpo.scripts.suggest.main", fails)
    with pytest.raises(OSError, match="a library's"):
        run("suggest", "audit", "--spec", "a")


BAD_ARGUMENTS = {
    "unknown": (["--learning_rat", "1"], ["'--learning_rat'", "'--learning_rate'"]),
    "model": (["--model_name_or_path", "./nowhere"], ["model_name_or_path", "'./nowhere'"]),
    "no such model": (["--model_name_or_path", "nobody/nothing"], ["couldn't connect"]),
    "no such file": (["--dataset_name", "nowhere.jsonl"], ["'nowhere.jsonl'"]),
    "no such world": (["--dataset_name", "lab:gobin_world"], ["'gobin_world'", "'goblin_world'"]),
    "world's argument": (["--dataset_name", "lab:goblin_world?m=3"], ["lab:goblin_world?m=3", "'m'"]),
    "split": (["--dataset_train_split", "valid"], ["dataset_train_split", "'valid'", "train, test"]),
    "no checkpoint": (["--resume_from_checkpoint", "true"], ["no checkpoint in output_dir"]),
    "checkpoint": (["--resume_from_checkpoint", "./nowhere"], ["resume_from_checkpoint", "'./nowhere'"]),
    "stray": (["recipe.yaml"], ["unexpected 'recipe.yaml'", "--config"]),
    "aot": (["--loss_type", "aot", "--concepts", json.dumps([{**LINKS, "method": "reweight"}])], ["links", "aot"]),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_argument(case, recipe, capsys):
    overrides, expected = BAD_ARGUMENTS[case]
    assert run("train", "--config", recipe(), *overrides) == 2
    printed = capsys.readouterr().err
    assert "shapedpo: error: " in printed
    for part in expected:
        assert part in printed


def test_bad_value_on_the_command_line(recipe, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("train", "--config", recipe(), "--max_steps", "many")
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert "--max_steps" in printed
    assert len(printed.splitlines()) == 2  # and not the usage of all keys


def test_nothing_to_train(capsys):
    assert run("train") == 2
    assert "There is nothing to train" in capsys.readouterr().err


# --- data ------------------------------------------------------------------------------------------------------------------


ROWS = [{"prompt": f"Question {i}?", "chosen": f" Yes, {i}.", "rejected": f" No, {i}."} for i in range(8)]


@pytest.fixture(params=["json", "jsonl", "jsonl.gz", "parquet", "csv", "saved dataset", "saved splits", "folder"])
def source(request, tmp_path):
    """The rows of ROWS, in each form that a recipe can name."""
    from datasets import Dataset, DatasetDict, load_from_disk

    data, path = Dataset.from_list(ROWS), tmp_path / f"data.{request.param}"
    if request.param == "json":
        path.write_text(json.dumps(ROWS))
    elif request.param.startswith("jsonl"):
        data.to_json(path, compression="gzip" if path.suffix == ".gz" else None)
    elif request.param == "parquet":
        data.to_parquet(path)
    elif request.param == "csv":
        data.to_csv(path)
    elif request.param == "saved dataset":
        data.save_to_disk(path)
        load_from_disk(path).map(lambda row: {"chosen": row["rejected"]})  # leaves a cache in the folder
        assert list(path.glob("cache-*.arrow"))
    elif request.param == "saved splits":
        DatasetDict(train=data, test=data.select([0])).save_to_disk(path)
    else:
        path.mkdir()
        data.to_json(path / "train.jsonl")
    return str(path)


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
def test_local_data(source, streaming):
    from trl import DatasetMixtureConfig, ScriptArguments

    script = ScriptArguments(dataset_name=source, dataset_streaming=streaming)
    splits = load_preferences(script, DatasetMixtureConfig())
    assert list(splits["train"]) == ROWS
    assert list(splits) == (["train", "test"] if source.endswith("splits") else ["train"])


def test_mixture_of_local_data(tmp_path):
    from datasets import Dataset
    from trl import DatasetMixtureConfig, ScriptArguments

    Dataset.from_list(ROWS[:5]).save_to_disk(tmp_path / "saved")
    Dataset.from_list(ROWS[5:]).to_json(tmp_path / "rest.jsonl")
    parts = [{"path": str(tmp_path / "saved")}, {"path": str(tmp_path / "rest.jsonl")}]
    assert list(load_preferences(ScriptArguments(), DatasetMixtureConfig(datasets=parts))["train"]) == ROWS
    parts = [{"path": str(tmp_path / "saved"), "split": "test"}]
    with pytest.raises(UserError, match="no split 'test'"):
        load_preferences(ScriptArguments(), DatasetMixtureConfig(datasets=parts))


def test_hub_name_is_left_to_the_hub():
    assert local_source("trl-lib/ultrafeedback_binarized") is None
    assert model_source("meta-llama/Llama-3.1-8B") == "meta-llama/Llama-3.1-8B"


@pytest.mark.parametrize("name", ["./here", "/nowhere/data", "~/nowhere-at-all", "data/pairs.jsonl", "pairs.parquet"])
def test_missing_path_is_said_at_once(name):
    start = time.perf_counter()
    with pytest.raises(UserError, match="There is no file or folder"):
        local_source(name)
    assert time.perf_counter() - start < 1


def test_file_of_unknown_kind(tmp_path):
    (tmp_path / "pairs.xml").write_text("<pairs/>")
    with pytest.raises(UserError, match=r"ending in \.json"):
        local_source(str(tmp_path / "pairs.xml"))


def test_world_takes_arguments():
    splits = lab_preferences("goblin_world?n=30&seed=3")
    assert (len(splits["train"]), len(splits["test"])) == (30, 3)
    assert splits["train"].to_list() == lab_preferences("goblin_world?n=30&seed=3")["train"].to_list()
    assert splits["train"].to_list() != lab_preferences("goblin_world?n=30&seed=4")["train"].to_list()


# --- concepts --------------------------------------------------------------------------------------------------------------


def test_concepts_show(tmp_path, capsys):
    path = tmp_path / "concepts.yaml"
    goblin = {"name": "goblin", "readout": {"type": "lab", "trait": "goblin"}}
    gated = {**LINKS, "gate": {"concept": "goblin", "threshold": 1.5}}
    path.write_text(yaml.safe_dump({"concepts": [goblin, gated]}))
    assert run("concepts", "show", path, "--load") == 0
    printed = " ".join(capsys.readouterr().out.split())
    for part in ("goblin", "watch", "links", "suppress", "reward"):
        assert part in printed


def test_concepts_show_finds_what_only_the_weights_tell(tmp_path, capsys):
    from shapedpo import lab

    path = tmp_path / "concepts.yaml"
    readout = {"type": "sae_features", "sae": str(lab.sae_path()), "features": [10**6]}
    path.write_text(yaml.safe_dump([{"name": "goblin", "readout": readout}]))
    assert run("concepts", "show", path) == 0
    assert run("concepts", "show", path, "--load") == 2
    printed = capsys.readouterr().err
    assert "Concept 'goblin'" in printed
    assert "1000000" in printed
