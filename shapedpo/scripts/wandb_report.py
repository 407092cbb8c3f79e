"""`shapedpo wandb-report`: a saved W&B report of a run's concepts, built with W&B's own library (`wandb-workspaces`)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import UserError, as_user_error


STEP = "train/global_step"
CHARTED = 24
"""Concepts with a chart each; of further ones all lines are in one chart."""
WIDE = 24
"""Columns of a report's grid."""
INTRODUCTION = (
    "**Amplification** is the first-order change of a concept's mean score under the policy, in standard deviations (sd) of the score: positive is "
    "amplified, negative suppressed. It costs no rollouts and is a gauge, best while the policy is near the reference. "
    "**Pressure** is how hard the loss still pushes the concept. **Probe rollouts** show what has come of it."
)


@dataclass(frozen=True)
class Source:
    """Where a report's run is, and what is known of it.

    Args:
        project: W&B project.
        entity: W&B user or team; empty for the user's default.
        run_id: The run's id, if known.
        name: The run's display name, if known.
        described: The run's config under `shapedpo`: `concepts` by name, `data`, `model`. Empty where unknown.
    """

    project: str
    entity: str = ""
    run_id: str | None = None
    name: str | None = None
    described: Mapping[str, Any] = field(default_factory=dict)


def main(
    run: str, *, project: str | None = None, entity: str | None = None, run_id: str | None = None, dry_run: bool = False
) -> int:
    """Build the report of a run, and save it or print its specification.

    Args:
        run: `ENTITY/PROJECT/RUN_ID`, the address of a run's page, or a run's output folder, which has `concepts.jsonl`.
        project: W&B project, for an output folder.
        entity: W&B user or team, for an output folder; the user's default if not given.
        run_id: The W&B run's id, for an output folder; without it the run is found by its name.
        dry_run: Whether to print the specification as JSON, without the network.

    Returns:
        The exit status.

    Raises:
        UserError: If the run is not given as it should be, or W&B's library or W&B is not there.
    """
    library = _library()
    source = _source(run, project, entity, run_id, online=not dry_run)
    if dry_run:
        print(json.dumps(specification(source), indent=2))
        return 0
    try:
        report = build(library, source, grid_project=True)
        report.save()
    except Exception as error:  # W&B's client has no common class for a missing login, permission, project or network
        raise UserError(
            f"The report could not be saved in {source.entity or 'the default entity'}/{source.project} "
            f"({type(error).__name__}: {error}). Log in with `wandb login`, and check the entity and the project."
        ) from error
    print(report.url)
    return 0


def specification(source: Source) -> dict[str, Any]:
    """The report as it would be sent to W&B, made without the network.

    Returns:
        `entity`, `project`, `displayName`, `description`, and `spec` with the report's blocks.
    """
    # A grid with a project asks W&B for the project's number. Without one it shows runs of the report's own project.
    model = build(_library(), source, grid_project=False)._to_model()
    return {
        "entity": source.entity,
        "project": source.project,
        "displayName": model.display_name,
        "description": model.description,
        "spec": json.loads(model.spec.model_dump_json(by_alias=True, exclude_none=True)),
    }


def build(wr: ModuleType, source: Source, *, grid_project: bool) -> Any:
    """The report, not yet saved.

    Args:
        wr: `wandb_workspaces.reports.v2`.
        source: The run.
        grid_project: Whether the grids name the project, which the library then looks up in W&B.
    """

    def grid(*panels: Any) -> Any:
        return wr.PanelGrid(runsets=[_runset(wr, source, grid_project)], panels=list(panels), hide_run_sets=True)

    def table(key: str) -> Any:
        return grid(wr.WeavePanelSummaryTable(table_name=key, layout=wr.Layout(w=WIDE, h=12)))

    def chart(key: str, title: str) -> Any:
        layout = wr.Layout(w=WIDE, h=14)
        return grid(wr.MediaBrowser(title=title, media_keys=[key], num_columns=1, layout=layout))

    blocks = [
        wr.MarkdownBlock(text=INTRODUCTION),
        wr.TableOfContents(),
        wr.H2("What was asked"),
        wr.MarkdownBlock(text=_asked(source)),
        wr.H2("Amplified and suppressed"),
        chart("concepts/top", "The largest, with 95 % intervals"),
        wr.H3("Amplified"),
        table("concepts/amplified"),
        wr.H3("Suppressed"),
        table("concepts/suppressed"),
        wr.H2("Concept by concept"),
        chart("concepts/heatmap", "Amplification by step"),
        grid(*_lines(wr, source)),
        wr.H3("The pairs responsible"),
        table("concepts/pairs"),
        wr.H2("Predicted against observed"),
        chart("probe/predicted_vs_observed", "Change of the mean score: estimate against probe rollouts"),
        grid(*_probe_lines(wr)),
        wr.H2("Rollouts before and now"),
        table("probe/rollouts"),
    ]
    title = f"Concepts of {source.name or source.run_id or source.project}"
    # Without an entity the library asks W&B for the default one, which a specification must do without.
    known = {"entity": source.entity} if source.entity or not grid_project else {}
    return wr.Report(
        project=source.project,
        title=title[:128],
        description="What the training amplified and suppressed. Made by shapedpo.",
        blocks=blocks,
        width="fluid",
        **known,
    )


def _runset(wr: ModuleType, source: Source, grid_project: bool) -> Any:
    where = {"entity": source.entity, "project": source.project} if grid_project else {}
    if source.run_id is not None:
        return wr.Runset(filters=f"Metric('ID') == {source.run_id!r}", **where)
    # The library's filters cannot quote every name; its search can take any.
    return wr.Runset(query=source.name or "", **where)


def _lines(wr: ModuleType, source: Source) -> list[Any]:
    names = list(source.described.get("concepts") or {})[:CHARTED]
    keys = ("amplification", "pressure", "delta", "strength")
    panels = [
        wr.LinePlot(
            title=name,
            x=STEP,
            y=[f"train/concepts/{name}/{key}" for key in keys],
            layout=wr.Layout(x=8 * (index % 3), y=7 * (index // 3), w=8, h=7),
        )
        for index, name in enumerate(names)
    ]
    layout = wr.Layout(x=0, y=7 * -(-len(names) // 3), w=WIDE, h=9)
    pattern = r"^train/concepts/.*/amplification$"
    panels.append(wr.LinePlot(title="Amplification of all", x=STEP, metric_regex=pattern, layout=layout))
    return panels


def _probe_lines(wr: ModuleType) -> list[Any]:
    titles = {
        "rate": "Rate in probe rollouts",
        "score": "Mean score in probe rollouts",
        "change": "Change since the start (sd)",
    }
    return [
        wr.LinePlot(
            title=title, x=STEP, metric_regex=rf"^train/probe/.*/{key}$", layout=wr.Layout(x=8 * column, w=8, h=8)
        )
        for column, (key, title) in enumerate(titles.items())
    ]


def _asked(source: Source) -> str:
    """The concepts as a Markdown table, with the model and the data."""
    concepts = source.described.get("concepts") or {}
    if not concepts:
        return "The run's config has the concepts under `shapedpo.concepts`."
    lines = ["| concept | action | method | strength | reads | threshold |", "| --- | --- | --- | --- | --- | --- |"]
    for name, entry in concepts.items():
        readout = entry.get("readout") or {}
        reads = ", ".join(str(value) if key == "type" else f"{key}: {value}" for key, value in readout.items())
        label = name if entry.get("label") in (None, name) else f"{entry['label']} ({name})"
        method = None if entry.get("action") in ("watch", "hold") else entry.get("method")
        cells = [label, entry.get("action"), method, entry.get("strength"), reads, entry.get("threshold")]
        lines.append("| " + " | ".join(_plain(cell) for cell in cells) + " |")
    data = source.described.get("data") or {}
    lines += ["", f"Model: {_plain(source.described.get('model'))}. Data: {_plain(data.get('rows'))} rows, "]
    lines[-1] += f"fingerprint {_plain(data.get('fingerprint'))}."
    return "\n".join(lines)


def _plain(value: Any) -> str:
    """A value as text of a Markdown cell: no markup of its own, no end of the cell, bounded."""
    text = "" if value is None else str(value)
    text = text[:157] + "..." if len(text) > 160 else text
    return re.sub(r"([\\`*_{}\[\]()<>#|!~$])", r"\\\1", " ".join(text.split())) or "-"


def _library() -> ModuleType:
    try:
        import wandb_workspaces.reports.v2 as wr
    except ImportError as error:
        raise UserError(
            "`shapedpo wandb-report` needs W&B's library for reports, which is not installed. "
            "Install it with: pip install 'shapedpo[wandb-report]'  (or: pip install wandb-workspaces)"
        ) from error
    return wr


def _source(run: str, project: str | None, entity: str | None, run_id: str | None, *, online: bool) -> Source:
    if Path(run).is_dir():
        return _from_folder(Path(run), project, entity, run_id)
    path = re.sub(r"^https?://[^/]+/", "", run.strip().split("?")[0]).strip("/")
    parts = [part for part in path.split("/") if part]
    if len(parts) == 4 and parts[2] == "runs":
        del parts[2]
    if len(parts) != 3:
        raise UserError(
            f"Expected ENTITY/PROJECT/RUN_ID, the address of a run's page, or an existing output folder, got {run!r}. "
            "The run's page in W&B shows all three in its address."
        )
    if project or entity or run_id:
        raise UserError(f"--project, --entity and --run-id go with an output folder; {run!r} says all three already.")
    entity, project, run_id = parts
    return _from_wandb(entity, project, run_id) if online else Source(project, entity, run_id)


def _from_folder(folder: Path, project: str | None, entity: str | None, run_id: str | None) -> Source:
    from ..monitor.records import read_records
    from ..monitor.wandb import config

    if not project:
        raise UserError(
            f"Which W&B project is the run of {folder} in? Name it with --project (and --entity for a team's)."
        )
    with as_user_error(OSError, ValueError):
        records = read_records(folder)
    record = next((record for record in reversed(records) if record["type"] == "run"), None)
    if record is None:
        raise UserError(
            f"concepts.jsonl of {folder} has no record of type 'run', which a run writes first. Was it cut off before its first step?"
        )
    return Source(project, entity or "", run_id, record.get("run_name") or folder.name, config(record))


def _from_wandb(entity: str, project: str, run_id: str) -> Source:
    import wandb

    try:
        run = wandb.Api().run(f"{entity}/{project}/{run_id}")
    except Exception as error:  # as above: no common class
        raise UserError(
            f"The run {entity}/{project}/{run_id} could not be read from W&B ({type(error).__name__}: {error}). "
            "Check its address, and log in with `wandb login`. For a run not uploaded yet: `wandb sync` its folder first."
        ) from error
    return Source(project, entity, run_id, run.name, run.config.get("shapedpo") or {})
