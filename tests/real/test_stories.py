"""The table of `benchmarks/stories/` at its smallest, on a real pretrained model (`SHAPEDPO_STORIES`; skips without it).

What is planted, how, and why the sizes are what they are: see the benchmark. Its samples and its SAE, as `World.build(QUICK, folder)` leaves
them, lie in `stories/`: what the test asks for does not hang on the last digits of a machine's SAE training. About a minute of one core.
"""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import pytest

from benchmarks.stories import MODEL, QUICK, World, choose_features, heldout_rates, load, train
from benchmarks.stories.__main__ import runs


STORIES = Path(__file__).parent / "stories"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not MODEL.is_dir(), reason=f"the model is not at {MODEL} (SHAPEDPO_STORIES)"),
]


def test_shaping_keeps_out_the_dialogue_that_plain_dpo_learns(tmp_path: Path) -> None:
    shutil.copytree(STORIES / "sae", tmp_path / "sae")
    (tmp_path / "samples.json").write_bytes(gzip.decompress((STORIES / "samples.json.gz").read_bytes()))
    world = World.build(QUICK, tmp_path)
    features, auroc = choose_features(world)
    assert min(auroc) > 0.6
    assert max(auroc) > 0.9

    before = heldout_rates(world, load()[0])
    concepts = runs(world, features)
    trained = {name: train(world, concepts[name]) for name in ("plain", "reward 2")}
    plain, shaped = (heldout_rates(world, trained[name][0]) for name in trained)
    print(f"\nbefore {before}\nplain  {plain}\nshaped {shaped}")

    assert before["dialogue"] < 0.2
    assert plain["dialogue"] >= 0.55
    assert shaped["dialogue"] <= 0.25
    # The traits that the data is meant to teach: plain DPO learns them, and shaping leaves them as they are.
    assert plain["mom"] > before["mom"] + 0.1
    assert plain["friend"] < before["friend"] - 0.1
    assert abs(plain["friend"] - shaped["friend"]) <= 0.05
    assert abs(plain["mom"] - shaped["mom"]) <= 0.05
    # The run says that the data pushes the concept, from the first step on.
    logged = [log for log in trained["reward 2"][1] if "concepts/dialogue/delta" in log]
    assert logged[0]["concepts/dialogue/delta"] > 0.2
    assert logged[0]["concepts/dialogue/pressure"] > 0.1
    assert all(log["concepts/dialogue/strength"] == 2.0 for log in logged)
