"""The counts that the model of cost rests on are those of real steps on two ranks; its figures are for quiet machines."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import numpy as np
import pytest

from benchmarks.scaling import load, main, measure
from benchmarks.scaling_cases import LAUNCHES, Case, cases, fitted, held_out, split_launch
from benchmarks.scaling_gpus import MODELS, PAIRS, TOKENS, Machine, Model, evaluate, trl_seconds
from benchmarks.scaling_model import (
    Costs,
    held_bytes,
    shaping_flops,
    shaping_messages,
    shaping_terms,
    summary,
    trl_flops,
    trl_terms,
)
from benchmarks.scaling_report import write


HOST = {
    "operators of a step": 100.0,
    "operators of a concept": 50.0,
    "operators of the monitor": 40.0,
    "hold": 0.01,
    "log": 0.01,
    "monitor's log": 0.02,
}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_two_ranks_are_counted_and_reported(tmp_path: Path) -> None:
    base, monitored, held, other = cases("quick", "ddp2")
    projected = dataclasses.replace(base, action="project", concepts=3)
    wanted = [base, monitored, held, other, projected]
    measure("ddp2", wanted, "cpu", 12, tmp_path)
    found = load(tmp_path, ["ddp2"], wanted)
    assert [one["case"] for one in found] == [case.fields for case in wanted]
    for case, row in zip(wanted, map(summary, found), strict=True):
        assert row["processes"] == 2
        assert row["TRL, FLOP"] == trl_flops(case)
        if case.action == "hold":  # the controller's own work is the host's, and depends on what it finds
            assert row["extra FLOP"] >= shaping_flops(case)
        else:
            assert row["extra FLOP"] == shaping_flops(case)
        for what, logged in (("", False), (", logged", True)):
            messages, size = shaping_messages(case, 2, logged)
            assert row[f"extra messages{what}"] == messages
            assert row[f"extra bytes{what}"] == pytest.approx(size, rel=0.2)  # a further metric adds a few bytes
        assert row["held bytes"] == held_bytes(case)
        assert 0 < row["added, ms"] < row["shaped, ms"]
        assert row["TRL, tokens/s"] > 0

    text = write(found[:4], "quick", "cpu", tmp_path / "out")
    assert text == (tmp_path / "out" / "scaling.md").read_text()
    assert "8 x suppress *" in text  # held out
    assert (tmp_path / "out" / "scaling.png").stat().st_size > 10_000
    with (tmp_path / "out" / "scaling.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 4
    with (tmp_path / "out" / "scaling-gpus.csv").open() as file:
        assert {row["model"] for row in csv.DictReader(file)} == {model.name for model in MODELS}


def test_costs_are_found_and_predict_what_was_not_seen() -> None:
    truth = {"step": 4.0, "concept": 0.2, "concept that reads activations": 0.4, "reads, MB": 0.5, "hold": 1.0}
    truth |= {"held concept": 0.6, "monitor": 1.5, "monitored activations, MB": 1.2, "message": 0.3}

    def cost(case: Case, processes: int) -> float:
        return sum(truth.get(name, 0.0) * amount for name, amount in shaping_terms(case, processes).items())

    learn = [(case, processes) for processes in (1, 2) for case in fitted("cpu", f"ddp{processes}")]
    costs = Costs([shaping_terms(*one) for one in learn], [cost(*one) for one in learn])
    for one in [(case, 2) for case in held_out("cpu", "ddp2")]:
        assert costs.predict(shaping_terms(*one)) == pytest.approx(cost(*one), rel=0.05)


@pytest.mark.parametrize("launch", LAUNCHES)
def test_no_case_is_both_fitted_and_held_out(launch: str) -> None:
    keys = [case.key for case in cases("cpu", launch)]
    assert len(set(keys)) == len(keys)
    known = {name for case in fitted("cpu", launch) for name in trl_terms(case, launch)}
    assert all(known == set(trl_terms(case, launch)) for case in held_out("cpu", launch))


def test_bad_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert [split_launch(launch) for launch in ("ddp1", "zero3-16")] == [("ddp", 1), ("zero3", 16)]
    for launch in ("ddp", "zero3", "zero38", "fsdp2"):
        with pytest.raises(ValueError, match=rf"Unknown launch '{launch}'. Name one as ddp1, "):
            split_launch(launch)
    with pytest.raises(SystemExit):
        main(["--steps", "5"])
    assert "--steps must be at least 12" in capsys.readouterr().err


def test_gpus() -> None:
    machine = Machine()
    for model, parameters in zip(MODELS, (6.98e9, 68.45e9), strict=True):  # without embedding and head
        assert model.matrices == pytest.approx(parameters, rel=0.01)
        step, computing, exchanging = trl_seconds(model, 8, machine)
        assert step == max(computing, exchanging)
        # About eight operations a parameter and token; the embedding has none, attention more.
        plain = 8 * model.parameters * 2 * PAIRS * TOKENS / (machine.bf16 * machine.mfu)
        assert computing == pytest.approx(plain, rel=0.05)
    # Twice the layers, twice the work on them.
    small, large = (Model("", layers, 1024, 0, 12 * 1024**2 * layers) for layers in (4, 8))
    np.testing.assert_allclose(trl_seconds(large, 64, machine), 2 * np.array(trl_seconds(small, 64, machine)))

    rows = evaluate(HOST)
    by = {(row["model"], row["GPUs"], row["setting"]): row for row in rows}
    for (model, gpus, setting), row in by.items():
        parts = ("operators", "products", "memory", "messages", "hold", "log")
        assert row["added, ms"] == pytest.approx(sum(row[f"{part}, ms"] for part in parts))
        assert row["overhead, %"] == pytest.approx(0.1 * row["added, ms"] / row["TRL, s"])
        if gpus > 8:
            assert row["messages, ms"] > by[model, 8, setting]["messages, ms"]
        if model == MODELS[1].name:
            assert row["overhead, %"] < by[MODELS[0].name, gpus, setting]["overhead, %"]
