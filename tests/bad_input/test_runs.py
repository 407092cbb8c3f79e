"""What only shows while a run goes: empty completions, scores that are not finite, damaged checkpoints."""

from __future__ import annotations

import logging
import math
import re
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, TrainerCallback
from trl.trainer.dpo_trainer import DataCollatorForPreference

from shapedpo import Concept, Direction, Gate, Regex, SAEFeatures, TextFunction
from tests.helpers import pairs, sae_path, shaped, train, vector, watching

from . import goblin, refused


class Break(TrainerCallback):
    """Does something to the trainer before a step."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action = step, action

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.action()


def one_sided(empties: int = 3) -> Dataset:
    """Some rows with a rejected completion that has no token to predict: without a prompt, <eos> comes first."""
    empty = {"prompt": "", "chosen": "apple goblin", "rejected": ""}
    return Dataset.from_list([empty if index < empties else row for index, row in enumerate(pairs(24))])


@pytest.mark.parametrize("precompute", [False, True])
def test_pairs_without_completion_tokens(precompute):
    concepts = [Concept("goblin", Regex("goblin")), Concept("way", Direction(vector(), layer=0))]
    run = train(
        shaped(*concepts, data=one_sided(), per_device_train_batch_size=24, precompute_ref_log_probs=precompute)
    )
    assert run.metric("concepts/empty_pairs") == [3, 6, 9]
    # Their delta is 0: the rest of the data alone has the same sum, and the same statistics.
    rest = one_sided().select(range(3, 24))
    alone = train(shaped(*concepts, data=rest, per_device_train_batch_size=21, precompute_ref_log_probs=precompute))
    for concept in concepts:
        name = f"concepts/{concept.name}/delta"
        assert run.metric(name)[0] == pytest.approx(alone.metric(name)[0] * 21 / 24, abs=1e-6)


@pytest.mark.parametrize("method", ["reward", "reweight", {"name": "mask", "fraction": 0.3}, "project"])
def test_they_are_not_shaped(method):
    """Nor do they upset a method, in a batch of nothing else."""
    strength = 1.0 if method in ("reward", "reweight") else None
    concept = goblin("suppress", method, strength)
    run = train(shaped(concept, data=one_sided(20), per_device_train_batch_size=6, max_steps=4))
    assert all(math.isfinite(value) for entry in run.history for value in entry.values())
    assert run.metric("concepts/empty_pairs")[-1] == 20
    assert all(torch.isfinite(tensor).all() for tensor in run.parameters.values())


def test_truncation():
    """A collator that cuts off at fewer tokens than TRL was told: both completions go."""
    collator = DataCollatorForPreference(pad_token_id=0, max_length=5)
    trainer = shaped(*watching(), trainer={"data_collator": collator}, per_device_train_batch_size=24)
    gone = sum(len(row["prompt_ids"]) >= 5 for row in trainer.train_dataset)
    assert 0 < gone < 20
    assert train(trainer).metric("concepts/empty_pairs") == [gone, 2 * gone, 3 * gone]


def test_too_few_left_to_calibrate():
    collator = DataCollatorForPreference(pad_token_id=0, max_length=1)
    trainer = shaped(goblin(), trainer={"data_collator": collator})
    refused("Of the 24 pairs...0 have completion tokens...`max_length`", trainer.train)


def test_a_score_that_never_varies(caplog):
    with caplog.at_level(logging.WARNING, logger="shapedpo"):
        run = train(shaped(Concept("unicorn", Regex("unicorn"), "suppress", strength=1.0)))
    (text,) = [record.getMessage() for record in caplog.records if "unicorn" in record.getMessage()]
    assert "never vary" in text
    assert "calibration_size" in text
    assert run.metric("concepts/unicorn/delta") == [0.0] * 3


def is_nan_on(word: str) -> TextFunction:
    return TextFunction(lambda text: math.nan if word in text else 1.0 * len(text), name="odd")


def test_in_the_calibration():
    trainer = shaped(Concept("fine", Regex("a")), Concept("odd", is_nan_on("goblin")))
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    refused("Concept 'odd': ...the calibration sample...not finite", trainer.train, FloatingPointError)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_infinities(value):
    trainer = shaped(Concept("odd", TextFunction(lambda text: value if "goblin" in text else 0.0)))
    refused("Concept 'odd'", trainer.train, FloatingPointError)


def test_in_the_cache():
    make = lambda: shaped(Concept("odd", is_nan_on("goblin")), precompute_ref_log_probs=True)  # noqa: E731
    refused("Concept 'odd'", make, FloatingPointError)


def test_prompts_that_gate():
    """A gate that cannot be read must not pass for one that is shut."""
    concepts = [
        Concept("odd", TextFunction(lambda text: math.nan if text == "red red red" else float(len(text)))),
        goblin("suppress", strength=1.0, gate=Gate(concept="odd")),
    ]
    rows = [{**row, "prompt": "<bos> red red red"} if index % 5 == 0 else row for index, row in enumerate(pairs())]
    refused("Concept 'odd'", shaped(*concepts, data=Dataset.from_list(rows)).train, FloatingPointError)


@pytest.mark.parametrize("readout", ["direction", "features", "text"])
def test_later_with_a_checkpoint_saved(tmp_path, readout):
    """The reference's weights go bad at step 3. The run stops before its update; what was saved at step 2 is whole."""
    broken: list[bool] = []
    readouts = {
        "direction": Direction(vector(), layer=1),
        "features": SAEFeatures(str(sae_path()), [3, 17]),
        "text": TextFunction(lambda text: math.nan if broken else float(len(text))),
    }
    concepts = [Concept("fine", Regex("goblin")), Concept("odd", readouts[readout], "suppress", strength=1.0)]
    trainer = shaped(*concepts, output_dir=str(tmp_path), save_strategy="steps", save_steps=2, max_steps=6)

    def break_it() -> None:
        broken.append(True)
        if readout != "text":
            trainer.ref_model.model.layers[0].mlp.down_proj.weight.data[0, 0] = math.nan

    trainer.add_callback(Break(2, break_it))
    after_two: dict[str, Any] = {}
    trainer.add_callback(Break(2, lambda: after_two.update(copied(trainer.model))))
    # The collator may have scored a batch ahead of its step.
    message = refused("Concept 'odd': ...of step ...not finite", trainer.train, FloatingPointError)
    assert re.search(r"step 2\b" if readout != "text" else r"step [234]\b", message)
    if "step 2" in message:
        assert all(torch.equal(tensor, after_two[name]) for name, tensor in trainer.model.state_dict().items())

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert all(torch.equal(tensor, after_two[name]) for name, tensor in model.state_dict().items())
    assert all(torch.isfinite(t).all() for t in load_file(tmp_path / "checkpoint-2" / "concepts.safetensors").values())
    broken.clear()
    again = shaped(*concepts, output_dir=str(tmp_path), save_strategy="no", max_steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 4


def test_in_evaluation():
    silent = Dataset.from_list([{"prompt": "the", "chosen": "", "rejected": " cat"}] * 2)
    concept = Concept("odd", TextFunction(lambda text: float(len(text)) if text else math.nan))
    trainer = shaped(concept, trainer={"eval_dataset": silent})
    refused("Concept 'odd'", trainer.evaluate, FloatingPointError)


def copied(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_a_file_that_is_no_calibration(tmp_path):
    """Something else of that name, or half a file, is said to be so."""
    fields = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    train(shaped(goblin(), **fields))
    path = tmp_path / "checkpoint-1" / "concepts.safetensors"
    whole = path.read_bytes()
    for damage in (lambda: path.write_bytes(whole[: len(whole) // 2]), lambda: save_file({"x": vector()}, path)):
        damage()
        trainer = shaped(goblin(), **{**fields, "max_steps": 2})
        refused("concepts.safetensors", lambda t=trainer: t.train(resume_from_checkpoint=True))
