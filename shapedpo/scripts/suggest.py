"""`shapedpo suggest`: what an audit found that bears on a description of what the model should and should not learn."""

from __future__ import annotations

import argparse
import dataclasses
import json
from itertools import groupby
from pathlib import Path
from typing import Any

from ..audit.folder import ANALYSIS, HARVEST
from ..errors import UserError, as_user_error


HELP = """\
Say in plain words what the model should and should not learn, and see what the audit found about each part: findings, hypotheses, clusters
and features, by how near their words are, with the change that the data are predicted to bring. What pushes toward what the description
forbids, or away from what it asks for, is marked.

  shapedpo suggest audits/pairs --spec "It should refuse harmful requests. It should not flatter the user and must never invent links."
  shapedpo suggest audits/pairs --spec policy.txt --embedder sentence-transformers/all-MiniLM-L6-v2

Words are compared by their letters (TF-IDF); an embedder compares their meaning. Titles of `shapedpo label` count as words too.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("audit", metavar="DIR", help="what `shapedpo audit` wrote")
    parser.add_argument("--spec", required=True, metavar="TEXT", help="the description, or a text file with it")
    parser.add_argument("--embedder", metavar="MODEL", help="an encoder: a folder, or a name on the hub")
    parser.add_argument("--top", type=int, default=8, metavar="N", help="for each part, at most (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def main(args: argparse.Namespace) -> int:
    """Run the command.

    Raises:
        UserError: If there is no such audit or embedder, or the description is empty.
    """
    from ..audit.analysis.hypotheses import Analysis
    from ..audit.harvesting.store import Harvest
    from ..audit.labels.names import Labels
    from ..audit.prediction.run import Prediction
    from ..audit.suggestions import embedder, parts, suggest
    from ..sources import model_source

    if args.top < 1:
        raise UserError("--top must be 1 or more.")
    folder = Path(args.audit)
    with as_user_error(ValueError, FileNotFoundError):
        harvest, analysis = Harvest.open(folder / HARVEST), Analysis.load(folder / ANALYSIS)
        labels = Labels.load(folder, analysis)
        if labels is None:
            raise UserError(
                f"'{folder}' has no labels of its analysis. Run the same `shapedpo audit` again: it writes them."
            )
        prediction = Prediction.load_if_made(folder / ANALYSIS)
    embed = None
    if args.embedder:
        with as_user_error(OSError, ValueError, prefix=f"--embedder {args.embedder}: "):
            embed = embedder(model_source(args.embedder, "--embedder"))
    spec = _text(args.spec)
    with as_user_error(ValueError):
        found = suggest(spec, harvest, analysis, labels, prediction, embed=embed, most=args.top)
    if args.json:
        print(json.dumps([dataclasses.asdict(one) for one in found], indent=1, ensure_ascii=False))
    else:
        _show(found, parts(spec), folder)
    return 0


def _text(spec: str) -> str:
    path = Path(spec)
    if len(spec) < 250 and path.suffix in (".txt", ".md"):
        if not path.is_file():
            raise UserError(f"--spec: there is no file {spec!r}. Give one, or the description itself.")
        with as_user_error(OSError, UnicodeDecodeError, prefix=f"--spec {spec}: "):
            return path.read_text(encoding="utf-8")
    return spec


def _show(found: list[Any], asked: list[Any], folder: Path) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    for part, of in groupby(found, key=lambda one: one.part):
        table = Table(title=escape(f"{'wanted' if part.wanted else 'not wanted'}: {part.text}"), title_justify="left")
        for name in ("", "what", "similarity", "predicted, sd", ""):
            table.add_column(
                name, justify="right" if name in ("similarity", "predicted, sd") else "left", overflow="fold"
            )
        for one in of:
            effect = "" if one.effect is None else f"{one.effect:+.2f}"
            verdict = (
                f"[bold red]the data push {'away from' if part.wanted else 'toward'} it[/]" if one.conflict else ""
            )
            table.add_row(
                f"{one.kind.replace('_', ' ')} {one.number}", escape(one.what), f"{one.similarity:.2f}", effect, verdict
            )
        console.print(table)
    answered = {one.part for one in found}
    for part in asked:
        if part not in answered:
            console.print(f"Nothing that the audit found comes near: {part.text}", markup=False)
    if against := sum(one.conflict for one in found):
        console.print(
            f"{against} against the description. `shapedpo fix {folder} --finding N` (or --hypothesis N) shows what can be done.",
            markup=False,
        )
