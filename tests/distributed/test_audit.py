"""`shapedpo audit` on two processes: they share the rows, and what they leave is what one process leaves."""

from __future__ import annotations

import pytest

from shapedpo.audit import Harvest
from shapedpo.audit.harvesting import shards
from tests import helpers
from tests.audit.test_harvest import harvested
from tests.distributed import jobs


pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


def test_two_processes_share_the_command(tmp_path, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)  # the bars are looked at
    data = helpers.pairs(44, seed=6)
    data.to_json(tmp_path / "data.jsonl")
    expected = harvested(tmp_path / "alone", data, max_length=14, sample=40)
    words = [
        *("audit", "--model", str(helpers.model_path()), "--sae", str(helpers.sae_path())),
        *("--dataset", str(tmp_path / "data.jsonl"), "--out", str(tmp_path / "out"), "--sample", "40"),
        *("--max-length", "14", "--shard-rows", "10", "--batch-tokens", "100", "--harvest-only"),
    ]
    with jobs.server() as start:
        job = start(jobs.command, 2, tmp_path / "out", words)
        job.finish()
    main, other = (job.log(rank) for rank in range(2))
    assert "file 2 of 2" in main  # it had two of the four
    assert "of 4" not in main + other
    assert (main + other).count("40 pairs, 48 features") == 1
    found = Harvest.open(tmp_path / "out" / "harvest")
    assert found.settings["dataset"] == str(tmp_path / "data.jsonl")
    prints = [shards.read_manifest(harvest.folder)["fingerprint"] for harvest in (found, expected)]
    assert prints[0] == prints[1]
    for path in sorted(expected.folder.glob("*.parquet")):
        assert (found.folder / path.name).read_bytes() == path.read_bytes()
