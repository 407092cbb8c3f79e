"""TRL's own tests with our class in place of theirs, where the tests are at hand (they are not part of TRL's package).

    SHAPEDPO_TRL_TESTS=/path/to/trl pytest tests/upstream

Without the variable, a small file in the shape of TRL's checks that the harness itself works.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.upstream.hub import build_hub
from tests.upstream.run_trl_tests import export_tests, regressions, report, run


SOURCE = os.environ.get("SHAPEDPO_TRL_TESTS")
REVISION = os.environ.get("SHAPEDPO_TRL_REVISION", "HEAD")

# What TRL's tests do, in one test that any trainer passes, one that fails for both, one that only TRL's class passes.
_LIKE_TRL = """
import pytest
from datasets import load_dataset
from trl import DPOConfig, DPOTrainer


def trainer(tmp_path, kind):
    dataset = load_dataset("trl-internal-testing/zen", kind, split="train")
    args = DPOConfig(output_dir=str(tmp_path), max_steps=1, report_to="none", use_cpu=True, bf16=False)
    return DPOTrainer("trl-internal-testing/tiny-Qwen2ForCausalLM-2.5", args=args, train_dataset=dataset)


@pytest.mark.parametrize("kind", ["standard_preference", "conversational_implicit_prompt_preference"])
def test_train(tmp_path, kind):
    assert trainer(tmp_path, kind).train().training_loss > 0


def test_fails():
    raise AssertionError("for both")


def test_theirs_alone():
    assert DPOTrainer.__name__ == "DPOTrainer"


def test_vision():
    load_dataset("trl-internal-testing/zen-image", "conversational_preference")
"""


def test_harness_compares_the_two_trainers(tmp_path: Path) -> None:
    (tmp_path / "source" / "tests").mkdir(parents=True)
    (tmp_path / "source" / "tests" / "test_dpo_trainer.py").write_text(_LIKE_TRL)
    tests = tmp_path / "run" / "trl_tests"
    export_tests(tmp_path / "source", tests)
    environment = build_hub(tmp_path / "hub")
    theirs, ours = (run(tests, trainer, environment) for trainer in ("theirs", "ours"))

    outcomes = [result["outcome"] for result in theirs.values()]
    assert outcomes == ["passed", "passed", "failed", "passed", "skipped"], report({"theirs": theirs})
    assert regressions(theirs, ours) == ["trl_tests/test_dpo_trainer.py::test_theirs_alone"], report({"ours": ours})


def test_export_says_what_it_looked_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no tests/test_dpo_trainer\.py in .*pass a checkout of TRL"):
        export_tests(tmp_path, tmp_path / "exported")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(SOURCE is None, reason="SHAPEDPO_TRL_TESTS does not name a checkout of TRL")
def test_what_passes_with_theirs_passes_with_ours(tmp_path: Path) -> None:
    tests = tmp_path / "run" / "trl_tests"
    export_tests(Path(str(SOURCE)), tests, REVISION)
    environment = build_hub(tmp_path / "hub")
    columns = {trainer: run(tests, trainer, environment) for trainer in ("theirs", "ours", "ours+config")}
    print(report(columns))
    assert regressions(columns["theirs"], columns["ours"]) == []
    assert regressions(columns["theirs"], columns["ours+config"]) == []
