"""Checkpoints: what they hold of the concepts, and how a run goes on from them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl import DPOTrainer

from shapedpo import Concept, Direction, Gate, Mask, Regex, SAEFeatures, ShapedDPOConfig, ShapedDPOTrainer
from shapedpo.checkpoints import SEAL, last_whole_checkpoint, what_is_missing
from tests.helpers import (
    RUN_DEPENDENT,
    Forwards,
    Run,
    arguments,
    assert_same_tensors,
    build,
    pairs,
    sae_path,
    shaped,
    train,
    vector,
    watching,
)


FILE = "concepts.safetensors"
COLUMNS = {"weight": [1.0, 0.5, 2.0] * 8, "creative": [True, False] * 12}


def shaping() -> list[Concept]:
    """Every method at once, on every kind of readout, gated by a column and by a concept."""
    return [
        Concept("way", Direction(vector(), layer=1)),
        Concept("goblin", Regex("goblin"), "suppress", strength=1.0, gate=Gate(column="creative")),
        Concept("features", SAEFeatures(str(sae_path()), [3, 17]), "amplify", "reweight", 0.7, Gate(concept="way")),
        Concept("dog", Regex("dog"), "suppress", Mask(fraction=0.3)),
        Concept("cat", Regex("cat"), "suppress", "project"),
    ]


def settings(path: Path, **fields: Any) -> dict[str, Any]:
    return {"output_dir": str(path), "save_strategy": "steps", "save_steps": 2, "max_steps": 4, **fields}


def run(path: Path, concepts: list[Concept], resume: Any = None, peft: bool = False, **fields: Any) -> Run:
    options = {"train_dataset": pairs(**COLUMNS)}
    if peft:
        options["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.2)
    args = arguments(concepts=concepts or None, **settings(path, **fields))
    return train(build(ShapedDPOTrainer, args, **options), resume_from_checkpoint=resume)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, Run]:
    """A run of four steps, and its folder with checkpoints at two and at four."""
    path = tmp_path_factory.mktemp("whole")
    return path, run(path, shaping())


def copy_of_step_2(whole: tuple[Path, Run], path: Path) -> Path:
    """The state in which a run of four steps was cut off after two."""
    shutil.copytree(whole[0] / "checkpoint-2", path / "checkpoint-2")
    return path / "checkpoint-2"


def assert_continues(whole: Run, resumed: Run) -> None:
    """Steps 3 and 4 of a resumed run are those of the whole one, to the last bit."""
    assert_same_tensors(whole.gradients[2:], resumed.gradients)
    assert_same_tensors([whole.parameters], [resumed.parameters])
    assert [entry["step"] for entry in resumed.steps] == [1, 2, 3, 4]  # the log comes with the checkpoint
    for one, other in zip(whole.steps, resumed.steps, strict=True):
        for name in one:
            # TRL counts tokens anew.
            if name != "num_tokens" and not any(part in name for part in RUN_DEPENDENT):
                assert one[name] == other[name], f"{name} at step {one['step']}"


class TestContents:
    def test_calibration_and_concepts(self, whole):
        path, whole_run = whole
        for folder in (path / "checkpoint-2", path / "checkpoint-4"):
            tensors = load_file(folder / FILE)
            assert tensors["mean"].shape == tensors["std"].shape == (1 + 1 + 2 + 1 + 1,)
            assert tensors["prompt_mean"].shape == tensors["prompt_std"].shape == (1,)
            assert tensors["deltas"].shape == tensors["gates"].shape == (24, 5)
            assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
            with safe_open(folder / FILE, framework="pt") as file:
                metadata = file.metadata()
            assert json.loads(metadata["concepts"]) == [concept.to_dict() for concept in shaping()]
        assert not list(path.rglob("*.partial"))
        whole_run.trainer.save_model(str(path / "final"))
        assert_same_tensors([load_file(path / "final" / FILE)], [tensors])

    def test_no_concepts_no_file(self, tmp_path):
        run(tmp_path, [])
        assert (tmp_path / "checkpoint-4").is_dir()
        assert not list(tmp_path.rglob(FILE))

    @pytest.mark.parametrize("peft", [False, True])
    def test_the_model_is_plain(self, tmp_path, peft):
        """Plain transformers loads it, and nothing of the SAE or the directions is in it."""
        trainer = run(tmp_path, shaping(), peft=peft, max_steps=2).trainer
        trainer.save_model(str(tmp_path / "final"))
        for folder in (tmp_path / "checkpoint-2", tmp_path / "final"):
            model = AutoModelForCausalLM.from_pretrained(folder)
            weights = load_file(folder / ("adapter_model.safetensors" if peft else "model.safetensors"))
            if not peft:
                assert_same_tensors([dict(trainer.model.named_parameters())], [dict(model.named_parameters())])
                assert {name.split(".")[0] for name in weights} <= {"model", "lm_head"}
            assert not [name for name in weights if "sae" in name.lower() or "concept" in name.lower()]
            parameters = [p for p in trainer.model.parameters() if p.requires_grad]
            assert sum(tensor.numel() for tensor in weights.values()) <= sum(p.numel() for p in parameters)

    def test_the_settings_can_be_read_back(self, whole):
        args = torch.load(whole[0] / "checkpoint-4" / "training_args.bin", weights_only=False)
        assert isinstance(args, ShapedDPOConfig)
        assert args.concepts == [concept.to_dict() for concept in shaping()]


class TestResume:
    @pytest.mark.parametrize("how", [True, "path"])
    def test_as_if_never_stopped(self, whole, tmp_path, how):
        checkpoint = copy_of_step_2(whole, tmp_path)
        assert_continues(whole[1], run(tmp_path, shaping(), resume=str(checkpoint) if how == "path" else how))

    @pytest.mark.parametrize("fields", [{"precompute_ref_log_probs": True}, {"gradient_accumulation_steps": 2}])
    @pytest.mark.parametrize("peft", [False, True])
    def test_other_settings(self, tmp_path, fields, peft):
        fields = {"disable_dropout": False, **fields}
        whole = tmp_path / "whole", run(tmp_path / "whole", shaping(), peft=peft, **fields)
        copy_of_step_2(whole, tmp_path / "cut")
        assert_continues(whole[1], run(tmp_path / "cut", shaping(), resume=True, peft=peft, **fields))

    def test_calibration_is_taken_over(self, whole, tmp_path):
        checkpoint = copy_of_step_2(whole, tmp_path)
        concepts = shaping()
        trainer = shaped(*concepts, data=pairs(**COLUMNS), **settings(tmp_path))
        with Forwards(trainer.ref_model) as reference:
            trainer.train(resume_from_checkpoint=str(checkpoint))
        assert len(reference) == 2
        assert_same_tensors(
            [load_file(whole[0] / "checkpoint-2" / FILE)], [load_file(tmp_path / "checkpoint-4" / FILE)]
        )

    def test_other_data_do_not_change_what_scores_mean(self, whole, tmp_path):
        """The checkpoint's calibration counts, and not the new data's."""
        checkpoint = copy_of_step_2(whole, tmp_path)
        data = pairs(seed=9, **COLUMNS)
        trainer = shaped(*shaping(), data=data, **settings(tmp_path))
        trainer.train(resume_from_checkpoint=str(checkpoint))
        assert_same_tensors([load_file(checkpoint / FILE)], [load_file(tmp_path / "checkpoint-4" / FILE)])

    def test_empty_pairs_go_on_counting(self, tmp_path):
        """They are counted since the run's start."""
        empty = {"prompt": "", "chosen": "apple", "rejected": ""}
        data = Dataset.from_list([row if index % 3 else empty for index, row in enumerate(pairs(24))])

        def go(path: Path, resume: bool = False) -> Run:
            return train(shaped(*watching(), data=data, **settings(path)), resume_from_checkpoint=resume)

        whole = tmp_path / "whole", go(tmp_path / "whole")
        assert whole[1].metric("concepts/empty_pairs")[1] > 0
        copy_of_step_2(whole, tmp_path / "cut")
        assert_continues(whole[1], go(tmp_path / "cut", resume=True))


def holding() -> list[Concept]:
    """Two held concepts, one of them gated, beside one that is suppressed."""
    return [
        Concept("way", Direction(vector(), layer=1), "hold"),
        Concept("goblin", Regex("goblin"), "suppress", strength=1.0),
        Concept("dog", Regex("dog"), "hold", gate=Gate(column="creative"), target=0.2),
    ]


class TestHold:
    @pytest.mark.parametrize("fields", [{}, {"gradient_accumulation_steps": 2}])
    def test_as_if_never_stopped(self, tmp_path, fields):
        whole = tmp_path / "whole", run(tmp_path / "whole", holding(), **fields)
        assert len(set(whole[1].metric("concepts/way/strength"))) == 4  # the controller moves it
        copy_of_step_2(whole, tmp_path / "cut")
        assert_continues(whole[1], run(tmp_path / "cut", holding(), resume=True, **fields))
        one, other = (load_file(tmp_path / name / "checkpoint-4" / FILE) for name in ("whole", "cut"))
        assert_same_tensors([one], [other])
        assert {"hold.log_ratios", "hold.deltas", "hold.strengths", "hold.bias"} < one.keys()
        assert one["hold.deltas"].shape[1] == 2

    def test_saved_before_the_first_step(self, tmp_path):
        trainer = build(ShapedDPOTrainer, arguments(concepts=holding()), train_dataset=pairs(**COLUMNS))
        trainer.evaluate(pairs(4))
        trainer.save_model(str(tmp_path))
        assert load_file(tmp_path / FILE)["hold.margins"].count_nonzero() == 0

    def test_without_its_state_it_starts_anew(self, tmp_path):
        """From a checkpoint with other concepts, where that is allowed."""
        whole = tmp_path / "whole", run(tmp_path / "whole", holding())
        copy_of_step_2(whole, tmp_path / "cut")
        resumed = run(tmp_path / "cut", holding()[:2], resume=True, allow_concept_change=True)
        assert resumed.trainer._shaping.hold.strengths.shape == (1,)
        assert resumed.trainer.state.global_step == 4


def cut(path: Path) -> None:
    """The file as a full disk or a broken copy leaves it."""
    path.write_bytes(path.read_bytes()[:-7])


DAMAGES = {
    f"it has no {SEAL}": lambda folder: (folder / SEAL).unlink(),  # killed while it saved
    "model.safetensors has": lambda folder: cut(folder / "model.safetensors"),
    "concepts.safetensors has": lambda folder: cut(folder / FILE),
    "optimizer.pt is not there": lambda folder: (folder / "optimizer.pt").unlink(),
    "trainer_state.json is not there": lambda folder: (folder / "trainer_state.json").unlink(),
    f"its {SEAL} cannot be read": lambda folder: cut(folder / SEAL),
}


class TestHalfWritten:
    @pytest.mark.parametrize("damage", DAMAGES)
    def test_is_passed_over(self, whole, tmp_path, caplog, damage):
        for step in (2, 4):
            shutil.copytree(whole[0] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
        DAMAGES[damage](tmp_path / "checkpoint-4")
        assert_continues(whole[1], run(tmp_path, shaping(), resume=True))
        assert f"checkpoint-4' is passed over, as it is not whole: {damage}" in caplog.text
        assert what_is_missing(tmp_path / "checkpoint-4") is None  # written anew

    @pytest.mark.parametrize("damage", DAMAGES)
    def test_is_refused_by_name(self, whole, tmp_path, damage):
        checkpoint = copy_of_step_2(whole, tmp_path)
        DAMAGES[damage](checkpoint)
        trainer = shaped(*shaping(), data=pairs(**COLUMNS), **settings(tmp_path))
        with pytest.raises(ValueError, match="checkpoint-2' is not whole") as error:
            trainer.train(resume_from_checkpoint=str(checkpoint))
        assert damage in str(error.value)
        with pytest.raises(ValueError, match=r"No checkpoint in .* is whole"):
            trainer.train(resume_from_checkpoint=True)
        with pytest.raises(ValueError, match="there is no such folder"):
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))

    def test_of_plain_dpo(self, tmp_path):
        """It says nothing of its files; they do themselves."""
        train(build(DPOTrainer, arguments(False, **settings(tmp_path, save_steps=1, max_steps=5))))
        folders = [tmp_path / f"checkpoint-{step}" for step in range(1, 6)]
        assert [what_is_missing(folder) for folder in folders] == [None] * 5
        cut(folders[1] / "model.safetensors")
        cut(folders[2] / "optimizer.pt")
        cut(folders[3] / "trainer_state.json")
        (folders[4] / "trainer_state.json").unlink()
        assert [what_is_missing(folder) for folder in folders] == [
            None,
            "model.safetensors is cut short",
            "optimizer.pt is cut short",
            "trainer_state.json is cut short",
            "it has no trainer_state.json",
        ]
        assert last_whole_checkpoint(tmp_path) == str(folders[0])

    def test_the_last_one_goes_when_the_next_is_whole(self, tmp_path):
        """Killed while it saves with `save_total_limit=1`, a run has the checkpoint before."""
        fields = settings(tmp_path, save_total_limit=1)
        trainer = shaped(*shaping(), data=pairs(**COLUMNS), **fields)
        save = trainer._save_rng_state  # the last part of a checkpoint but for the trainer's state

        def killed(folder: str) -> None:
            if folder.endswith("checkpoint-4"):
                raise KeyboardInterrupt
            save(folder)

        trainer._save_rng_state = killed
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
        assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
        resumed = run(tmp_path, shaping(), resume=True, save_total_limit=1)
        assert resumed.trainer.state.global_step == 4
        assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
        assert what_is_missing(tmp_path / "checkpoint-4") is None
        args = torch.load(tmp_path / "checkpoint-4" / "training_args.bin", weights_only=False)
        assert args.save_total_limit == resumed.trainer.args.save_total_limit == 1

    def test_is_not_pushed(self, tmp_path, monkeypatch):
        """What goes to the hub as a checkpoint can be resumed from."""
        pushed = []

        def push(trainer: Any, folder: str) -> None:
            pushed.append((Path(folder).name, what_is_missing(folder), (Path(folder) / SEAL).is_file()))

        monkeypatch.setattr(DPOTrainer, "_push_from_checkpoint", push)
        trainer = shaped(*watching(), **settings(tmp_path))
        trainer.args.push_to_hub = True  # not before: it would look for the hub
        trainer.train()
        assert pushed == [("checkpoint-2", None, True), ("checkpoint-4", None, True)]

    def test_a_finished_run_makes_no_further_step(self, whole, tmp_path):
        shutil.copytree(whole[0] / "checkpoint-4", tmp_path / "checkpoint-4")
        resumed = run(tmp_path, shaping(), resume=True)
        assert resumed.trainer.state.global_step == 4
        assert not resumed.gradients
        assert_same_tensors([whole[1].parameters], [resumed.parameters])


CHANGES = {
    "strength of 'goblin' was 1.0 and is 3.0": lambda concepts: [
        concepts[0],
        Concept("goblin", Regex("goblin"), "suppress", strength=3.0, gate=Gate(column="creative")),
        *concepts[2:],
    ],
    "'cat' is gone": lambda concepts: concepts[:-1],
    "'lemon' is new": lambda concepts: [*concepts, Concept("lemon", Regex("lemon"))],
    "readout of 'way' was": lambda concepts: [Concept("way", Direction(vector(5), layer=1)), *concepts[1:]],
    "method of 'dog' was": lambda concepts: [
        *concepts[:3],
        Concept("dog", Regex("dog"), "suppress", Mask(fraction=0.4)),
        concepts[4],
    ],
    "gate of 'goblin' was": lambda concepts: [
        concepts[0],
        Concept("goblin", Regex("goblin"), "suppress", strength=1.0),
        *concepts[2:],
    ],
    "action of 'goblin' was 'suppress' and is 'hold'": lambda concepts: [
        concepts[0],
        Concept("goblin", Regex("goblin"), "hold", gate=Gate(column="creative")),
        *concepts[2:],
    ],
    "action of 'cat' was 'suppress' and is 'watch'": lambda concepts: [*concepts[:4], Concept("cat", Regex("cat"))],
}


class TestChangedConcepts:
    @pytest.mark.parametrize("change", CHANGES)
    def test_is_refused(self, whole, tmp_path, change):
        checkpoint = copy_of_step_2(whole, tmp_path)
        trainer = shaped(*CHANGES[change](shaping()), data=pairs(**COLUMNS), **settings(tmp_path))
        with pytest.raises(ValueError, match="concepts are not those of the checkpoint") as error:
            trainer.train(resume_from_checkpoint=str(checkpoint))
        assert change in str(error.value)
        assert "allow_concept_change=True" in str(error.value)
        assert "checkpoint-2" in str(error.value)
        others = {"way", "goblin", "features", "dog", "cat", "lemon"} - {change.split("'")[1]}
        assert not [name for name in others if f"{name!r} " in str(error.value).split(":", 1)[1]]

    def test_order_counts(self, whole, tmp_path):
        """Statistics are columns in the concepts' order: they must not be taken over for another one."""
        checkpoint = copy_of_step_2(whole, tmp_path)
        concepts = shaping()
        trainer = shaped(*concepts[:3], *concepts[:2:-1], data=pairs(**COLUMNS), **settings(tmp_path))
        with pytest.raises(
            ValueError, match=r"not those of the checkpoint .*their order was way, goblin, .* and is way, goblin, "
        ):
            trainer.train(resume_from_checkpoint=str(checkpoint))

    def test_weights_behind_the_same_path(self, tmp_path):
        """The concept reads the same, but its file does not."""
        path = tmp_path / "direction.safetensors"
        Direction(vector(), layer=1).save(path)
        concept = Concept("way", Direction(path=str(path)))
        run(tmp_path, [concept], max_steps=2)
        Direction(vector(7), layer=1).save(path)
        with pytest.raises(ValueError, match="what a readout loads"):
            run(tmp_path, [concept], resume=True)

    def test_is_allowed_on_demand(self, whole, tmp_path):
        checkpoint = copy_of_step_2(whole, tmp_path)
        trainer = shaped(
            *shaping()[:-1], data=pairs(**COLUMNS), **settings(tmp_path, allow_concept_change=True, calibration_size=8)
        )
        with Forwards(trainer.ref_model) as reference:
            trainer.train(resume_from_checkpoint=str(checkpoint))
        assert len(reference) == 2 + 2  # calibrated anew
        assert load_file(tmp_path / "checkpoint-4" / FILE)["deltas"].shape == (8, 4)


class TestPlainTrainer:
    def plain(self, path: Path, resume: Any = None) -> Run:
        return train(build(DPOTrainer, arguments(False, **settings(path))), resume_from_checkpoint=resume)

    def test_its_checkpoint_resumes_under_ours(self, tmp_path):
        whole = self.plain(tmp_path / "whole")
        shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "cut" / "checkpoint-2")
        trainer = shaped(*watching(), **settings(tmp_path / "cut"))
        resumed = train(trainer, resume_from_checkpoint=True)
        assert_same_tensors([whole.parameters], [resumed.parameters])
        assert_same_tensors(whole.gradients[2:], resumed.gradients)
        assert "concepts/way/delta" in resumed.steps[-1]
        assert (tmp_path / "cut" / "checkpoint-4" / FILE).is_file()

    def test_ours_resumes_under_it(self, tmp_path):
        whole = train(shaped(*watching(), **settings(tmp_path / "whole")))
        shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "cut" / "checkpoint-2")
        resumed = self.plain(tmp_path / "cut", resume=True)
        assert_same_tensors([whole.parameters], [resumed.parameters])
        assert_same_tensors(whole.gradients[2:], resumed.gradients)
        assert "concepts/way/delta" not in resumed.steps[-1]

    def test_ours_without_concepts_resumes_one_with(self, whole, tmp_path):
        copy_of_step_2(whole, tmp_path)
        resumed = run(tmp_path, [], resume=True)
        assert resumed.trainer.state.global_step == 4
