"""Observed changes and figures against slow references; and the whole of it on the lab: audit, train a little, verify."""

from __future__ import annotations

import io
import json
from argparse import Namespace
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from rich.console import Console

from shapedpo import lab
from shapedpo.audit import analyse, predict
from shapedpo.audit.harvesting.pairs import load_pairs
from shapedpo.audit.prediction.conditions import Conditions
from shapedpo.audit.prediction.run import Prediction
from shapedpo.audit.rollouts.models import load_model, prompt_tokens
from shapedpo.audit.rollouts.observed import observe
from shapedpo.audit.rollouts.run import Rollouts, RolloutSettings, roll_out
from shapedpo.audit.verify.comparison import Figures, Outcome, compare
from shapedpo.audit.verify.report import _figures
from shapedpo.cli import main
from shapedpo.errors import UserError
from shapedpo.lab.features import shipped_features
from shapedpo.readouts import SAEFeatures
from shapedpo.scripts.verify import _check_tokens, _unread, held_out_prompts
from tests import helpers

from .worlds import TOKENS, Planted, World


LESSONS = (Planted(1, rate=0.3), Planted(2, topic=3))
DATA = World(500, topics=4, groups=6, loners=12, lessons=LESSONS)
ANSWERS = World(300, topics=4, groups=6, loners=12, lessons=LESSONS, seed=1)


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    harvest = DATA.harvest(tmp_path_factory.mktemp("harvest"), shard_rows=128)
    analysis = analyse(harvest, progress=False)
    return harvest, analysis, Conditions.of(analysis)


@pytest.mark.parametrize("bridge", [True, False])
def test_observed_change_is_what_each_pair_of_answers_adds(audited, tmp_path, bridge) -> None:
    _, analysis, conditions = audited
    ratios = np.random.default_rng(5).normal(0, 1.5, (ANSWERS.n, 2))
    rollouts = Rollouts(ANSWERS.harvest(tmp_path, shard_rows=64), ratios)
    found = observe(rollouts, conditions, bridge=bridge, progress=False)
    counts = ANSWERS.counts()
    after, before, prompt = (counts[span] / TOKENS for span in ("chosen", "rejected", "prompt"))
    # pi and ref of each answer up to what they share: (pi - ref) / ((ref + pi) / 2)
    weights = 2 * (np.exp(ratios) - 1) / (np.exp(ratios) + 1) if bridge else np.tile([2.0, -2.0], (ANSWERS.n, 1))

    def check(result, group, after, before, rows) -> None:
        a, b = after[rows], before[rows]
        level = (a.mean(axis=0) + b.mean(axis=0)) / 2
        adds = weights[rows, :1] * (a - level) / 2 + weights[rows, 1:] * (b - level) / 2
        np.testing.assert_allclose(result.change[group], adds.mean(axis=0), atol=1e-7)
        np.testing.assert_allclose(result.se[group], adds.std(axis=0, ddof=1) / len(rows) ** 0.5, rtol=1e-4, atol=1e-8)
        for half in range(2):
            part = rows[rows // 2 % 2 == half]
            level = (after[part].mean(axis=0) + before[part].mean(axis=0)) / 2
            adds = weights[part, :1] * (after[part] - level) / 2 + weights[part, 1:] * (before[part] - level) / 2
            np.testing.assert_allclose(result.halves[half][group], adds.mean(axis=0), atol=1e-7)
        assert result.n[group, 0] == len(rows)

    check(found["feature", "global"], 0, after, before, np.arange(ANSWERS.n))
    shares = [
        np.stack([(x[:, c] > 0.01).mean(axis=1) for c in analysis.clusters["feature"]], axis=1) for x in (after, before)
    ]
    check(found["feature_cluster", "global"], 0, *shares, np.arange(ANSWERS.n))
    shown = [(share >= 0.5 - 1e-9).astype(float) for share in shares]
    n, middle = ANSWERS.n, sum(each.mean(axis=0) for each in shown) / 2
    adds = sum(weights[:, [i]] * (each - middle) / 2 for i, each in enumerate(shown)).mean(axis=0)
    rates = [np.clip(middle + sign * adds / 2, 0, 1) for sign in (1, -1)]
    if not bridge:  # the counts themselves
        np.testing.assert_allclose(rates, [each.mean(axis=0) for each in shown], atol=1e-9)
    odds = [np.log((n * rate + 0.5) / (n + 0.5 - n * rate)) for rate in rates]
    np.testing.assert_allclose(found["feature_cluster", "global"].log_odds[0], odds[0] - odds[1], atol=1e-7)

    sd = np.where(conditions.things.prompt_view.delta_sd > 0, conditions.things.prompt_view.delta_sd, 1)
    moved = [
        np.stack([(x / sd)[:, c].mean(axis=1) for c in analysis.clusters["response"]], axis=1) for x in (after, before)
    ]
    data = DATA.counts()["prompt"] > 0
    for group in range(3):
        features = analysis.clusters["prompt"][group]
        # as expressive as the least of the rows that the audit took
        expressed = np.sort(data[:, features].mean(axis=1))[::-1]
        least = expressed[: analysis.settings.prompt_rows]
        least = least[least > 0].min()
        rows = np.flatnonzero((prompt[:, features] > 0).mean(axis=1) >= least - 1e-6)
        check(found["response_cluster", "prompt"], group, *moved, rows)


def test_figures_of_known_predictions() -> None:
    draw = np.random.default_rng(0)
    n, noise, error = 4000, 0.02, 0.05
    truth = draw.normal(0, 0.1, n)
    score = truth + draw.normal(0, error, n)
    halves = truth + draw.normal(0, noise * 2**0.5, (2, n))
    half = 1.6448536 * error
    numbers = {name: np.zeros(n, np.float32) for name in Prediction.__dataclass_fields__}
    numbers |= {"score": score, "score_low": score - half, "score_high": score + half, "number": np.arange(n)}
    numbers |= {"kind": np.full(n, "feature"), "view": np.full(n, "global")}
    zeros = np.zeros(n)
    outcome = Outcome(
        Prediction(**numbers), halves.mean(axis=0), np.full(n, noise), halves, zeros, zeros, halves, zeros, zeros
    )
    found = Figures.of(outcome)
    assert found.r2 == pytest.approx(np.corrcoef(score, halves.mean(axis=0))[0, 1] ** 2)
    assert found.low < found.r2 < found.high < found.low + 0.1
    assert found.ceiling == pytest.approx(0.1**2 / (0.1**2 + noise**2), abs=0.01)
    assert found.covered == pytest.approx(0.9, abs=0.02)
    assert found.slope == pytest.approx(0.1**2 / (0.1**2 + error**2), abs=0.03)
    # a scale that is off by 4 costs neither rank nor, once scaled, coverage
    off = {**numbers, **{name: numbers[name] / 4 for name in ("score", "score_low", "score_high")}}
    scaled = Figures.of(Outcome(Prediction(**off), *list(vars(outcome).values())[1:]))
    assert scaled.r2 == pytest.approx(found.r2)
    assert scaled.covered < 0.5
    assert scaled.covered_scaled == pytest.approx(found.covered_scaled)


def test_intervals_without_a_scale_are_judged_after_scaling() -> None:
    """Without a pilot an audit does not know how far a run goes: that its intervals are too narrow by a factor says nothing of it."""
    found = Figures(9, *np.full(11, 0.5))
    found = {"features": replace(found, covered=0.11, covered_scaled=0.88, sign=float("nan"))}
    for scaled, share in ((True, "11%"), (False, "88%")):
        console = Console(width=160, record=True, file=io.StringIO())
        console.print(_figures(found, 12, scaled))
        shown = console.export_text()
        assert (share in shown, "does not know how far" in " ".join(shown.split()), "nan" in shown) == (
            True,
            not scaled,
            False,
        )


def test_contrast_takes_off_what_happens_everywhere(audited, tmp_path) -> None:
    harvest, analysis, conditions = audited
    ratios = np.zeros((ANSWERS.n, 2))
    prediction = predict(harvest, analysis, progress=False)
    observed = observe(Rollouts(ANSWERS.harvest(tmp_path), ratios), conditions, bridge=False, progress=False)
    outcome = compare(prediction, observed)
    contrast = outcome.contrast()
    p = contrast.prediction
    assert 200 < len(p) <= sum(outcome.prediction.condition >= 0)
    for line in (0, 17, len(p) - 1):
        key = str(p.kind[line]), int(p.number[line])
        within = prediction.at(*key, str(p.view[line]), int(p.condition[line]))
        assert p.score[line] == pytest.approx(within["score"] - prediction.at(*key)["score"], abs=1e-6)
        found = (
            observed[key[0], str(p.view[line])].change[p.condition[line], key[1]]
            - observed[key[0], "global"].change[0, key[1]]
        )
        assert contrast.observed[line] == pytest.approx(found / within["sd"], rel=1e-5, abs=1e-8)
    # the world's own lessons come out of its other half
    everywhere = Figures.of(outcome.of("feature", "global"))
    assert everywhere.r2 > 0.85 * everywhere.ceiling
    conditional = Figures.of(contrast.of("response_cluster", "prompt"))
    assert conditional.r2 > 0.6 * conditional.ceiling


def test_log_ratios_are_those_of_the_answers(tmp_path) -> None:
    base, other, tokenizer = lab.load_model(), lab.load_model(), lab.load_tokenizer()
    with torch.no_grad():
        other.lm_head.weight[:, 0] += 0.3
    prompts = [
        tokenizer.apply_chat_template(p, add_generation_prompt=True)["input_ids"] for p in lab.heldout_prompts(5, 0)
    ]
    reader = SAEFeatures(str(lab.sae_path()), "all").load()
    settings = RolloutSettings(max_new_tokens=12, batch_size=2)
    rollouts = roll_out(base, other, tokenizer, prompts, reader, tmp_path / "one", settings)
    assert rollouts.log_ratios.shape == (10, 2)
    ids = rollouts.harvest.ids(range(10))
    texts = rollouts.harvest.texts(range(10))
    assert len({text["prompt"] for text in texts}) == len({tuple(p) for p in prompts})
    for row in (0, 7):
        prompt = prompts[row // 2]
        for column, side in enumerate(("chosen", "rejected")):
            written = tokenizer(texts[row][side], add_special_tokens=False)["input_ids"]
            assert written == ids[row][side][: len(written)]
            full = torch.tensor([prompt + written])
            logps = []
            for model in (other, base):
                logits = model.double()(full).logits.log_softmax(-1)
                logps.append(sum(logits[0, i - 1, full[0, i]].item() for i in range(len(prompt), full.shape[1])))
                if len(written) < settings.max_new_tokens:  # it ended by itself
                    logps[-1] += float(logits[0, -1, tokenizer.eos_token_id])
            assert rollouts.log_ratios[row, column] == pytest.approx(logps[0] - logps[1], abs=1e-4)


def test_prompts_that_leave_no_room_are_refused_by_the_commands_option() -> None:
    data = lab.goblin_world(n=8).dataset()
    with pytest.raises(UserError, match=r"and 2 leave room for `--max-new-tokens` .*Lower `--max-new-tokens`"):
        prompt_tokens(data, lab.load_tokenizer(), n=4, longest=2, seed=0)


def test_prompts_are_rendered_with_the_tools_that_training_has() -> None:
    tokenizer = lab.load_tokenizer()
    tokenizer.chat_template = "{% if tools %}tools {{ tools | length }} {{ more }}{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
    turn = [{"role": "user", "content": "tell me"}]
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
    row = {"prompt": turn, "tools": json.dumps([tool, tool]), "chat_template_kwargs": {"more": "more"}}
    (prompt,) = prompt_tokens(Dataset.from_list([row, row]), tokenizer, n=4, longest=99, seed=0)
    assert tokenizer.decode(prompt) == "tools 2 moretell me"


def test_prompts_that_are_not_there_are_said() -> None:
    for prompts, said in (([], "no prompts"), (["a", None], "Row 1 of the prompts is null")):
        with pytest.raises(UserError, match=said):
            prompt_tokens(Dataset.from_dict({"prompt": prompts}), lab.load_tokenizer(), n=4, longest=99, seed=0)


@pytest.mark.parametrize(("split", "read"), [("test", 4), ("train", 30)])
def test_held_out_prompts_are_no_rows_that_a_run_trains_on(split, read, capsys) -> None:
    """Of the test split, all but two rows of which were audited, these two; of the training split none, although half of it was not read."""
    settings = {"dataset": "lab:goblin_world?n=60", "split": split, "config": None}
    harvest, tokenizer = SimpleNamespace(settings=settings, rows=np.arange(read)), lab.load_tokenizer()
    prompts = held_out_prompts(harvest, tokenizer, None, 9, 200, 0)
    rows = load_pairs(settings["dataset"], "test")["prompt"][4 if split == "test" else 0 :]
    expected = [tokenizer.apply_chat_template(row, add_generation_prompt=True)["input_ids"] for row in rows]
    assert sorted(prompts) == sorted(map(list, {tuple(ids) for ids in expected}))
    assert ("If the run trained on them" in capsys.readouterr().out) == (split == "test")


def test_held_out_splits_go_by_the_name_of_the_one_that_was_audited() -> None:
    asked = []

    def load(name, split, config):
        asked.append(split)
        if split == "validation_prefs":
            return "held out"
        if split == "train_prefs":
            return range(9)
        raise UserError("no such split")

    harvest = SimpleNamespace(settings={"dataset": "d", "split": "train_prefs", "config": None}, rows=np.arange(9))
    assert _unread(harvest, load) == "held out"
    assert asked == ["train_prefs", "test_prefs", "validation_prefs"]


def test_prompts_are_drawn_from_all_of_the_data() -> None:
    data = Dataset.from_dict({"prompt": [f"{number}" for number in range(600)]})
    tokenizer = lab.load_tokenizer()
    drawn = [int(tokenizer.decode(ids)) for ids in prompt_tokens(data, tokenizer, n=4, longest=99, seed=0)]
    assert max(drawn) >= 300  # not of the first 200, which may be of one kind


def test_answers_of_both_models_end_at_the_same_tokens(tmp_path) -> None:
    """One that was trained elsewhere may have a generation config that does not say where an answer ends."""
    base, other, tokenizer = lab.load_model(), lab.load_model(), lab.load_tokenizer()
    before, other.generation_config.eos_token_id = base.generation_config.eos_token_id, None
    prompts = [
        tokenizer.apply_chat_template(p, add_generation_prompt=True)["input_ids"] for p in lab.heldout_prompts(4, 0)
    ]
    reader = SAEFeatures(str(lab.sae_path()), "all").load()
    found = roll_out(base, other, tokenizer, prompts, reader, tmp_path, RolloutSettings(max_new_tokens=48))
    answers = found.harvest.ids(range(8))
    assert [one["chosen"] for one in answers] == [one["rejected"] for one in answers]
    assert (base.generation_config.eos_token_id, other.generation_config.eos_token_id) == (before, None)


def test_an_adapter_says_what_it_was_trained_from(tmp_path, capsys) -> None:
    from peft import LoraConfig, get_peft_model

    adapter = get_peft_model(lab.load_model(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapter.save_pretrained(tmp_path / "same")
    load_model(str(tmp_path / "same"), "lab", "float32", "cpu")
    assert not capsys.readouterr().out
    config = tmp_path / "same" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "another/model"}))
    load_model(str(tmp_path / "same"), "lab", "float32", "cpu")
    assert "was trained from 'another/model'" in capsys.readouterr().out
    wide = lab.load_model()
    wide.resize_token_embeddings(wide.config.vocab_size + 8)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM")
    get_peft_model(wide, config).save_pretrained(tmp_path / "wide")
    with pytest.raises(UserError, match=r"(?s)wide' cannot be loaded: .*size mismatch"):
        load_model(str(tmp_path / "wide"), "lab", "float32", "cpu")


def test_a_model_with_other_tokens_is_refused_before_anything_is_loaded() -> None:
    args = Namespace(base="lab", trained=str(helpers.model_path()))
    with pytest.raises(UserError, match=r"has other tokens than --base lab \(.* is None, not \d+\)"):
        _check_tokens(args, lab.load_tokenizer())
    _check_tokens(Namespace(base="lab", trained="lab"), lab.load_tokenizer())


def test_audit_train_verify(tmp_path, capsys) -> None:
    from trl import DPOConfig, DPOTrainer

    world = "lab:goblin_world?n=260"
    audit = tmp_path / "audit"
    auditing = ["audit", "--model", "lab", "--sae", "lab", "--dataset", world, "--sample", "200", "--out", str(audit)]
    assert main(auditing) == 0
    args = DPOConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=8,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        max_length=64,
        use_cpu=True,
        bf16=False,
        report_to="none",
        gradient_checkpointing=False,
        save_strategy="no",
    )
    data = lab.goblin_world(n=200).dataset()
    trainer = DPOTrainer(lab.load_model(), args=args, train_dataset=data, processing_class=lab.load_tokenizer())
    trainer.train()
    trainer.save_model(str(tmp_path / "trained"))
    # a pilot weighs the reference's answers; what was harvested is used again
    before = Prediction.load(audit / "analysis")
    piloted = [
        "--answers",
        "12",
        "--max-new-tokens",
        "12",
        "--pilot",
        str(tmp_path / "trained"),
        "--pilot-share",
        "0.5",
    ]
    assert main([*auditing, *piloted]) == 0
    after = Prediction.load(audit / "analysis")
    assert len(Rollouts.open(audit / "answers").log_ratios) == 12
    assert not np.allclose(before.score, after.score)
    command = ["verify", "--base", "lab", "--trained", str(tmp_path / "trained"), "--audit", str(audit)]
    small = ["--n-prompts", "24", "--max-new-tokens", "24", "--misses", "3"]
    read = {"type": "sae_features", "features": [0, 1]}
    concepts = [
        {"name": "goblin", "readout": {"type": "lab", "trait": "goblin"}},
        {"name": "by path", "readout": {**read, "sae": str(lab.sae_path())}},
        {"name": "links", "readout": {"type": "regex", "pattern": "http"}},
        {"name": "of another SAE", "readout": {**read, "sae": str(helpers.sae_path())}},
    ]
    (tmp_path / "concepts.yaml").write_text(json.dumps(concepts))
    small += ["--concepts", str(tmp_path / "concepts.yaml")]
    capsys.readouterr()
    assert main([*command, *small]) == 0
    out = audit / "verify"
    found = json.loads((out / "verify.json").read_text())
    assert found["rollouts"] == 96
    assert found["figures"]["features"]["n"] > 200
    assert found["log_ratio_nats"]["mean"][0] > 0  # the trained model likes its own answers better
    assert len(found["misses"]) == 3
    assert pq.ParquetFile(out / "verify.parquet").metadata.num_rows > 500
    assert (out / "verify.png").stat().st_size > 10_000
    shown = capsys.readouterr().out
    assert "no features of the audit's SAE: links, of another SAE." in shown
    assert list(found["concepts"]) == ["goblin", "by path"]
    line, every = found["concepts"]["goblin"], pq.read_table(out / "verify.parquet").to_pandas()
    own = every[(every.kind == "feature") & every.number.isin(shipped_features()["goblin"])]
    assert (line["predicted"], line["observed"]) == pytest.approx((own.score.mean(), own.observed.mean()), rel=1e-5)
    for line in found["misses"]:
        assert line["before"] in {text["rejected"] for text in Rollouts.open(out / "rollouts").harvest.texts(range(48))}

    prompts = tmp_path / "empty.jsonl"
    prompts.write_text('{"question": "What?"}\n')
    nowhere = ["verify", "--base", "lab", "--trained", "./nowhere", "--audit", "./no-audit"]
    assert main(nowhere) == 2  # before anything is loaded
    assert "--trained: there is no folder './nowhere'" in capsys.readouterr().err
    assert main([*command, "--prompts", str(prompts)]) == 2
    assert "expected a column `prompt`, found question" in capsys.readouterr().err
