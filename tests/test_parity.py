"""Without concepts, and with concepts that only watch, a run is TRL's own to the last bit; and it makes no more forward passes."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from datasets import load_from_disk
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from trl import DPOTrainer

from shapedpo import Concept, Direction, Gate, Regex, SAEFeatures, ShapedDPOTrainer
from tests.helpers import (
    RUN_DEPENDENT,
    Forwards,
    Run,
    arguments,
    assert_same,
    build,
    load_model,
    pairs,
    sae_path,
    save_sae,
    shaped,
    train,
    vector,
    watching,
)


# Every loss type of TRL, with what it cannot do without.
LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "hinge": {},
    "ipo": {},
    "exo_pair": {"label_smoothing": 0.1},
    "nca_pair": {},
    "robust": {"label_smoothing": 0.1},
    "bco_pair": {},
    "sppo_hard": {},
    "aot": {},
    "aot_unpaired": {},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {},
    "sft": {},
    "sigmoid_norm": {},
}
CHECKPOINTING = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}


@dataclass
class Case:
    """Settings, and makers of what is given to the trainer: each run gets its own."""

    settings: dict[str, Any]
    options: dict[str, Callable[[], Any]] = field(default_factory=dict)

    def run(self, cls: type, ours: bool, **settings: Any) -> Run:
        options = {name: make() for name, make in self.options.items()}
        return train(build(cls, arguments(ours, **self.settings, **settings), **options))


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM", **fields)


def pretrained_adapter() -> Any:
    torch.manual_seed(1)
    return get_peft_model(load_model(), lora(init_lora_weights=False))


def with_dropout() -> Any:
    model = load_model()
    model.config.attention_dropout = 0.3
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.3
    return model


def other_model() -> Any:
    model = load_model()
    torch.manual_seed(2)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def mean_logit(prediction: Any) -> dict[str, float]:
    return {"mean_logit": float(np.mean(prediction.predictions[prediction.label_ids > 3]))}


EVALUATION = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 3}
LORA = {"peft_config": lora}
OPTIONS = {
    "reentrant-checkpointing": Case(REENTRANT),
    "checkpointing": Case(CHECKPOINTING),
    "lora": Case({}, LORA),
    "lora-reentrant-checkpointing": Case(REENTRANT, LORA),
    "prompt-tuning": Case({}, {"peft_config": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)}),
    "pretrained-adapter": Case({}, {"model": pretrained_adapter}),
    "pretrained-adapter-checkpointing": Case(CHECKPOINTING, {"model": pretrained_adapter}),
    "ref-model": Case({}, {"ref_model": other_model}),
    "lora-ref-model": Case({}, {**LORA, "ref_model": other_model}),
    "precompute": Case({"precompute_ref_log_probs": True}),
    "precompute-lora": Case({"precompute_ref_log_probs": True}, LORA),
    "precompute-ld_alpha": Case({"precompute_ref_log_probs": True, "ld_alpha": 0.5, "precompute_ref_batch_size": 5}),
    "precompute-evaluation": Case(
        {"precompute_ref_log_probs": True, **EVALUATION}, {"eval_dataset": lambda: pairs(10, seed=1)}
    ),
    "evaluation": Case(EVALUATION, {"eval_dataset": lambda: pairs(10, seed=1)}),
    "evaluation-lora-checkpointing": Case(
        {**EVALUATION, **CHECKPOINTING}, {**LORA, "eval_dataset": lambda: pairs(10, seed=1)}
    ),
    "evaluation-of-several": Case(
        EVALUATION, {"eval_dataset": lambda: {"one": pairs(5, seed=1), "other": pairs(7, seed=2)}}
    ),
    "compute_metrics": Case(
        EVALUATION, {"eval_dataset": lambda: pairs(6, seed=1), "compute_metrics": lambda: mean_logit}
    ),
    "forward_kl": Case({"f_divergence_type": "forward_kl"}),
    "js_divergence": Case({"f_divergence_type": "js_divergence", "loss_type": ["ipo"]}),
    "alpha_divergence": Case({"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5}),
    "alpha_divergence-lora": Case({"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5}, LORA),
    "ld_alpha": Case({"ld_alpha": 0.4}),
    "ld_alpha-lora-hinge": Case({"ld_alpha": 0.4, "loss_type": ["hinge"]}, LORA),
    "wpo": Case({"use_weighting": True}),
    "wpo-precompute-lora": Case({"use_weighting": True, "precompute_ref_log_probs": True}, LORA),
    "several-losses": Case({"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}),
    "several-losses-wpo-lora": Case({"loss_type": ["sigmoid", "ipo"], "use_weighting": True, **CHECKPOINTING}, LORA),
    "stream": Case({}, {"train_dataset": lambda: pairs().to_iterable_dataset()}),
    "shuffled-stream": Case({}, {"train_dataset": lambda: pairs().to_iterable_dataset().shuffle(3, buffer_size=5)}),
    "accumulation": Case({"gradient_accumulation_steps": 2}),
    "accumulation-lora-checkpointing": Case({"gradient_accumulation_steps": 2, **CHECKPOINTING}, LORA),
    "dropout": Case({"disable_dropout": False}, {"model": with_dropout}),
    "dropout-lora": Case({"disable_dropout": False}, {"peft_config": lambda: lora(lora_dropout=0.3)}),
    "dropout-both-checkpointing": Case(
        {"disable_dropout": False, **CHECKPOINTING},
        {"model": with_dropout, "peft_config": lambda: lora(lora_dropout=0.3)},
    ),
    "keep_end": Case({"truncation_mode": "keep_end", "max_length": 8}),
    "keep_start": Case({"max_length": 8}),
    "bf16": Case({"bf16": True}),
    "bf16-lora": Case({"bf16": True}, LORA),
    "epochs": Case({"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 5}),
}
CASES = {
    **{loss: Case({"loss_type": [loss], **settings}) for loss, settings in LOSSES.items()},
    # What an adapter and recomputed layers change is the same for all losses: of each sort one.
    **{
        f"{loss}-lora-checkpointing": Case({"loss_type": [loss], **CHECKPOINTING}, LORA)
        for loss in ("sigmoid", "ipo", "bco_pair", "aot", "sft")
    },
    **OPTIONS,
}


@functools.cache
def plain(name: str) -> Run:
    return CASES[name].run(DPOTrainer, ours=False)


class TestParity:
    @pytest.mark.parametrize("name", CASES)
    def test_watching(self, name):
        run = CASES[name].run(ShapedDPOTrainer, ours=True, concepts=watching(), calibration_size=8)
        assert_same(plain(name), run)
        assert all(f"concepts/{concept}/amplification" in run.steps[0] for concept in ("goblin", "way", "features"))

    # Without concepts the batch goes to TRL's own method, which knows the loss type: one of each sort.
    @pytest.mark.parametrize("name", ["sigmoid", "aot", "sft", "sft-lora-checkpointing", *OPTIONS])
    def test_no_concepts(self, name):
        run = CASES[name].run(ShapedDPOTrainer, ours=False)  # a plain DPOConfig
        assert_same(plain(name), run)
        assert not any("concepts" in key for entry in run.history for key in entry)

    def test_the_cases_train(self):
        """Bits that are equal because nothing moves would prove nothing."""
        for name in ("sigmoid", "sft-lora-checkpointing", "dropout-lora"):
            run = plain(name)
            assert all(gradient > 0 for gradient in run.metric("grad_norm"))
            assert len(set(run.metric("loss"))) == 3
        assert plain("dropout-lora").metric("loss") != plain("lora").metric("loss")
        assert plain("dropout").metric("loss") != plain("sigmoid").metric("loss")

    def test_our_config_without_concepts(self):
        assert_same(plain("sigmoid"), CASES["sigmoid"].run(ShapedDPOTrainer, ours=True))

    def test_concepts_beside_a_plain_config(self):
        trainer = build(ShapedDPOTrainer, arguments(False), concepts=watching())
        run = train(trainer)
        assert_same(plain("sigmoid"), run)
        assert "concepts/features/pressure" in run.steps[0]

    def test_evaluation_before_training(self):
        """It calibrates, and so must not draw from the random numbers that training is to use."""
        runs = []
        for cls, settings in ((DPOTrainer, {}), (ShapedDPOTrainer, {"concepts": watching()})):
            options = {"model": with_dropout(), "eval_dataset": pairs(6, seed=1)}
            args = arguments("concepts" in settings, disable_dropout=False, **settings)
            trainer = build(cls, args, **options)
            trainer.evaluate()
            runs.append(train(trainer))
        assert_same(*runs)

    def test_prediction_on_new_data(self):
        metrics = []
        for cls in (DPOTrainer, ShapedDPOTrainer):
            options = {} if cls is DPOTrainer else {"concepts": watching()}
            trainer = build(cls, arguments(False), **options)
            trainer.train()
            metrics.append(trainer.evaluate(pairs(6, seed=4)))
        for name, value in metrics[0].items():
            assert any(part in name for part in RUN_DEPENDENT) or metrics[1][name] == value, name


def gated() -> list[Concept]:
    """A concept of every kind, shaped on prompts that another one passes."""
    gate = Gate(concept="way", threshold=0.1)
    return [
        Concept("way", Direction(vector(), layer=1)),
        Concept("fruit", Regex("apple|lemon")),
        Concept("goblin", Regex("goblin"), action="suppress", strength=1.0, gate=gate),
        Concept("features", SAEFeatures(str(sae_path()), [3, 17]), "amplify", strength=0.5, gate=Gate(concept="fruit")),
    ]


class TestForwardPasses:
    @pytest.mark.parametrize("concepts", [watching, gated])
    def test_one_of_the_reference_each_step(self, concepts):
        trainer = shaped(*concepts(), calibration_size=10)
        with Forwards(trainer.ref_model) as reference, Forwards(trainer.model) as policy:
            trainer.train()
        assert len(policy) == 3
        assert len(reference) == 3 + 3  # and 10 pairs of calibration by 4
        assert set(reference.batches) == {8}

    def test_with_an_adapter(self):
        trainer = shaped(*watching(), trainer={"peft_config": lora()})
        with Forwards(trainer.model) as both:
            trainer.train()
        assert len(both) == 2 * 3 + 24 // 4

    def test_concepts_of_text_alone(self):
        trainer = shaped(Concept("goblin", Regex("goblin")))
        with Forwards(trainer.ref_model) as reference:
            trainer.train()
        assert len(reference) <= 3 + 24 // 4

    def test_evaluation(self):
        trainer = shaped(*watching(), trainer={"eval_dataset": pairs(6, seed=1)}, per_device_eval_batch_size=2)
        trainer.train()
        with Forwards(trainer.ref_model) as reference:
            trainer.evaluate()
        assert len(reference) == 3


class TestPrecompute:
    def build(self, concepts: list[Concept] | None, data: Any, **fields: Any) -> tuple[Any, int]:
        """A trainer, and how many forward passes its construction made."""
        model = load_model()
        cls, options = (DPOTrainer, {}) if concepts is None else (ShapedDPOTrainer, {"concepts": concepts})
        # A plain config, for TRL's cache misses on any change of its arguments: the concepts are not to be among them.
        args = arguments(False, precompute_ref_log_probs=True, **fields)
        with Forwards(model) as forwards:
            trainer = build(cls, args, model, train_dataset=data, **options)
        return trainer, len(forwards)

    @pytest.fixture
    def data(self, tmp_path) -> Any:
        pairs(26).save_to_disk(tmp_path)  # on disk, or it would have no cache
        return load_from_disk(tmp_path)

    def test_scores_come_from_the_same_pass(self, data):
        _, theirs = self.build(None, data)
        trainer, ours = self.build(gated(), data)
        assert theirs == ours == 7
        with Forwards(trainer.model) as forwards:
            trainer.train()
        assert len(forwards) == 3  # the policy's: no reference, no calibration

    def test_what_a_trainer_under_deepspeed_rounds(self, data):
        """It casts a batch's floating-point numbers to bf16, the cached log-probabilities too. What is read of concepts is not of those."""

        class Rounding(ShapedDPOTrainer):
            def _prepare_input(self, data: Any) -> Any:
                data = super()._prepare_input(data)
                return data.bfloat16() if isinstance(data, torch.Tensor) and data.is_floating_point() else data

        args = arguments(precompute_ref_log_probs=True, max_steps=1, concepts=watching())
        step = train(build(Rounding, args, train_dataset=data)).steps[0]
        assert abs(step["rewards/chosen"]) > 1e-4  # TRL's loss is of what it was handed, rounded
        for concept in ("goblin", "way", "features"):
            assert step[f"concepts/{concept}/amplification"] == pytest.approx(0, abs=1e-5)  # no step was made yet

    def test_cache(self, data):
        concepts = watching()
        assert self.build(None, data)[1] == 7
        assert self.build([], data)[1] == 0
        assert self.build(concepts, data)[1] == 7  # TRL's own cache holds no scores, and is another
        assert self.build(watching(), data)[1] == 0
        way = Concept("way", Direction(vector(1), layer=0, pooling="mean"))
        for changed in (
            [concepts[0], way, concepts[2]],
            [concepts[0], Concept("way", Direction(vector(), layer=1, pooling="mean")), concepts[2]],
            [concepts[0], Concept("way", Direction(vector(), layer=0, pooling="max")), concepts[2]],
            [Concept("goblin", Regex("goblin", flags="i")), *concepts[1:]],
            [*concepts[:2], Concept("features", SAEFeatures(str(sae_path()), [3, 17, 41]))],
            concepts[:2],
            concepts[::-1],
        ):
            assert self.build(changed, data)[1] == 7
        assert self.build(concepts, data)[1] == self.build(None, data)[1] == 0

    def test_what_does_not_change_scores_hits(self, data):
        self.build([Concept("goblin", Regex("goblin"))], data)
        suppress = Concept("spite", Regex("goblin"), action="suppress", strength=2.0)
        assert self.build([suppress], data)[1] == 0

    @pytest.mark.parametrize("concepts", [watching, gated])
    @pytest.mark.parametrize("peft", [False, True])
    def test_metrics_are_those_without_it(self, data, concepts, peft):
        options = {"train_dataset": data, **({"peft_config": lora()} if peft else {})}
        without, cached = (
            train(
                build(
                    ShapedDPOTrainer,
                    arguments(concepts=concepts(), precompute_ref_log_probs=precompute),
                    **options,
                )
            )
            for precompute in (False, True)
        )
        names = [name for name in without.steps[0] if name.startswith(("concepts/", "rewards/", "logps/", "loss"))]
        names.remove("rewards/accuracies")  # at first a comparison of zeros
        assert len(names) >= 12
        for name in names:
            assert cached.metric(name) == pytest.approx(without.metric(name), abs=1e-5), name

    def test_evaluation_data(self, data):
        metrics = []
        for precompute in (False, True):
            trainer = shaped(
                *gated(),
                data=data,
                trainer={"eval_dataset": {"held": pairs(9, seed=5)}},
                precompute_ref_log_probs=precompute,
                per_device_eval_batch_size=2,
            )
            metrics.append(trainer.evaluate())
        assert "eval_concepts/goblin/amplification" in metrics[0]
        for name, value in metrics[0].items():
            if not any(part in name for part in RUN_DEPENDENT) and "accuracies" not in name:
                assert metrics[1][name] == pytest.approx(value, abs=1e-5), name

    def test_a_whole_sae_is_refused(self, data):
        everything = Concept("everything", SAEFeatures(str(save_sae("wide", d_sae=4097)), "all"))
        with pytest.raises(
            ValueError, match=r"Concept 'everything' reads 4097 features.*precompute_ref_log_probs=False"
        ):
            self.build([everything], data)


def test_a_quiet_run_does_not_warn(caplog, recwarn):
    """What our own code says in a plain run: nothing."""
    with caplog.at_level(logging.WARNING, logger="shapedpo"):
        shaped(*watching()).train()
    assert not [record for record in caplog.records if record.name.startswith("shapedpo")]
    assert not [warning for warning in recwarn if "shapedpo" in warning.filename]
