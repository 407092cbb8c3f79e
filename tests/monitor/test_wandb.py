"""The W&B sink with the real library, offline: what it wrote is read back from the run's own files."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import wandb

from shapedpo.monitor.wandb import WandbSink
from shapedpo.monitor.wandb.tables import CELL, HISTORY, PAIR_COLUMNS, RANKED_COLUMNS, Latest, Z, number
from tests.monitor.records import synthetic
from tests.wandb_files import AXIS, CHARTS, TABLES, Written, feed, start


pytestmark = pytest.mark.usefixtures("wandb_offline")

HOSTILE = "<script>alert(1)</script><a href='https://evil.example'>x</a> $a$ | \ud800 \x00 \U0001f47a"


@pytest.fixture(scope="module")
def records() -> list[Any]:
    return synthetic(concepts=6, steps=40, features=12, samples=6, probes=5)


@pytest.fixture(scope="module")
def written(records, tmp_path_factory) -> Written:
    """A whole run of 400 steps."""
    with pytest.MonkeyPatch.context() as patch:
        wandb.teardown()
        for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
            patch.setenv(name, str(tmp_path_factory.mktemp(name.lower())))
        patch.setenv("WANDB_MODE", "offline")
        run, sink = start(), WandbSink()
        folder = run.sync_dir
        sink.open([])
        feed(sink, records)
        sink.close()
        wandb.finish()
        wandb.teardown()
    return Written(folder)


def latest(records: list[Any]) -> Latest:
    state = Latest()
    for record in records:
        state.update(record)
    return state


# --- what is in the run ------------------------------------------------------------------------------------------------------


def test_config_has_what_was_asked(records, written):
    asked, config = records[0], written.config["shapedpo"]
    assert list(config["concepts"]) == [concept["name"] for concept in asked["concepts"]]
    for concept in asked["concepts"]:
        assert config["concepts"][concept["name"]] | {"name": concept["name"]} == concept
    assert config["data"] == asked["data"]
    assert config["model"] == asked["model"]


def test_everything_is_plotted_against_the_step(written):
    assert "train/global_step" in written.metrics
    for group in ("concepts/*", "probe/*", "train/concepts/*", "train/probe/*"):
        assert written.metrics[group] == "train/global_step"
    steps = [row["train/global_step"] for row in written.rows]
    assert steps == sorted(set(steps))
    assert (steps[0], steps[-1]) == (0, 400)


def test_logs_tables_and_charts_and_no_scalar(written):
    assert {key for row in written.rows for key in row} == TABLES | CHARTS | AXIS
    assert set(written.summary) - {"_wandb"} == TABLES | CHARTS | AXIS


def test_summary_has_the_last_table_and_the_history_all(written):
    for key in TABLES | CHARTS:
        logged = [row[key] for row in written.rows if key in row]
        assert len({value["path"] for value in logged}) == len(logged)
        assert len(logged) > 3
        assert written.summary[key]["path"] == logged[-1]["path"]


def test_amplified_and_suppressed_are_ranked_together(records, written):
    last = {record["type"]: record for record in records}
    values = {concept["label"]: last["step"]["concepts"][concept["name"]] for concept in records[0]["concepts"]}
    features = {entry["feature"]: entry for entry in last["features"]["amplified"] + last["features"]["suppressed"]}
    seen = []
    for key, sign in (("concepts/amplified", 1), ("concepts/suppressed", -1)):
        assert written.values(key)[-1]["columns"] == list(RANKED_COLUMNS)
        table = written.table(key)
        assert [row["rank"] for row in table] == list(range(1, len(table) + 1))
        assert {row["kind"] for row in table} == {"concept", "SAE feature"}
        clear = [sign * (row["low"] if sign > 0 else row["high"]) > 0 for row in table]
        assert clear == sorted(clear, reverse=True)
        inside = [sign * row["amplification"] for row, ok in zip(table, clear, strict=True) if ok]
        assert inside == sorted(inside, reverse=True)
        for row in table:
            entry = values[row["label"]] if row["kind"] == "concept" else features[row["feature"]]
            value, error = entry["amplification"]
            assert (row["step"], row["amplification"], sign * value > 0) == (400, value, True)
            assert (row["low"], row["high"]) == pytest.approx((value - Z * error, value + Z * error))
            assert (row["pressure"], row["delta"]) == (entry["pressure"][0], entry["delta"][0])
            assert "row " in row["example rows"]
        seen += [(row["kind"], row["label"], row["feature"]) for row in table]
    assert len(seen) == len(set(seen)) == len(values) + len(features)


def test_columns_have_types(written):
    """W&B sorts and plots a column by its type."""
    types = written.artifacts["concepts/amplified.table.json"][-1]["column_types"]["params"]["type_map"]
    for name, kind in RANKED_COLUMNS.items():
        allowed = {entry["wb_type"] for entry in types[name]["params"]["allowed_types"]}
        assert allowed == {"none", "string" if kind is str else "number"}, name


def test_pairs(records, written):
    last = {record["type"]: record for record in records}["pairs"]["concepts"]
    table = written.table("concepts/pairs")
    assert list(table[0]) == list(PAIR_COLUMNS)
    for name, pairs in last.items():
        rows = [row for row in table if row["label"] == name]
        assert [row["row"] for row in rows] == [pair["row"] for pair in pairs]
        assert [row["contribution"] for row in rows] == [pair["contribution"] for pair in pairs]
        assert [row["chosen"] for row in rows] == [pair["chosen"][:CELL] for pair in pairs]
    assert any(row["kind"] == "SAE feature" for row in table)


def test_rollouts_before_and_now(records, written):
    first, *_, last = [record for record in records if record["type"] == "probe"]
    table = written.table("probe/rollouts")
    assert len(table) == len(last["samples"])
    for row, before, now in zip(table, first["samples"], last["samples"], strict=True):
        assert (row["prompt"], row["before"], row["now"]) == (now["prompt"], before["completion"], now["completion"])
        assert row["step"] == last["step"]
        for name, score in now["scores"].items():
            assert (row[f"{name} before"], row[f"{name} now"]) == (before["scores"][name], score)


def test_top_chart_has_intervals(records, written):
    chart = written.values("concepts/top")[-1]
    (bars,) = chart["data"]
    amplified, suppressed = latest(records).ranked()
    items = amplified[:12] + suppressed[:12][::-1]
    assert bars["x"] == pytest.approx([item.value for item in items], rel=1e-3)
    assert bars["error_x"]["array"] == pytest.approx([Z * item.error for item in items], rel=1e-3)
    assert chart["layout"]["yaxis"]["ticktext"] == [item.label for item in items]


def test_heatmap_is_concept_by_step(records, written):
    (cells,) = written.values("concepts/heatmap")[-1]["data"]
    steps = [record for record in records if record["type"] == "step"]
    assert cells["x"] == [record["step"] for record in steps]
    labels = written.values("concepts/heatmap")[-1]["layout"]["yaxis"]["ticktext"]
    for concept in records[0]["concepts"]:
        expected = [record["concepts"][concept["name"]]["amplification"][0] for record in steps]
        assert cells["z"][labels.index(concept["label"])] == pytest.approx(expected, rel=1e-3)
    assert cells["zmin"] == -cells["zmax"]
    first, *_, last = [record for record in records if record["type"] == "features"]
    names = {entry["feature"]: entry["label"] for entry in (*last["amplified"], *last["suppressed"])}
    for entry in (*first["amplified"][:3], *first["suppressed"][:3]):
        row = cells["z"][labels.index(names[entry["feature"]])]
        known = cells["x"].index(first["step"])
        assert row[:known] == [None] * known  # not ranked yet
        assert row[known : known + 3] == pytest.approx(
            [entry["amplification"][0]] * 3, rel=1e-3
        )  # until the next ranking


def test_predicted_against_observed(records, written):
    charts = written.values("probe/predicted_vs_observed")
    probes = [record for record in records if record["type"] == "probe"]
    assert len(charts) == len(probes) - 1  # at step 0 nothing is predicted
    last, chart = probes[-1], charts[-1]
    assert f"R² = {last['r2']:.2f}" in chart["layout"]["title"]["text"]
    assert last["predictor"] in chart["layout"]["xaxis"]["title"]["text"]
    assert last["estimator"] in chart["layout"]["yaxis"]["title"]["text"]
    points = {trace["name"]: trace for trace in chart["data"]}
    for name, entries in (("concepts", last["concepts"].values()), ("SAE features", last["features"])):
        entries = list(entries)
        for axis, key in (("x", "predicted"), ("y", "change")):
            assert points[name][axis] == pytest.approx([number(entry[key]) for entry in entries], rel=1e-3)
            errors = points[name][f"error_{axis}"]["array"]
            assert errors == pytest.approx([Z * number(entry[key], 1) for entry in entries], rel=1e-3)


# --- sizes and rate ----------------------------------------------------------------------------------------------------------


def test_a_large_run_stays_within_the_advised_sizes():
    """65k features watched, a hundred in each table, long texts: bounded rows, cells, values and charts."""
    run, sink = start(), WandbSink()
    folder = run.sync_dir
    sink.write(synthetic(concepts=150, steps=1, features=150, samples=120, rows=4, words=160, probes=2))
    sink.close()
    wandb.finish()
    result = Written(folder)
    for key in TABLES:
        table = result.values(key)[-1]
        assert 50 < len(table["data"]) <= 250
        assert max(len(cell) for row in table["data"] for cell in row if isinstance(cell, str)) <= CELL
        assert result.file(result.summary[key]).stat().st_size < 1e6
    for key in CHARTS:
        assert result.file(result.summary[key]).stat().st_size < 1e5
    assert all(len(json.dumps(value)) < 2000 for row in result.rows for value in row.values())
    assert "bdata" not in "".join(path.read_text() for path in folder_charts(result))


def folder_charts(result: Written) -> list[Path]:
    return sorted((result.folder / "files/media/plotly").rglob("*.json"))


def test_a_long_run_logs_few_tables():
    """10,000 logging steps of a run of 100,000, of which 51 have pairs too: at those, and no oftener than 25 times."""
    run, sink = start(), WandbSink()
    folder = run.sync_dir
    asked = synthetic(concepts=2, steps=1, features=0, probes=0)[0]
    asked["settings"]["max_steps"] = 100_000
    sink.write([asked])
    ranked = {10, *range(2000, 100_001, 2000)}
    for step in range(10, 100_001, 10):
        entry = {"amplification": [1.0 + step, 0.1], "pressure": [0.1, 0.1], "delta": [0.1, 0.1], "strength": None}
        pairs = [{"type": "pairs", "step": step, "concepts": {}}] if step in ranked else []
        sink.write([{"type": "step", "step": step, "concepts": {"goblin": entry}}, *pairs])
    sink.write([{"type": "end", "step": 100_000}])
    sink.close()
    wandb.finish()
    result = Written(folder)
    steps = [row["train/global_step"] for row in result.rows]
    assert 20 < len(steps) < 30
    assert set(steps) <= ranked
    assert (steps[0], steps[-1]) == (10, 100_000)
    assert max(later - step for step, later in pairwise(steps)) <= 4000
    (cells,) = result.values("concepts/heatmap")[-1]["data"]
    assert HISTORY / 2 <= len(cells["x"]) <= HISTORY
    assert (cells["x"][0], cells["x"][-1]) == (10, 100_000)


def test_hostile_text_and_unknown_values():
    """Text is shown, never markup; nothing that JSON or W&B cannot hold gets in their way."""
    run, sink = start(), WandbSink()
    folder = run.sync_dir
    nothing = {"amplification": [None, None], "pressure": None, "delta": [None, None], "strength": None}
    pair = {"row": 1, "prompt": HOSTILE, "chosen": None, "rejected": None, "delta": None, "margin": None}
    feature = {"feature": 7, "label": HOSTILE, "amplification": [0.5, None], "pressure": [0.1, None], "rows": [pair]}
    samples = [{"prompt": HOSTILE, "completion": HOSTILE, "scores": {}}, {"prompt": None, "completion": None}]
    sink.write(
        [
            {"type": "run", "step": 0, "concepts": [{"name": "a", "label": HOSTILE, "threshold": None}]},
            {"type": "step", "step": 1, "concepts": {"a": {"amplification": [-1.0, 0.1]}, "b": nothing}},
            {"type": "features", "step": 1, "amplified": [feature], "suppressed": []},
            {"type": "pairs", "step": 1, "concepts": {"a": [pair], "b": []}},
            {
                "type": "probe",
                "step": 1,
                "concepts": {"a": {"change": [1, 0.1], "predicted": None}},
                "samples": samples,
            },
            {"type": "tomorrow", "step": 1, "anything": object()},
        ]
    )
    sink.close()
    wandb.finish()
    result = Written(folder)
    assert [row["label"] for row in result.table("concepts/amplified")] == [HOSTILE]
    assert [row["high"] for row in result.table("concepts/amplified")] == [None]
    assert [row["low"] < -1 for row in result.table("concepts/suppressed")] == [True]
    assert [row["before"] for row in result.table("probe/rollouts")] == [HOSTILE, None]
    assert not result.values("probe/predicted_vs_observed")
    for path in folder_charts(result):
        text = path.read_text()
        assert "&lt;script&gt;" in text
        assert "<a" not in text
        assert "$" not in text
