"""`shapedpo fix`: from a finding of an audit to a recipe, to another dataset, and to what the audit predicts then."""

from __future__ import annotations

import argparse
import math
import textwrap
from pathlib import Path
from typing import Any

from ..audit.folder import ANALYSIS, ANSWERS, HARVEST
from ..errors import UserError, as_user_error


HELP = """\
Fix what an audit has found. Without --recipe-out and --dataset-out it only shows what the audit predicts after each fix: with the finding's
concept held, and without its rows.

  shapedpo fix audits/pairs --finding 2                                 # preview
  shapedpo fix audits/pairs --finding 2 --recipe-out fixed.yaml         # a recipe that holds it, for shapedpo train --config
  shapedpo fix audits/pairs --finding 2 --dataset-out clean.parquet     # the data without the rows that teach it

--finding takes the numbers of the audit's summary. A recipe has the audit's model and data, a concept of the SAE features that
the finding's rows teach most clearly, and where these hold under a condition, a gate on the prompt. With --rows flag the new dataset
has a column of booleans for each finding, and the recipe is gated by it. The source is never touched, and no file is overwritten.
"""


_DEFAULTS = """\
Learning rate, batch size and all else are TRL's defaults, which want a GPU: set them in the recipe or on the command line, or start
from a recipe of yours with --config. On a CPU: --use_cpu true --bf16 false
"""


_DONE = {"drop": "dropped", "flag": "flagged"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("audit", metavar="DIR", help="what `shapedpo audit` wrote")
    parser.add_argument(
        "--finding", type=int, nargs="+", metavar="N", default=[], help="numbers in the audit's summary"
    )
    parser.add_argument(
        "--hypothesis", type=int, nargs="+", metavar="N", default=[], help="places in hypotheses.json, from 0"
    )
    shape = parser.add_argument_group("a recipe")
    shape.add_argument("--recipe-out", metavar="FILE", help="write a recipe for `shapedpo train` (.yaml)")
    shape.add_argument("--config", metavar="RECIPE", help="the recipe to start from")
    shape.add_argument("--action", default="hold", help="hold, suppress, amplify or watch (%(default)s)")
    shape.add_argument("--strength", type=float, help="how strongly, to suppress or amplify")
    rows = parser.add_argument_group("a dataset")
    rows.add_argument("--dataset-out", metavar="FILE", help="write a new dataset (.parquet or .jsonl)")
    rows.add_argument("--rows", default="drop", help="drop the rows, give them a weight, or flag them (%(default)s)")
    rows.add_argument("--weight", type=float, help="of the rows, with --rows weight (0.1)")
    parser.add_argument("--no-preview", action="store_true", help="do not predict what changes")


def main(args: argparse.Namespace) -> int:
    """Run the command.

    Raises:
        UserError: If there is no such audit or finding, or a file is there already.
    """
    if not (args.finding or args.hypothesis):
        raise UserError("Say which finding: --finding N, a number in the audit's summary.")
    from rich.console import Console

    from ..audit.analysis.hypotheses import Analysis
    from ..audit.fixes.data import HOW, WRITERS, check_target
    from ..audit.fixes.targets import finding, hypothesis, target
    from ..audit.harvesting.store import Harvest
    from ..audit.labels.names import Labels

    if args.rows not in HOW:
        raise UserError(f"--rows {args.rows}: choose one of {', '.join(HOW)}.")
    if args.weight is None:
        args.weight = 0.1
    elif args.rows != "weight":
        raise UserError(f"--weight {args.weight} is for --rows weight, and the rows would be {_DONE[args.rows]}.")
    if not 0 <= args.weight < math.inf:
        raise UserError(f"--weight {args.weight}: must be a finite number of 0 or more.")
    folder = Path(args.audit)
    with as_user_error(ValueError, FileNotFoundError):
        if args.recipe_out:
            check_target(args.recipe_out, (".yaml", ".yml"))
        if args.dataset_out:
            check_target(args.dataset_out, tuple(WRITERS))
        harvest, analysis = Harvest.open(folder / HARVEST), Analysis.load(folder / ANALYSIS)
        named = {f"finding {n}": finding(analysis, n) for n in args.finding}
        named |= {f"hypothesis {n}": hypothesis(analysis, n) for n in args.hypothesis}
        targets = [target(harvest, analysis, lesson, name) for name, lesson in named.items()]
        labels = Labels.load(folder, analysis) or Labels()
    console = Console()
    for one in targets:
        _say(console, one, harvest, analysis, labels)
    columns = {one.name: one.name.replace(" ", "_") for one in targets}
    recipe = _recipe(args, harvest, targets, columns) if args.recipe_out else None  # first what may be refused
    if args.dataset_out:
        _write_dataset(args, harvest, {columns[one.name]: one.rows for one in targets})
    if recipe:
        _write_recipe(args, recipe, columns)
    if not args.no_preview:
        console.print(_preview(args, folder, harvest, analysis, targets, labels))
    return 0


def _say(console: Any, one: Any, harvest: Any, analysis: Any, labels: Any) -> None:
    from ..audit.labels.names import cluster_name
    from ..audit.summary import lesson_words

    first = one.lesson.first
    ways = {
        way: ", ".join(words) for way, words in zip(("more", "less"), lesson_words(one.lesson, harvest), strict=True)
    }
    if not any(ways.values()):
        ways = {"more" if one.more else "less": cluster_name(first.response_cluster, analysis, labels)}
    said = " and ".join(f"{way} of {words}" for way, words in ways.items() if words)
    stands_out = one.lesson.rows if one.lesson.number else first.named  # a hypothesis alone has no number
    rows = f"{len(one.rows):,} rows" if len(stands_out) else f"no row stands out; all {len(one.rows):,} that go its way"
    text = f"{one.name}: {rows}, chosen has {said}"
    if first.condition_cluster is not None:
        text += f", where {cluster_name(first.condition_cluster, analysis, labels)}"
    named = ", ".join(f"{feature} ({labels.features.get(feature, '?')})" for feature in one.features)
    text += f"\n  read by SAE feature{'s' * (len(one.features) > 1)} {named}"
    if one.condition is not None:
        where = one.condition
        text += (
            f"\n  gate: the mean of {len(where.features)} prompt features above {where.threshold:g} sd, as in {where.inside:.0%} of its rows and "
            f"{where.outside:.1%} of the others"
        )
    console.print(text, markup=False, highlight=False)


def _write_dataset(args: argparse.Namespace, harvest: Any, rows: dict[str, Any]) -> None:
    import numpy as np
    from transformers import AutoTokenizer

    from ..audit.fixes.data import changed, check_audited, write
    from ..audit.harvesting.pairs import load_pairs
    from ..sources import model_source

    settings = harvest.settings
    if not settings["dataset"]:
        raise UserError("The audit does not say which dataset it read. Use `shapedpo.audit.fixes.data` from Python.")
    if not settings["model"]:  # whose tokenizer shows whether the data are what was audited
        raise UserError("The audit does not say which model it read. Use `shapedpo.audit.fixes.data` from Python.")
    data = load_pairs(settings["dataset"], settings.get("split", "train"), settings.get("config"))
    with as_user_error(ValueError):
        new = changed(data, rows, args.rows, args.weight)
        with as_user_error(
            OSError, prefix=f"The tokenizer of {settings['model']!r}, to see that the data are what was audited: "
        ):
            tokenizer = AutoTokenizer.from_pretrained(model_source(settings["model"]))
        check_audited(data, harvest, np.unique(np.concatenate(list(rows.values()))), tokenizer)
        write(new, args.dataset_out)
    unread = len(data) - harvest.n_rows
    print(
        f"{args.dataset_out}: {len(new):,} of {len(data):,} pairs"
        + (f", {unread:,} of them not audited" if unread else "")
    )


def _recipe(args: argparse.Namespace, harvest: Any, targets: list[Any], columns: dict[str, str]) -> dict[str, Any]:
    from ..audit.fixes.targets import EVALUATION, concepts, recipe
    from ..concept import resolve_concepts
    from ..sources import concepts_from
    from .recipe import read_recipe

    base = read_recipe(args.config) if args.config else None
    if base and "concepts" in base.values:  # which may be the path of a file
        base.values["concepts"] = [concept.to_dict() for concept in concepts_from(base.values["concepts"])]
    gated = columns if args.dataset_out and args.rows == "flag" else None
    shaped = concepts(harvest, targets, action=args.action, strength=args.strength, columns=gated)
    dataset = str(Path(args.dataset_out).resolve()) if args.dataset_out else None
    values = recipe(harvest, shaped, base.values if base else None, dataset)
    if "model_name_or_path" not in values:
        raise UserError(
            "The audit does not say which model it read: name it in a recipe, as model_name_or_path, and pass that with --config."
        )
    with as_user_error(ValueError):
        resolve_concepts(values["concepts"])
    if left_out := [key for key in EVALUATION if base and base.values.get(key) and key not in values]:
        print(f"Left out of the recipe: {', '.join(left_out)}, as {args.dataset_out} has no test split.")
    return values | ({"env": base.env} if base and base.env else {})


def _write_recipe(args: argparse.Namespace, values: dict[str, Any], columns: dict[str, str]) -> None:
    import yaml

    from ..files import replacing

    path = Path(args.recipe_out)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        head = (
            f"# {', '.join(columns)} of the audit in {args.audit}\n#\n#   shapedpo train --config {args.recipe_out}\n"
        )
        if not args.config:
            head += f"#\n{textwrap.indent(_DEFAULTS, '# ')}"
        head += "\n"
        partial.write_text(head + yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
    print(f"{args.recipe_out}: shapedpo train --config {args.recipe_out}")
    if not args.config:
        print(_DEFAULTS, end="")


def _preview(
    args: argparse.Namespace, folder: Path, harvest: Any, analysis: Any, targets: list[Any], labels: Any
) -> Any:
    import numpy as np

    from ..audit.fixes.preview import preview
    from ..audit.prediction.run import Prediction

    held = {feature for one in targets for feature in one.features}
    responsible = np.isin(analysis.rows, np.concatenate([one.rows for one in targets]))
    without = np.where(responsible, 0.0, 1.0)
    weights = {"drop": without, "weight": np.where(responsible, args.weight, 1.0), "flag": None}[args.rows]
    ways: dict[str, Any] = {"held": (None, held), "without its rows": (without, ())}
    if args.rows == "weight":
        ways = {"held": (None, held), f"its rows at {args.weight:g}": (weights, ())}
    if args.recipe_out or args.dataset_out:
        weights = weights if args.dataset_out else None
        holds = args.recipe_out and args.action == "hold"
        if weights is None and not holds:
            return "What this changes is not predicted: that takes --action hold, or rows that are dropped or weighted."
        ways = {"fixed": (weights, held if holds else ())}
    now = Prediction.load_if_made(folder / ANALYSIS)
    # a pilot of the data as it is says nothing of what is fixed
    if now and ((folder / ANSWERS).exists() or now.scaled.any()):
        print(
            "Predicted from the data alone, without the audit's answers and pilot: compare the columns with each other."
        )
        now = None
    flagged = args.recipe_out and args.dataset_out and args.rows == "flag"
    gated = flagged or all(one.condition is not None for one in targets)  # to rows that are nearly the findings'
    return preview(harvest, analysis, targets, ways, labels, now, held_on=responsible if gated else None)
