"""The benchmark of the harvest at its smallest, and the made-up harvests: they have what they say they have."""

from __future__ import annotations

import numpy as np

from benchmarks import synthetic_harvest
from benchmarks.harvest import QUICK, audit_alone, measure_cost, write_cost, write_growth
from benchmarks.synthetic_harvest import BURST, Synthetic


def test_quick_cost(tmp_path):
    row = measure_cost(QUICK, 2, "cpu")
    assert row["layout"] == "shared"
    assert row["harvest, s"] > row["bare, s"] > 0
    assert row["bytes a pair"] > 100
    text = write_cost(row, QUICK, "cpu", tmp_path)
    assert (tmp_path / "harvest-cost-cpu.md").read_text() == text
    assert f"{row['over bare'][0]:.3f} (" in text


def test_made_up_harvests(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic_harvest, "FRESH", 100)
    monkeypatch.setattr(synthetic_harvest, "ACTIVE", 8)
    world = Synthetic(190, d_sae=2048, topics=8, lessons=3, shard_rows=50)
    harvest = world.write(tmp_path)
    fresh, other, again, last = harvest.shards()
    assert (len(last.rows), harvest.rows.tolist()) == (40, list(range(190)))
    for shard in (fresh, other):
        for span in (shard.prompt, shard.chosen, shard.rejected):
            features = np.diff(span.max.indptr)
            per_root = features / np.sqrt(span.tokens)
            assert 0.6 < per_root.mean() / (8 / BURST) < 1.4  # how many repeat depends on the size
            assert (features <= harvest.d_sae).all()
            counts = span.freq.data * np.repeat(span.tokens, features)
            np.testing.assert_allclose(counts, np.rint(counts), atol=1e-3)
            assert counts.min() >= 1 - 1e-3
    both = (fresh.chosen.max > 0).multiply(fresh.rejected.max > 0).sum() / fresh.chosen.max.nnz
    assert 0.3 < both < 0.9
    # The third file is the first with something left out.
    assert ((again.chosen.max != 0) > (fresh.chosen.max != 0)).nnz == 0
    assert 0.82 < again.chosen.max.nnz / fresh.chosen.max.nnz < 0.88
    # A lesson: its group is in most chosen completions of its topic, and in few rejected ones.
    topic = np.searchsorted(world.topic_chance, np.random.default_rng([0, 0]).random(50))
    taught = np.isin(topic, world.lesson_topics)
    assert taught.any()
    groups = {t: world.groups[g] for t, g in zip(world.lesson_topics, world.lesson_groups, strict=True)}
    shown = [
        np.mean([side.max[i, groups[topic[i]]].toarray() > 0 for i in np.flatnonzero(taught)])
        for side in (fresh.chosen, fresh.rejected)
    ]
    assert shown[0] > 0.7
    assert shown[1] < 0.5
    row = {"pairs": 190, "harvest, GB": 0.01, **audit_alone(tmp_path)}
    assert row["peak, GB"] > 0.05
    assert "| 190 | 0.01 |" in write_growth([row], 2048, tmp_path / "out")
