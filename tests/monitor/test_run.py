"""The monitor in a run: it changes nothing, its numbers are right, and a run that was stopped goes on as if it had not been."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from trl import DPOTrainer

from shapedpo import Concept, Direction, Regex, SAEFeatures, ShapedDPOTrainer, Tokens
from shapedpo.collator import ROW
from shapedpo.monitor.access import numbered
from shapedpo.monitor.recent import RecentRows
from shapedpo.monitor.records import read_records
from shapedpo.monitor.sinks import make_sinks
from tests.helpers import (
    FEATURES,
    Run,
    arguments,
    assert_same,
    build,
    pairs,
    sae_path,
    save_sae,
    shaped,
    tokenizer,
    train,
    vector,
    watching,
)


PROBE = {"probe_steps": 2, "probe_prompts": 18, "probe_max_new_tokens": 12}
BATCH, WINDOW = 4, 10


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in read_records(folder) if record["type"] == kind]


def without_probes(run: Run) -> Run:
    return replace(
        run, history=[entry for entry in run.history if not any(name.startswith("probe/") for name in entry)]
    )


@pytest.fixture(scope="module")
def watched(tmp_path_factory) -> tuple[Path, Run]:
    """Five steps with everything on."""
    out = tmp_path_factory.mktemp("watched")
    concepts = [*watching(), Concept("third", SAEFeatures(str(sae_path()), features=[3]))]
    trainer = shaped(*concepts, monitor="all", monitor_window=WINDOW, max_steps=5, output_dir=str(out), **PROBE)
    return out, train(trainer)


def test_watching_changes_nothing(watched):
    """Every metric, gradient and parameter is plain DPO's, to the last bit, with all features read and rollouts sampled."""
    plain = train(build(DPOTrainer, arguments(ours=False, max_steps=5)))
    assert_same(plain, without_probes(watched[1]))


class TestNumbers:
    @pytest.mark.parametrize("quantity", ["amplification", "pressure", "delta"])
    def test_window_of_what_was_logged(self, watched, quantity):
        """An estimate is the mean of the batches' own metrics, each older one counting less."""
        out, run = watched
        for concept in ("goblin", "way", "features"):
            logged = run.metric(f"concepts/{concept}/{quantity}")
            for upto, record in enumerate(records(out, "step"), start=1):
                weights = [math.exp(-BATCH * (upto - 1 - i) / WINDOW) for i in range(upto)]
                mean = sum(w * x for w, x in zip(weights, logged, strict=False)) / sum(weights)
                assert record["concepts"][concept][quantity][0] == pytest.approx(mean, abs=1e-5)

    def test_a_feature_s_estimate_is_that_of_a_concept_which_reads_it(self, watched):
        monitor = watched[1].trainer._monitor
        assert monitor.features.reader.n_features == FEATURES
        of_features, of_concepts = monitor.features.window.state(), monitor.window.state()
        # Calibration of a concept and of all features go by different code to the same statistics.
        torch.testing.assert_close(of_features[:, 3], of_concepts[:, 3], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(of_features[:, -1], of_concepts[:, -1])

    def test_most_amplified_are_the_most_amplified(self, watched):
        from shapedpo.monitor.estimates import Window

        out, run = watched
        value, se = (tensor[0] for tensor in Window.estimates(run.trainer._monitor.features.window.state())[:2])
        last = records(out, "features")[-1]
        assert last["watched"] == FEATURES
        for side, sign in (("amplified", 1), ("suppressed", -1)):
            sure = sign * value - 1.96 * se
            expected = [int(i) for i in sure.argsort(descending=True) if sure[i] > 0]
            assert [entry["feature"] for entry in last[side]] == expected
            for entry in last[side]:
                assert entry["amplification"] == pytest.approx(
                    [float(value[entry["feature"]]), float(se[entry["feature"]])], rel=1e-5
                )
                assert entry["tokens"]
                assert entry["label"] == ", ".join(entry["tokens"])
                assert len(entry["promotes"]) == 4
        assert last["amplified"] or last["suppressed"]

    def test_pairs_are_rows_of_the_data(self, watched):
        data = pairs()
        found = records(watched[0], "pairs")[-1]["concepts"]
        assert found.keys() == {"goblin", "way", "features", "third"}
        for rows in found.values():
            assert 0 < len(rows) <= 8
            sizes = [abs(row["contribution"]) for row in rows]
            assert all(size > 0 for size in sizes)
            assert len({row["row"] for row in rows}) == len(rows)
        for row in found["goblin"]:
            example = data[row["row"]]
            assert row["prompt"] == example["prompt"].replace("<bos> ", "")
            assert row["chosen"] == example["chosen"].strip()
            said = [("goblin" in example[side]) for side in ("chosen", "rejected")]
            assert math.copysign(1, row["delta"]) == said[0] - said[1]


def test_rows_keep_their_numbers_where_preparation_drops_some(tmp_path):
    data = pairs(24)
    long = {**data[5], "prompt": "<bos> " + " ".join(["the"] * 40)}
    data = Dataset.from_list([long if i == 5 else row for i, row in enumerate(data)])
    train(shaped(Concept("goblin", Regex("goblin")), data=data, max_length=30, max_steps=6, output_dir=str(tmp_path)))
    rows = records(tmp_path, "pairs")[-1]["concepts"]["goblin"]
    assert any(row["row"] > 5 for row in rows)
    for row in rows:
        assert row["row"] != 5
        assert row["prompt"] == data[row["row"]]["prompt"].replace("<bos> ", "")


def test_the_last_step_is_recorded_once(tmp_path):
    """Whether it is logged or not."""
    for every in (1, 2):
        train(shaped(*watching(), max_steps=3, logging_steps=every, output_dir=str(tmp_path / str(every))))
        for kind in ("step", "pairs"):
            assert [record["step"] for record in records(tmp_path / str(every), kind)].count(3) == 1
        assert read_records(tmp_path / str(every))[-1] == {"type": "end", "step": 3}


def test_a_trainer_that_trains_again(tmp_path):
    """Its records are those of a run of its own, though no step of it is logged before the last."""
    trainer = shaped(*watching(), logging_steps=10, output_dir=str(tmp_path))
    for _ in range(2):
        trainer.train()
        assert [record["type"] for record in read_records(tmp_path)] == ["run", "step", "pairs", "end"]


def test_a_batch_size_that_is_found(tmp_path):
    """Too large a one may be found to be so while the concepts are calibrated, of which nothing is left then."""
    tokens = Concept("tokens", Direction(vector(), layer=1), "suppress", Tokens(quantile=0.9))
    trainer = shaped(tokens, auto_find_batch_size=True, per_device_train_batch_size=8, output_dir=str(tmp_path))
    batches = []

    def short_of_memory(module, args, kwargs):
        batches.append(len(kwargs["input_ids"]))
        if len(batches) > 1 and batches[-1] > 10:
            raise RuntimeError("CUDA out of memory.")

    trainer.ref_model.register_forward_pre_hook(short_of_memory, with_kwargs=True)
    trainer.train()
    assert [record["pairs"] for record in records(tmp_path, "step")] == [5, 10, 15]
    expected = train(shaped(tokens)).trainer._calibration.tokens
    torch.testing.assert_close(trainer._calibration.tokens, expected)


def test_rows_of_a_stream_have_their_texts(tmp_path):
    data = pairs()
    train(shaped(Concept("goblin", Regex("goblin")), data=data.to_iterable_dataset(), output_dir=str(tmp_path)))
    rows = records(tmp_path, "pairs")[-1]["concepts"]["goblin"]
    assert rows
    for row in rows:
        for name in ("prompt", "chosen", "rejected"):
            assert row[name] == data[row["row"]][name].replace("<bos> ", "").strip()


@pytest.mark.parametrize("shards", [1, 3])
def test_rows_of_a_stream_keep_apart_where_workers_count_them(shards):
    stream, _ = numbered(pairs(10).to_iterable_dataset(num_shards=shards))
    rows = [row[ROW] for row in DataLoader(stream, batch_size=None, num_workers=2)]
    assert len(rows) == len(set(rows)) == 10
    if shards == 1:
        assert rows == list(range(10))


def test_recent_rows_are_bounded():
    recent = RecentRows(window=1)
    for row in (0, 1, 2, 3, 0, 4):
        recent([{ROW: row, "prompt_ids": [row], "chosen_ids": [1, row]}], {})
    assert [row for row in range(5) if recent.get(row)] == [0, 2, 3, 4]  # 0 was seen again
    assert recent.get(4)["chosen"].tolist() == [1, 4]


class TestProbe:
    def test_before_and_after(self, watched):
        out, run = watched
        probes = records(out, "probe")
        assert [probe["step"] for probe in probes] == [0, 2, 4, 5]
        assert [probe["rollouts"] for probe in probes] == [4 * 36, 36, 36, 36]
        for concept in probes[0]["concepts"].values():
            assert concept["change"] == [0.0, 0.0]
            assert concept["predicted"] is None
        for probe in probes[1:]:
            for concept in probe["concepts"].values():
                assert concept["change"][1] > 0
                # What the rollouts alone say is an estimate of the same change, a noisier one.
                assert abs(concept["change"][0] - concept["rollouts"][0]) < 4 * concept["rollouts"][1]
            assert probe["estimator"].startswith("probe rollouts with amplification")
            assert len(probe["features"]) == 30
        assert [probe["predictor"] for probe in probes[1:]] == [
            "amplification",
            "amplification, scaled by the last probe",
            "amplification, scaled by the last probe",
        ]
        for probe, step in zip(
            probes[1:], records(out, "step")[1::2], strict=False
        ):  # the same moment: the same estimate
            assert (probe["step"], step["estimator"]) == (step["step"], "last probe")
            for name, concept in step["concepts"].items():
                assert concept["change"][0] == pytest.approx(probe["concepts"][name]["change"][0], abs=1e-5)
        logged = [entry["probe/goblin/rate"] for entry in run.history if "probe/goblin/rate" in entry]
        assert logged == [pytest.approx(probe["concepts"]["goblin"]["rate"][0], abs=1e-6) for probe in probes]

    def test_samples_are_the_rollouts(self, watched):
        """The same prompts each time, tokens that make up the text, and marks where the pattern is."""
        probes = records(watched[0], "probe")
        prompts = [[sample["prompt"] for sample in probe["samples"]] for probe in probes]
        assert prompts[0] == prompts[-1]
        assert len(prompts[0]) == 8
        for sample in (sample for probe in probes for sample in probe["samples"]):
            assert "".join(sample["tokens"]) == sample["completion"]
            for activations in sample["activations"].values():
                assert len(activations) == len(sample["tokens"])
                assert min(activations, default=0) >= 0
            for token, mark in zip(sample["tokens"], sample["activations"]["goblin"], strict=True):
                assert mark == float("goblin" in token)
        assert any(max(sample["activations"]["features"]) > 0 for sample in probes[0]["samples"])

    def test_rate_counts_rollouts_that_show_it(self, tmp_path):
        """On few enough prompts that the samples shown are half of the rollouts of a probe."""
        args = {"probe_steps": 1, "probe_prompts": 8, "probe_max_new_tokens": 20, "max_steps": 1}
        train(shaped(Concept("goblin", Regex("goblin")), output_dir=str(tmp_path), **args))
        probe = records(tmp_path, "probe")[1]
        shown = sum("goblin" in sample["completion"] for sample in probe["samples"])
        rate = probe["concepts"]["goblin"]["rate"][0] * 16
        assert shown <= round(rate) <= shown + 8
        low, high = probe["concepts"]["goblin"]["rate"][1:]
        assert low < rate / 16 < high

    def test_a_model_that_does_not_learn_does_not_change(self, tmp_path):
        trainer = shaped(*watching(), monitor="all", learning_rate=0.0, output_dir=str(tmp_path), **PROBE)
        train(trainer)
        for probe in records(tmp_path, "probe"):
            assert all(concept["change"] == [0.0, 0.0] for concept in probe["concepts"].values())
            if probe["step"]:
                assert all(concept["rollouts"] == [0.0, 0.0] for concept in probe["concepts"].values())

    def test_prompts_are_held_out_where_there_are_any(self, tmp_path):
        """Where these are few, they are taken again."""
        held_out = pairs(7, seed=5)
        trainer = shaped(*watching(), output_dir=str(tmp_path), trainer={"eval_dataset": held_out}, **PROBE)
        train(trainer)
        known = {row["prompt"].replace("<bos> ", "") for row in held_out}
        probe = records(tmp_path, "probe")[1]
        assert {sample["prompt"] for sample in probe["samples"]} == known
        assert (probe["prompts"], probe["rollouts"]) == (18, 36)
        asked = trainer._monitor._probe.probe.prompts
        assert asked == [asked[i % 7] for i in range(18)]

    def test_rollouts_correct_the_controller_of_held_concepts(self, tmp_path):
        """Of a gated one, those of its gate's prompts; none, where the prompts' data does not say which these are."""

        def run(**fields: Any) -> tuple[Any, list[Any]]:
            held = Concept("held", Direction(vector(4), layer=1), action="hold")
            column = Concept("column", Direction(vector(3), layer=1), action="hold", gate={"column": "some"})
            prompt = Concept("prompt", Direction(vector(5), layer=1), "hold", gate={"concept": "held", "threshold": 0})
            data = pairs(some=[i % 3 == 0 for i in range(24)])
            name = str(tmp_path / str(len(fields)))
            trainer = shaped(held, column, prompt, data=data, output_dir=name, **fields)
            seen, change = [], trainer._shaping.hold.change
            trainer._shaping.hold.change = lambda *given: seen.append(given) or change(*given)
            train(trainer)
            return trainer, seen

        trainer, seen = run()
        assert not seen
        assert trainer._shaping.hold.bias.eq(0).all()
        trainer, seen = run(**PROBE)
        probe, before = trainer._monitor._probe.probe, trainer._monitor._probe._before
        asked = {tuple(row["prompt_ids"]): row["some"] for row in reversed(list(trainer.train_dataset))}
        some = [float(asked[tuple(prompt)]) for prompt in probe.prompts]
        now, then, gates = seen[-1]
        assert now.shape == (18, 2, 3)
        assert torch.equal(then[:, 2:4], before.scores[1])
        assert gates[:, 0].tolist() == [1.0] * 18
        assert gates[:, 1].tolist() == some
        assert 0 < gates[:, 2].sum() < 18
        assert gates[:, 2].unique().tolist() == [0, 1]
        assert trainer._shaping.hold.bias.ne(0).all()
        trainer, seen = run(trainer={"eval_dataset": pairs(30, seed=5)}, **PROBE)
        assert seen[-1][2][:, 1].isnan().all()
        assert (trainer._shaping.hold.bias != 0).tolist() == [True, False, True]

    def test_adapter(self, tmp_path):
        from peft import LoraConfig

        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
        trainer = shaped(
            *watching(),
            monitor="all",
            output_dir=str(tmp_path),
            learning_rate=0.3,
            precompute_ref_log_probs=False,
            gradient_checkpointing=True,
            trainer={"peft_config": lora},
            **PROBE,
        )
        run = train(trainer)
        assert any(concept["change"][0] for concept in records(tmp_path, "probe")[-1]["concepts"].values())
        assert run.trainer.model.training  # as it was


def test_a_number_of_features_are_those_that_the_data_pushes_most(tmp_path):
    every = shaped(monitor="all", monitor_sae=str(sae_path()), output_dir=str(tmp_path / "all"))
    train(every)
    delta = every._monitor.features.statistics.delta.abs()
    some = shaped(monitor="5", monitor_sae=str(sae_path()), output_dir=str(tmp_path / "some"))
    run = train(some)
    chosen = some._monitor.features.statistics.ids
    assert set(chosen.tolist()) == set(delta.topk(5).indices.tolist())
    expected = every._monitor.features.window.state()[:, [*chosen.tolist(), -1]]
    torch.testing.assert_close(some._monitor.features.window.state(), expected, rtol=1e-4, atol=1e-5)
    assert run.history[0].keys() == run.history[0].keys() - {
        "concepts/goblin/delta"
    }  # nothing is named, nothing logged
    assert not records(tmp_path / "some", "pairs")
    assert {entry["feature"] for entry in records(tmp_path / "some", "features")[-1]["amplified"]} <= set(
        chosen.tolist()
    )


def test_labels_from_a_file(tmp_path):
    (tmp_path / "labels.json").write_text(json.dumps({str(i): f"what {i} means" for i in range(FEATURES)}))
    settings = {"monitor": "all", "monitor_sae": str(sae_path()), "feature_labels": str(tmp_path / "labels.json")}
    train(shaped(max_steps=5, output_dir=str(tmp_path / "out"), **settings))
    last = records(tmp_path / "out", "features")[-1]
    named = [*last["amplified"], *last["suppressed"]]
    assert named
    assert all(entry["label"] == f"what {entry['feature']} means" for entry in named)


class Stop(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path):
    def trainer(out: Path, **options: Any) -> Any:
        concepts = [
            *watching(),
            Concept("x", Direction(vector(2), layer=1), action="suppress", strength=1.0),
            Concept("y", Direction(vector(4), layer=1), action="hold"),
        ]
        fields = {"monitor": "20", "monitor_sae": str(sae_path()), "save_strategy": "steps", "save_steps": 3, **PROBE}
        return shaped(*concepts, max_steps=7, output_dir=str(out), **fields, **options)

    whole = train(trainer(tmp_path / "whole"))
    stopped = trainer(tmp_path / "same", trainer={"callbacks": [Stop(5)]})
    with pytest.raises(KeyboardInterrupt):
        train(stopped)
    assert read_records(tmp_path / "same")[-1]["step"] > 3
    stopped.remove_callback(Stop)
    shutil.copytree(tmp_path / "same", tmp_path / "new")
    for process, resuming in (("same", stopped), ("new", trainer(tmp_path / "new"))):
        resumed = train(resuming, resume_from_checkpoint=True)
        for name, parameter in whole.parameters.items():
            assert torch.equal(parameter, resumed.parameters[name]), name
        one, other = ((tmp_path / part / "concepts.jsonl").read_bytes() for part in ("whole", process))
        assert one == other, f"in the {process} process"


def test_a_checkpoint_of_plain_dpo_resumes_under_the_monitor(tmp_path):
    args = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "output_dir": str(tmp_path)}
    train(build(DPOTrainer, arguments(ours=False, **args)))
    trainer = build(ShapedDPOTrainer, arguments(concepts=watching(), monitor="all", **{**args, **PROBE}))
    train(trainer, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [record["step"] for record in records(tmp_path, "step")] == [3, 4]
    assert [record["step"] for record in records(tmp_path, "probe")] == [2, 4]


class TestResumingWithOtherSettings:
    FIELDS = {**PROBE, "probe_prompts": 4, "probe_max_new_tokens": 5, "max_steps": 4}

    @pytest.fixture(scope="class")
    @classmethod
    def checkpoint(cls, tmp_path_factory) -> Path:
        out = tmp_path_factory.mktemp("first")
        fields = {"monitor": "all", "save_strategy": "steps", "save_steps": 2, **cls.FIELDS, "max_steps": 2}
        train(shaped(*watching(), output_dir=str(out), **fields))
        return out / "checkpoint-2"

    def resume(self, checkpoint: Path, out: Path, **fields: Any) -> Run:
        options = {"trainer": {"eval_dataset": fields.pop("eval_dataset")}} if "eval_dataset" in fields else {}
        trainer = shaped(*watching(), output_dir=str(out), **{**self.FIELDS, **fields}, **options)
        return train(trainer, resume_from_checkpoint=str(checkpoint))

    @pytest.mark.parametrize(
        ("fields", "text"),
        [
            ({"probe_prompts": 6}, "`probe_prompts` was 4 and is 6"),
            ({"probe_max_new_tokens": 6}, "`probe_max_new_tokens` was 5 and is 6"),
            ({"eval_dataset": pairs(8, seed=7)}, "the prompts are others"),
        ],
    )
    def test_other_probes_are_refused(self, checkpoint, tmp_path, fields, text):
        """Their rollouts would be compared with other ones."""
        with pytest.raises(ValueError, match=f"not those of the checkpoint: {text}"):
            self.resume(checkpoint, tmp_path, monitor="all", **fields)

    @pytest.mark.parametrize("features", [None, 5])
    def test_other_features_are_calibrated_anew(self, checkpoint, tmp_path, caplog, features):
        run = self.resume(checkpoint, tmp_path, monitor=features)
        monitor = run.trainer._monitor.features
        assert (None if monitor is None else len(monitor.statistics.ids)) == features
        assert len(records(tmp_path, "features")) == (0 if features is None else 2)
        probe = records(tmp_path, "probe")[-1]
        assert probe["concepts"]["way"]["change"][1] > 0
        assert "features" not in probe  # nobody knows what they were before
        assert ("Probes leave out the SAE's features" in caplog.text) == (features is not None)


def test_a_run_that_is_stopped_at_a_probe_is_probed_once(tmp_path):
    class Enough(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 2

    fields = {"output_dir": str(tmp_path), **PROBE, "probe_prompts": 2, "probe_max_new_tokens": 2}
    trainer = shaped(*watching()[:1], max_steps=6, trainer={"callbacks": [Enough()]}, **fields)
    trainer.train()
    assert [record["step"] for record in records(tmp_path, "probe")] == [0, 2]
    trainer.train()
    assert [record["step"] for record in records(tmp_path, "probe")] == [
        0,
        2,
    ]  # of the second run, in a file of its own


@pytest.mark.parametrize("fields", [{"per_device_train_batch_size": 1}, {"learning_rate": 1e6, "max_steps": 6}])
def test_what_is_not_known_of_a_single_pair_or_a_diverged_policy(tmp_path, fields, recwarn):
    """The run goes on, as TRL's does."""
    train(shaped(*watching(), monitor="all", output_dir=str(tmp_path), **fields))
    steps = records(tmp_path, "step")
    unknown = steps[0] if "per_device_train_batch_size" in fields else steps[-1]
    assert unknown["concepts"]["way"]["change"] == [None, None]
    assert not [warning for warning in recwarn if "could not be written" in str(warning.message)]
    assert "way" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_policy_that_has_diverged(tmp_path):
    """Sampling from it would end the process with an error that says nothing of it, on a GPU all others' too."""
    fields = {"output_dir": str(tmp_path), **PROBE, "probe_prompts": 2, "probe_max_new_tokens": 2}
    trainer = shaped(*watching()[:1], learning_rate=1e6, max_steps=4, **fields)
    with pytest.raises(FloatingPointError, match=r"At step 2 the policy gives no finite probabilities.*diverged"):
        trainer.train()


class Overflow(TrainerCallback):
    """One step whose numbers overflow, and which the optimiser therefore skips, as in fp16."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.kept = model.get_input_embeddings().weight.detach().clone()
            model.get_input_embeddings().weight.data.fill_(torch.nan)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 1:
            model.get_input_embeddings().weight.data.copy_(self.kept)
            model.zero_grad()


def test_a_batch_that_overflows_is_left_out(tmp_path):
    """The gauges of the rest of the run know all the others, and so do its probes."""
    fields = {
        "monitor": "all",
        "output_dir": str(tmp_path),
        **PROBE,
        "probe_steps": 3,
        "probe_prompts": 4,
        "max_steps": 4,
    }
    trainer = shaped(*watching(), learning_rate=1e-4, **fields)
    trainer.add_callback(Overflow())
    trainer.train()
    steps = records(tmp_path, "step")
    decay = math.exp(-4 / 1024)
    weights = [decay**age for age in (3, 2, 1, 0)]
    assert [step["left_out"] for step in steps[:2]] == [0, pytest.approx(1 / (1 + decay), rel=1e-5)]
    assert steps[1]["concepts"]["way"]["amplification"][0] is None  # more is left out than known
    assert steps[3]["left_out"] == pytest.approx(weights[1] / sum(weights), rel=1e-5)
    for name in ("way", "features"):
        delta = [entry[f"concepts/{name}/delta"] for entry in trainer.state.log_history if "loss" in entry]
        expected = sum(w * d for i, (w, d) in enumerate(zip(weights, delta, strict=True)) if i != 1) / (
            sum(weights) - weights[1]
        )
        assert steps[3]["concepts"][name]["delta"][0] == pytest.approx(expected, rel=1e-4)
        assert None not in steps[3]["concepts"][name]["amplification"]
    last = records(tmp_path, "probe")[-1]
    assert None not in [*last["concepts"]["way"]["change"], *last["concepts"]["way"]["predicted"], last["r2"]]
    assert "pairs are left out" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_records_without_texts(tmp_path):
    """Nothing that the run shows quotes a pair, a prompt or a rollout."""
    fields = {"monitor": "5", "output_dir": str(tmp_path), **PROBE, "probe_prompts": 2, "max_steps": 2}
    fields |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    trainer = shaped(*watching(), monitor_texts=False, **fields)
    layer, kinds = trainer.model.model.layers[0], []
    layer.register_forward_pre_hook(
        lambda module, args: kinds.append(module._gradient_checkpointing_func.keywords) if module.training else None
    )
    trainer.train()
    assert kinds[0] == {"use_reentrant": True}  # as it was before the probe
    rows = records(tmp_path, "pairs")[-1]["concepts"]["way"]
    texts = [
        pairs()[row["row"]][side].removeprefix("<bos>").strip()
        for row in rows
        for side in ("prompt", "chosen", "rejected")
    ]
    assert texts
    assert records(tmp_path, "probe")[-1]["samples"] == []
    for name in ("concepts.jsonl", "report.html"):
        shown = (tmp_path / name).read_text(encoding="utf-8")
        assert not [text for text in texts if text in shown]
    assert "<code>monitor_texts</code> is off" in shown


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({}, ""),
        ({"push_to_hub": True}, "Set `monitor_texts=False`"),
        ({"push_to_hub": True, "monitor_texts": False}, ""),
        ({"push_to_hub": True, "monitor_texts": False, "hub_strategy": "checkpoint"}, ""),
        (
            {"push_to_hub": True, "monitor_texts": False, "hub_strategy": "checkpoint", "probe_steps": 5},
            "`hub_strategy='checkpoint'` uploads checkpoints",
        ),
    ],
)
def test_texts_that_go_to_the_hub_are_told(fields, told, caplog):
    make_sinks(arguments(**fields))
    assert told in caplog.text
    assert bool(told) == bool(caplog.text)


class TestBadInput:
    @pytest.mark.parametrize(
        ("fields", "text"),
        [
            ({"monitor": "some"}, "`monitor` must be 'all' or a number of features above 0, got 'some'"),
            ({"monitor": "0"}, "`monitor` must be 'all' or a number"),
            ({"monitor_sae": "x"}, "`monitor_sae` is given, but `monitor` is not"),
            ({"feature_labels": "x"}, "`feature_labels` is given, but `monitor` is not"),
            ({"monitor_window": 1}, "`monitor_window` must be a whole number of at least 2, got 1"),
            ({"probe_steps": -1}, "`probe_steps` must be a whole number of at least 0, got -1"),
        ],
    )
    def test_settings(self, fields, text):
        with pytest.raises(ValueError, match=text):
            arguments(**fields)

    def test_no_sae(self):
        with pytest.raises(ValueError, match=r"no concept names an SAE\. Name it in `monitor_sae`"):
            shaped(Concept("goblin", Regex("goblin")), monitor="all")

    def test_two_saes(self):
        other = save_sae("other-sae")
        concepts = [
            Concept(name, SAEFeatures(str(path), features=[1])) for name, path in (("a", sae_path()), ("b", other))
        ]
        with pytest.raises(ValueError, match="the concepts name 2"):
            shaped(*concepts, monitor="all")

    def test_wrong_width(self):
        with pytest.raises(ValueError, match="The monitored SAE: its readout is 16 wide"):
            shaped(monitor="all", monitor_sae=str(save_sae("narrow-sae", d_in=16)))

    def test_no_pass_to_read_in(self):
        with pytest.raises(ValueError, match="`monitor='all'` reads an SAE's features in the reference pass"):
            shaped(monitor="all", monitor_sae=str(sae_path()), precompute_ref_log_probs=True)

    def test_no_reference_to_probe_with(self):
        with pytest.raises(ValueError, match=r"`probe_steps=2` reads rollouts with the reference"):
            shaped(*watching(), precompute_ref_log_probs=True, **PROBE)

    def test_no_room_for_rollouts(self, tmp_path):
        trainer = shaped(*watching(), output_dir=str(tmp_path), probe_steps=1, probe_max_new_tokens=62)
        with pytest.raises(
            ValueError, match=r"No prompt is short enough to be answered: .*Lower `probe_max_new_tokens`"
        ):
            trainer.train()

    def test_labels_that_are_not_there(self):
        with pytest.raises(FileNotFoundError, match="no file of feature labels at"):
            shaped(*watching(), monitor="all", feature_labels="nowhere.json")

    def test_labels_of_another_sae(self, tmp_path):
        (tmp_path / "labels.json").write_text('{"3": "here", "40000": "not here"}')
        with pytest.raises(ValueError, match=r"labels feature 40000, and the SAE has 48 features"):
            shaped(*watching(), monitor="all", feature_labels=str(tmp_path / "labels.json"))


def test_prompts_are_tokenised_as_in_training():
    assert tokenizer().decode(tokenizer()("<bos> the cat")["input_ids"]) == "<bos> the cat"
