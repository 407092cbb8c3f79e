"""Two processes do what one does, on the same global batch: DDP and ZeRO-1 to 3, by the real launchers, on CPUs; and FSDP2."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from shapedpo.monitor.records import read_records
from shapedpo.shapers.hold import PairWindow
from tests.distributed import runs
from tests.distributed.launches import CASES, ROOT, cases, launch
from tests.helpers import model_path, tokenizer


UNIT = 2**-7
"""The last place of bf16, relative."""
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(590)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run in this process, each once: its result and its folder."""
    done = {}

    def run_alone(name):
        if name not in done:
            output = tmp_path_factory.mktemp("alone") / name
            trainer = runs.build(name, output, model_path(), runs.data())
            trainer.train()
            trainer.save_model()
            done[name] = json.loads(json.dumps(runs.result(trainer))), output
        return done[name]

    return run_alone


@pytest.mark.parametrize(
    ("launcher", "name"),
    [pytest.param(launcher, name, id=f"{launcher}-{name}") for launcher in CASES for name in cases(launcher)],
)
def test_two_processes_equal_one(alone, together, launcher, name):
    if launcher.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    two, there = together(launcher, name)
    cast = name == "bf16" and launcher != "ddp"  # the whole model, which a process without the launcher does not
    one, here = together(launcher, name, 1) if cast else alone(name)
    assert two["launched"] == {"ddp": "MULTI_CPU 2", "fsdp2": "FSDP 2"}.get(launcher, "DEEPSPEED 2")
    loose = name == "bf16"
    near = 0.1 if loose else 1e-5
    assert_same_batches(one["batches"], two["batches"], near, flips=0.005 if cast else 0)
    taken = [assert_projected(batch, UNIT if cast else 1e-5) for batch in two["batches"]]
    assert max(taken) > 0.01  # there was something to project
    assert_same_states(one, two, here, there, near)
    assert_same_metrics(one["history"], two["history"], max(near, 1e-4))
    # What the monitor wrote, rollouts and all, is that of one process.
    records, theirs = read_records(here), read_records(there)
    assert [record["type"] for record in records].count("probe") == (3 if name == "monitor" else 0)
    if name == "stream":
        assert_texts(theirs)
    if "rows" in runs.RUNS[name]:  # one process takes a repeated pair for another one
        records, theirs = ([record for record in some if record["type"] != "pairs"] for some in (records, theirs))
    if not loose:
        assert_close(*(shown(some[1:]) for some in (records, theirs)), "records")
    assert_same_parameters(here, there, 2e-4 if loose else 1e-4, relative=UNIT if cast else 0)
    assert two["held"] == one["held"] * 2
    assert {name: value for name, value in two["held"][0].items() if name != "elements"} == {
        "plain": True,
        "frozen": True,
        "outside": True,
    }


def assert_texts(records: list) -> None:
    """Of the rows behind the concepts, whichever process had them in its batches."""
    found = [
        row for record in records if record["type"] == "pairs" for rows in record["concepts"].values() for row in rows
    ]
    assert len({row["row"] for row in found}) > 20
    tokens, rows = tokenizer(), runs.data()
    for row in found:
        for name in ("prompt", "chosen", "rejected"):
            text = tokens.decode(tokens(rows[row["row"]][name])["input_ids"], skip_special_tokens=True)
            assert row[name] == text


def assert_same_batches(one: list, two: list, tolerance: float, flips: float = 0) -> None:
    """Scores, offsets of the reference, gates and pair weights of every pair of every batch.

    Of the scores a share of less than `flips` may differ: where frequency is read, what bf16 rounds away decides whether a token that is
    barely active counts.
    """
    assert len(one) == len(two) > 2
    for mine, theirs in zip(one, two, strict=True):
        assert (mine["step"], mine["rows"]) == (theirs["step"], theirs["rows"])
        for name in ("scores", "gates", "offsets", "weights"):
            if name == "scores" and flips:
                assert np.mean(~np.isclose(theirs[name], mine[name], tolerance, tolerance)) < flips
                continue
            np.testing.assert_allclose(theirs[name], mine[name], rtol=tolerance, atol=tolerance, err_msg=name)
        assert max(map(abs, mine["a"])) > 1e-3
        # Up to the scale that averaging over processes takes back.
        a, b = (np.array(batch["projected"]) / np.linalg.norm(batch["a"]) for batch in (mine, theirs))
        np.testing.assert_allclose(b, a, rtol=0, atol=max(tolerance, 1e-4))


def assert_projected(batch: dict, tolerance: float) -> float:
    """The coefficients that were trained on are a - D (D'D)^+ D'a over the pairs of all processes, in float64.

    Returns:
        The largest part that was taken, of the largest coefficient.
    """
    projecting = [i for i, concept in enumerate(runs.concepts()) if concept.name.endswith("-project")]
    scores = np.array(batch["scores"])[:, :, projecting]
    deltas = (scores[:, 0] - scores[:, 1]) * np.array(batch["gates"])[:, projecting]
    a, projected = np.array(batch["a"]), np.array(batch["projected"])
    expected = a - deltas @ np.linalg.lstsq(deltas, a, rcond=1e-9)[0]
    np.testing.assert_allclose(projected, expected, rtol=0, atol=tolerance * np.abs(a).max())
    return np.abs(expected - a).max() / np.abs(a).max()


def assert_same_states(one: dict, two: dict, here: Path, there: Path, tolerance: float) -> None:
    """Standardisation, calibration and the controller: the same bytes on both ranks, and one process's numbers."""
    assert two["states"][0] == two["states"][1]
    mine, theirs = (load_file(path / "concepts.safetensors") for path in (here, there))
    assert mine.keys() == theirs.keys()
    assert {"mean", "deltas", "thresholds", "hold.strengths", "hold.bias"} < mine.keys()
    for name, tensor in mine.items():
        if name.removeprefix("hold.") in PairWindow._fields and name.startswith(
            "hold."
        ):  # the order of a batch's rows is the ranks'
            continue
        near = max(1e-3, tolerance) if name.startswith("hold.") else tolerance  # found by iteration
        torch.testing.assert_close(theirs[name], tensor, rtol=near, atol=near, msg=lambda m, name=name: f"{name}: {m}")


def assert_same_metrics(one: list, two: list, tolerance: float) -> None:
    compared = 0
    for mine, theirs in zip(one, two, strict=True):
        for name in mine:
            plain = name.removeprefix("eval_")
            if plain == "rewards/accuracies" and tolerance > 1e-3:
                continue  # of margins near 0
            if plain == "loss" or plain.startswith(("concepts/", "rewards/", "logps/", "probe/")):
                # What rollouts show is of parameters that may differ by 1e-4.
                near = 3 * tolerance if plain.startswith("probe/") else tolerance
                assert theirs[name] == pytest.approx(mine[name], rel=near, abs=near), (name, mine["step"])
                compared += 1
    assert compared > 3 * 4 * 26


def assert_same_parameters(here: Path, there: Path, tolerance: float, relative: float = 0) -> None:
    """Of the saved models, which plain transformers loads and which hold nothing of ours."""
    mine, theirs = (dict(AutoModelForCausalLM.from_pretrained(path).named_parameters()) for path in (here, there))
    assert mine.keys() == theirs.keys()
    assert not [name for name in mine if "sae" in name.lower() or "concept" in name.lower()]
    start = dict(AutoModelForCausalLM.from_pretrained(model_path()).named_parameters())
    moved = 0.0
    for name, value in mine.items():
        torch.testing.assert_close(
            theirs[name].float(), value.float(), rtol=relative, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )
        if name in start:
            moved = max(moved, float((value - start[name]).abs().max()))
    assert moved > 5 * tolerance or "lora" in " ".join(mine)


def shown(records: list) -> list:
    """Records, less which of equal pairs comes first: of two that contribute the same, the last digit decides."""
    for record in records:
        if record["type"] == "pairs":
            for name, rows in record["concepts"].items():
                record["concepts"][name] = [row["contribution"] for row in rows]
    return records


def assert_close(one, two, where):
    """Two plain values are equal, numbers nearly."""
    if isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            assert_close(one[key], two[key], f"{where}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(two), where
        for index, pair in enumerate(zip(one, two, strict=True)):
            assert_close(*pair, f"{where}[{index}]")
    elif isinstance(one, float):
        assert two == pytest.approx(one, rel=2e-3, abs=2e-4), where
    else:
        assert one == two, where


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs are needed")
@pytest.mark.parametrize("launcher", ["ddp", "zero3", "fsdp2"])
def test_launch_on_gpus(alone, tmp_path, launcher):
    """The configurations as they are, on two GPUs: nearly what one process on a CPU gives, and the same state on both."""
    one, here = alone("monitor")
    launch(launcher, tmp_path, ["monitor"], on_gpus=True)
    there = tmp_path / "monitor"
    two = json.loads((there / "result.json").read_text())
    assert two["launched"].split()[0] in ("MULTI_GPU", "DEEPSPEED", "FSDP")
    assert_same_batches(one["batches"], two["batches"], 0.02)
    assert_same_states(one, two, here, there, 0.02)
    assert_same_parameters(here, there, 5e-3)


@pytest.mark.parametrize("name", ["ddp", "zero2", "zero3"])
def test_cpu_configurations_differ_in_the_processor_only(name):
    """Those that users try on CPUs are those of GPUs."""
    gpu, cpu = (
        yaml.safe_load((ROOT / "accelerate_configs" / f"{prefix}{name}.yaml").read_text()) for prefix in ("", "cpu_")
    )
    assert gpu | {"use_cpu": True, "num_processes": 2, "mixed_precision": "no"} == cpu
