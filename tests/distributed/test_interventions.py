"""What the policy reads and computes is the same on two processes as on one: DDP and ZeRO-3, each by its launcher, on CPUs."""

from __future__ import annotations

import functools
import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import interventions
from tests.distributed.launches import INTERVENTIONS
from tests.helpers import model_path


MIXED = ("way1/tokens", "goblin/tokens", "way2/steer", "way3/ablate", "fox/inoculate", "way4/residual", "cat/residual")
SHARES = {
    "interventions": MIXED,
    "interventions-lora-reentrant": MIXED,
    "interventions-projected": ("way3/projected", "way4/projected"),
}
"""What must not be 0 in each run, or it would show nothing."""
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(590)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run in this process, each once: its result and its folder."""

    @functools.cache
    def run_alone(name):
        output = tmp_path_factory.mktemp("alone") / name
        interventions.run(name, output, model_path(), interventions.data())
        return json.loads((output / "result.json").read_text()), output

    return run_alone


@pytest.mark.parametrize(
    ("launcher", "name"), [(launcher, name) for launcher, names in INTERVENTIONS.items() for name in names]
)
def test_two_processes_equal_one(alone, together, launcher, name):
    if launcher == "zero3" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    (one, here), (two, there) = alone(name), together(launcher, name)
    assert two["launched"] == ("MULTI_CPU 2" if launcher == "ddp" else "DEEPSPEED 2")
    assert two["thresholds"][0] == two["thresholds"][1] == pytest.approx(one["thresholds"][0], abs=1e-5)
    assert two["filtered"] == one["filtered"]
    assert (one["filtered"] is not None) == (name == "interventions")
    compared = 0
    for mine, theirs in zip(one["history"], two["history"], strict=True):
        for key, value in mine.items():
            if key == "loss" or key.startswith(("concepts/", "rewards/", "logps/")):
                assert theirs[key] == pytest.approx(value, rel=1e-4, abs=1e-4), (name, key, mine["step"])
                compared += 1
    assert compared > 3 * 15
    for key in SHARES[name]:
        assert any(entry.get(f"concepts/{key}") for entry in one["history"]), key
    file = "adapter_model.safetensors" if "lora" in name else "model.safetensors"
    mine, theirs = (load_file(folder / file) for folder in (here, there))
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        torch.testing.assert_close(theirs[key].float(), value.float(), rtol=0, atol=1e-4, msg=f"{name} {key}")
