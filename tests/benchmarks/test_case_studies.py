"""The case studies: their data teach what they say, their figures are computed right, and they run, at a size that means nothing."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from benchmarks.case_studies import __main__ as command
from benchmarks.case_studies import dose, probes, study, table, worlds
from benchmarks.case_studies.methods import PROBE, ROLLOUTS, method, methods, shaping
from benchmarks.case_studies.report import COLUMNS
from benchmarks.case_studies.study import BEFORE, PLAIN, Job, Size, conversations
from benchmarks.case_studies.worlds import DPO, GATE, WORLDS
from benchmarks.divergence import kl_per_token
from benchmarks.folders import RESULTS
from benchmarks.record import Record
from shapedpo import lab
from shapedpo.lab.text import draw_questions, questions


def test_the_command_names_the_cases() -> None:
    assert tuple(WORLDS) == command.NAMES


@pytest.mark.parametrize("case", WORLDS)
def test_every_method_fits_its_cases(case: str) -> None:
    world = WORLDS[case]
    for name, strengths in methods(world).items():
        assert world.amplify or method(name).middle in strengths
        for strength in strengths:
            if method(name).means or method(name).learned or name.endswith(PROBE):
                continue  # reads the model
            for target in world.targets:
                concept, *others = shaping(world, target, name, strength)
                assert concept.shapes
                assert not any(other.shapes for other in others)
                assert {other.name for other in others} == {*concept.given, *concept.spare}
                gated = bool(world.topics) and not name.endswith("no gate")
                assert (concept.gate is not None) == gated


def test_a_steering_vector_is_learned_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worlds, "CACHE", tmp_path)
    monkeypatch.setattr("shapedpo.probes.steering_vector.STEPS", 1)
    path = worlds.steering_vector("goblin", n=8)
    learned = Path(path).stat().st_mtime_ns
    assert worlds.steering_vector("goblin", n=8) == path
    assert Path(path).stat().st_mtime_ns == learned
    monkeypatch.setattr("benchmarks.case_studies.methods.steering_vector", lambda trait: path)
    for name in ("steer: learned", "residual: learned"):
        (concept, *_) = shaping(WORLDS["goblin"], "goblin", name, 1.0)
        assert concept.shaper.direction == path


@pytest.mark.parametrize("name", ["formatting", "safeguards"])
def test_the_share_of_pairs_that_teach_a_target_is_as_said(name: str) -> None:
    world = WORLDS[name]
    rows = [row for row in world.dataset(400, 0) if row[GATE] or not world.topics]
    assert len(rows) == (round(world.share * 400) if world.topics else 400)
    for target in world.targets:
        trait = lab.TRAITS[target]
        shown = [[trait.detect(row[side][0]["content"]) for side in ("chosen", "rejected")] for row in rows]
        wrong = world.restores(target)
        more, less = (sum(pair == side for pair in shown) for side in ([not wrong, wrong], [wrong, not wrong]))
        # In formatting, where traits also show by chance, as many pairs show them on either side.
        assert (more - less) / len(rows) == pytest.approx(world.planted(target), abs=0.05)


def test_the_right_answers_are_to_what_the_base_shrugs_at() -> None:
    asked = [q for topic in worlds.EXACT for split in ("train", "heldout") for q in questions(topic, split)]
    by_text = {q.text: q for q in asked}
    for row in worlds.answered(60, 1):
        question = by_text[row["prompt"][0]["content"]]
        assert worlds.shrugs(question)
        assert question.is_right(row["chosen"][0]["content"])
        assert row["rejected"][0]["content"] in worlds.SHRUGS
    assert not any(lab.detect(shrug) for shrug in worlds.SHRUGS)
    assert 0.3 < sum(map(worlds.shrugs, asked)) / len(asked) < 0.5


def test_a_probe_is_fitted_on_what_the_base_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once: a second call reads the file. Answers are the base's, and the same for whoever asks."""
    monkeypatch.setattr(probes, "CACHE", tmp_path)
    monkeypatch.setattr(probes, "ANSWERS", 96)
    readout = probes.probe("bold")
    (kept,) = (tmp_path / "probes").glob("bold*")
    with safe_open(kept, framework="pt") as file:
        metadata = file.metadata()
    prompts, texts = probes.answers()
    shown = [lab.TRAITS["bold"].detect(text) for text in texts]
    assert (metadata["positives"], metadata["negatives"]) == (str(sum(shown)), str(96 - sum(shown)))
    asked = [[{"role": "user", "content": question.text}] for question in draw_questions(96, probes.SEED, "train")]
    assert prompts == asked
    monkeypatch.setattr(probes, "fit_readouts", None)
    assert probes.probe("bold") == readout
    concept, *others = shaping(WORLDS["formatting"], "bold", f"hold{PROBE}", 1.0)
    assert (concept.readout, concept.action, others) == (readout, "hold", [])


def test_divergence_against_its_sum() -> None:
    tokenizer, reference, policy = lab.load_tokenizer(), lab.load_model().double(), lab.load_model().double()
    for parameter in policy.parameters():
        parameter.data *= 1.02
    prompts = lab.heldout_prompts(3, seed=0)
    answers = ["Yes.", "The answer is 12, and a goblin hums.", "One must kindly note that **this** is so."]
    total, tokens = 0.0, 0
    for prompt, answer in zip(prompts, answers, strict=True):
        start = len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"])
        said = [*prompt, {"role": "assistant", "content": answer}]
        ids = torch.tensor([tokenizer.apply_chat_template(said, return_dict=True)["input_ids"]])
        new, old = (model(ids).logits[0].detach().softmax(-1) for model in (policy, reference))
        for place in range(start - 1, ids.shape[1] - 1):
            total += float(sum(p * (p / q).log() for p, q in zip(new[place], old[place], strict=True)))
            tokens += 1
    found = kl_per_token(policy, reference, conversations(tokenizer, prompts, answers), batch_size=2)
    assert found == pytest.approx(total / tokens, rel=1e-4)
    assert found > 0.001


def test_figures() -> None:
    job = Job("links", "hold", "link")
    before, plain, found = (
        {
            "rates": {
                "affected": {"link": link},
                "others": dict.fromkeys(("cheerfulness", "emoji", "bold", "hedging"), style) | {"link": 0.1},
            },
            "capability": 0.9,
            "kl": 0.1,
            "step": step,
        }
        for link, style, step in ((0.05, 0.1, 0), (0.85, 0.5, 2), (0.09, 0.4, 3))
    )
    figures = table.figures_of(job, before, plain, found)
    assert figures["off by"] == pytest.approx(4)
    assert figures["recovery"] == pytest.approx(95)
    assert figures["others"] == pytest.approx(25)
    assert figures["time"] == 1.5
    assert not table.meets(WORLDS["links"], {**figures})
    assert table.meets(WORLDS["links"], {**figures, "off by": -2.9})
    assert not table.meets(WORLDS["links"], {**figures, "off by": 0, "others off by": 3.5})


def test_earlier_rows_count_until_there_are_as_many_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of `hold` only while the controller does what it did."""
    planned = [Job("goblin", name, "goblin", seed=seed) for name in ("hold", "reward") for seed in range(3)]
    beside = {"rates": {"affected": dict.fromkeys(lab.TRAITS, 0.3)}, "capability": 0.9, "kl": 0.1, "step": 1.0}
    runs: dict[Job, dict[str, Any]] = dict.fromkeys([*planned[:2], *planned[3:5]], beside)
    runs |= {Job("goblin", name, seed=seed): beside for name in (BEFORE, PLAIN) for seed in range(3)}
    (one, other) = table.rows(planned, runs.get)
    lines = [
        {**one, "seeds": 3, "rate": 7.0, "off by": 5.0, "controller": "of old"},
        {**other, "seeds": 2, "rate": 8.0},
    ]
    lines.append({**other, "strength": 9.0})  # which is not planned
    for line in lines:
        del line["meets"]
    monkeypatch.setattr(table, "EARLIER", tmp_path / "earlier.csv")
    with table.EARLIER.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]), restval="")
        writer.writeheader()
        writer.writerows(lines)
    (found,) = table.earlier(planned)
    assert (found["method"], found["rate"]) == ("reward", 8.0)
    assert [row["rate"] for row in table.rows(planned, runs.get, [found])] == [30.0, 30.0]
    monkeypatch.setattr(table.controller, "fingerprint", lambda corrected: "of old")
    rows = table.rows(planned, runs.get, table.earlier(planned))
    assert [(row["method"], row["seeds"], row["rate"]) for row in rows] == [("hold", 3, 7.0), ("reward", 2, 30.0)]
    assert [row["meets"] for row in rows] == [False, True]
    assert [(job.method, job.seed) for job in table.missing(planned, rows)] == [("reward", 2)]


def test_what_tells_most_comes_first() -> None:
    planned = study.jobs(command.NAMES, seeds=2)
    assert len(set(planned)) == len(planned)
    others = [name for name, world in WORLDS.items() if not world.amplify]
    assert [(job.world, job.method) for job in planned[: len(others)]] == [(name, "hold") for name in others]
    assert [job.seed for job in planned] == sorted(job.seed for job in planned)
    assert {job.size for job in study.jobs(("goblin",), 2, quick=True)} == {"quick"}


def test_what_corrects_hold() -> None:
    job = Job("links", "hold, rollouts", "link", size="quick")
    assert job.rollouts == {**ROLLOUTS, "probe_prompts": 64}
    assert Job("links", "hold", "link").rollouts == Job("links").rollouts == {}
    (concept,) = shaping(WORLDS["links"], "link", "hold, rollouts", 1.0)
    assert (concept.action, concept.gate.column) == ("hold", GATE)
    probed = WORLDS["links"].probed(40, seed=1000)
    assert all(probed[GATE])
    assert len(probed) == 40
    assert probed["prompt"] != WORLDS["links"].probed(40, seed=1)["prompt"]


def test_a_table_keeps_the_cases_that_are_not_asked_for(tmp_path: Path) -> None:
    command.main(["--finished", "--case", "links", "--method", "hold", "--seeds", "1", "--out", str(tmp_path)])
    with (tmp_path / "case-studies.csv").open() as file, (RESULTS / "case-studies.csv").open() as committed:
        assert file.read() == committed.read()


@pytest.mark.slow
def test_the_quick_study_runs_once_and_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--quick` as it is, on half of its pairs and prompts: before, plain DPO and two methods."""
    monkeypatch.setattr(worlds, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(study, "CACHE", tmp_path / "cache")
    kept = Record(tmp_path / "runs.jsonl")
    monkeypatch.setattr(study, "record", lambda size: kept)
    monkeypatch.setattr(dose, "record", lambda size: kept)
    monkeypatch.setitem(study.SIZES, "quick", Size(96, 32, 20))
    made: list[Job] = []
    run = study.run

    def counted(job: Job) -> dict[str, Any]:
        made.append(job)
        return run(job)

    monkeypatch.setattr(study, "run", counted)
    call = ["--quick", "--case", "goblin", "--method", "hold", "reward", "--out", str(tmp_path)]
    command.main(call)
    planned = [job for job in study.jobs(("goblin",), 1, quick=True) if job.method in ("hold", "reward")]
    assert [job.method for job in made] == [BEFORE, PLAIN, *(job.method for job in planned)]
    assert len(planned) >= 2
    files = {path: path.read_bytes() for path in tmp_path.glob("case-studies*")}
    command.main(call)
    assert len(made) == 2 + len(planned)
    assert {path: path.read_bytes() for path in tmp_path.glob("case-studies*")} == files
    with (tmp_path / "case-studies.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["target"], row["seeds"]) for row in rows] == [("goblin", "goblin", "1")] * len(planned)
    assert {(row["method"], float(row["strength"])) for row in rows} == {(job.method, job.strength) for job in planned}
    for row, (job, found) in itertools.product(rows, ((job, study.result(job)) for job in planned)):
        assert set(COLUMNS) - {"others off by", "seeming off by"} <= row.keys()  # of which this case has none
        assert all(0 <= float(row[rate]) <= 100 for rate in ("before", "plain", "rate", "capability"))
        assert float(row["kl"]) > 0
        assert float(row["time"]) > 0.3
        if (row["method"], float(row["strength"])) == (job.method, job.strength):
            assert float(row["rate"]) == pytest.approx(100 * found["rates"]["affected"]["goblin"], abs=1e-4)
            assert found["steps"] == 96 // DPO["per_device_train_batch_size"]
    text = (tmp_path / "case-studies.md").read_text()
    assert "## goblin" in text
    assert all(f"| {row['method']} |" in text for row in rows)
    figures = {path.name: path.stat().st_size for path in tmp_path.glob("*.png")}
    assert {"case-studies.png", "case-studies-dose.png"} <= figures.keys()
    assert min(figures.values()) > 5_000
