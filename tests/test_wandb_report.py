"""`shapedpo wandb-report`: the specification that W&B's own library makes, and what is said where something is missing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from wandb_workspaces.reports.v2 import Report, internal

from shapedpo import cli
from shapedpo.scripts.wandb_report import CHARTED
from tests.monitor.records import synthetic


SECTIONS = [
    "What was asked",
    "Amplified and suppressed",
    "Concept by concept",
    "Predicted against observed",
    "Rollouts before and now",
]


@pytest.fixture
def folder(tmp_path):
    """Writes an output folder of a run; gives its path."""

    def write(records: list[Any] | None = None, end: str = "") -> Path:
        records = synthetic(steps=3) if records is None else records
        text = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / "concepts.jsonl").write_text(text + end)
        return tmp_path

    return write


def specification(capsys: pytest.CaptureFixture[str], *args: object) -> dict[str, Any]:
    assert cli.main(["wandb-report", *map(str, args), "--dry-run"]) == 0
    return json.loads(capsys.readouterr().out)


def error(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    assert cli.main(["wandb-report", *map(str, args)]) == 2
    return capsys.readouterr().err


def grids(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [block["metadata"] for block in spec["spec"]["blocks"] if block["type"] == "panel-grid"]


def panels(spec: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    every = [panel for grid in grids(spec) for panel in grid["panelBankSectionConfig"]["panels"]]
    return [panel["config"] for panel in every if panel["viewType"] == kind]


def headings(spec: dict[str, Any], level: int) -> list[str]:
    blocks = [block for block in spec["spec"]["blocks"] if block["type"] == "heading" and block["level"] == level]
    return [block["children"][0]["text"] for block in blocks]


def markdown(spec: dict[str, Any]) -> str:
    return "\n".join(block["content"] for block in spec["spec"]["blocks"] if block["type"] == "markdown-block")


def test_report_of_an_output_folder(folder, capsys):
    spec = specification(capsys, folder(), "--project", "mine", "--entity", "team")
    assert (spec["entity"], spec["project"], spec["displayName"]) == ("team", "mine", "Concepts of goblin-world-hold")
    assert headings(spec, 2) == SECTIONS
    assert [grid["runSets"][0]["search"]["query"] for grid in grids(spec)] == ["goblin-world-hold"] * len(grids(spec))
    for concept in synthetic(steps=1)[0]["concepts"]:
        assert f"| {concept['name']} | {concept['action']} |" in markdown(spec)
    assert "ab12f09c77d1e3aa" in markdown(spec)

    lines = {panel["chartTitle"]: panel for panel in panels(spec, "Run History Line Plot")}
    assert all(panel["xAxis"] == "train/global_step" for panel in lines.values())
    assert "train/concepts/invented links/amplification" in lines["invented links"]["metrics"]


def test_shows_what_the_sink_logs(folder, capsys):
    spec = specification(capsys, folder(), "--project", "mine")
    charts = {key for panel in panels(spec, "Media Browser") for key in panel["mediaKeys"]}
    assert charts == {"concepts/top", "concepts/heatmap", "probe/predicted_vs_observed"}
    queried = [panel["panel2Config"]["exp"]["fromOp"]["inputs"]["key"]["val"] for panel in panels(spec, "Weave")]
    assert queried == ["concepts/amplified", "concepts/suppressed", "concepts/pairs", "probe/rollouts"]


def test_the_library_reads_its_specification_back(folder, capsys):
    """What is printed is a whole report to W&B's library, with no two panels of a grid on top of each other."""
    spec = specification(capsys, folder(synthetic(steps=1, concepts=40)), "--project", "mine")
    model = internal.ReportViewspec(
        display_name=spec["displayName"],
        description=spec["description"],
        project=internal.Project(name=spec["project"], entity_name=spec["entity"]),
        spec=internal.Spec.model_validate(spec["spec"]),
    )
    report = Report._from_model(model)
    assert report.title == spec["displayName"]
    assert len([block for block in report.blocks if type(block).__name__ == "PanelGrid"]) == len(grids(spec))
    assert len(panels(spec, "Run History Line Plot")) == CHARTED + 1 + 3
    for grid in grids(spec):
        cells: set[tuple[int, int]] = set()
        for panel in grid["panelBankSectionConfig"]["panels"]:
            at = panel["layout"]
            own = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
            assert not cells & own
            cells |= own


@pytest.mark.parametrize("run", ["team/mine/ab12", "https://wandb.ai/team/mine/runs/ab12?nw=x", "team/mine/runs/ab12/"])
def test_report_of_a_run(run, capsys):
    """Without the network the concepts are unknown, but not which run it is, or what every run logs."""
    spec = specification(capsys, run)
    assert (spec["entity"], spec["project"], spec["displayName"]) == ("team", "mine", "Concepts of ab12")
    for grid in grids(spec):
        (only,) = grid["runSets"][0]["filters"]["filters"]
        assert (only["key"]["name"], only["op"], only["value"]) == ("name", "=", "ab12")
    assert headings(spec, 2) == SECTIONS
    (pattern, *_) = [panel["metricRegex"] for panel in panels(spec, "Run History Line Plot")]
    assert pattern == "^train/concepts/.*/amplification$"


def test_a_run_that_was_killed_and_text_from_data(folder, capsys):
    records = synthetic(steps=1)
    records[0]["run_name"] = 'it\'s "quoted"'
    records[0]["concepts"][0]["label"] = "<b>x</b> | [y](https://evil.example)\n# z"
    spec = specification(capsys, folder(records, end='{"type": "st'), "--project", "mine", "--run-id", "ab12")
    assert spec["displayName"] == 'Concepts of it\'s "quoted"'
    text = markdown(spec)
    assert r"\<b\>x\</b\> \| \[y\]\(https://evil.example\) \# z \(goblin\)" in text
    assert specification(capsys, folder(records), "--project", "mine")  # a name that W&B's filters could not quote


def test_says_what_is_wrong(folder, tmp_path, capsys, monkeypatch):
    assert "Expected ENTITY/PROJECT/RUN_ID" in error(capsys, "team/mine")
    assert "no concepts.jsonl" in error(capsys, tmp_path, "--project", "mine")
    assert "--project" in error(capsys, folder())
    assert "no record of type 'run'" in error(capsys, folder([]), "--project", "mine")
    assert "go with an output folder" in error(capsys, "team/mine/ab12", "--run-id", "cd34")
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "wandb login" in error(capsys, "team/mine/ab12")
    assert "wandb login" in error(capsys, folder(), "--project", "mine", "--entity", "team")


def test_says_how_to_install_what_is_missing(folder, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "wandb_workspaces"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)  # what Python itself does for a module that is not there
    assert "pip install 'shapedpo[wandb-report]'" in error(capsys, folder(), "--project", "mine", "--dry-run")
