"""`shapedpo label`: titles for an audit's clusters and findings, from a language model."""

from __future__ import annotations

import argparse
import os
import sys
from itertools import zip_longest
from typing import Any

from ..errors import UserError, as_user_error


HELP = """\
Have a language model name what an audit found: a title, a description and keywords for the strongest findings and the clusters that
they are about. Without it they are called by tokens and words. The model is behind any OpenAI-compatible endpoint (the
extra `labels`), or on this machine. Before anything is asked, the number of tokens is printed and you are asked whether to go on; what
a reasoning model thinks comes on top.

What the model is shown are rows of the dataset: choose one that may see them. Answers are kept in DIR/labels-cache.jsonl, labels go to
DIR/labels.json, and DIR/audit.html is written anew.

  OPENAI_API_KEY=... shapedpo label audits/pairs --labeller https://api.openai.com/v1#gpt-5-mini
  shapedpo label audits/pairs --labeller http://localhost:8000/v1#Qwen/Qwen3-8B     # vLLM
  shapedpo label audits/pairs --labeller Qwen/Qwen3-4B-Instruct-2507                # on this machine
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("audit", metavar="DIR", help="the folder that `shapedpo audit --out` wrote to")
    parser.add_argument(
        "--labeller",
        required=True,
        metavar="MODEL",
        help="the model: an OpenAI-compatible URL#MODEL, or a hub name or folder for one on this machine",
    )
    parser.add_argument(
        "--key-env",
        default="OPENAI_API_KEY",
        metavar="VARIABLE",
        help="where the API key is, if it needs one (%(default)s)",
    )
    parser.add_argument("--top", type=int, default=60, metavar="N", help="findings that are named (%(default)s)")
    parser.add_argument("--concurrency", type=int, default=8, metavar="N", help="requests at a time (%(default)s)")
    parser.add_argument(
        "--price", type=float, nargs=2, metavar=("IN", "OUT"), help="of a million tokens, for an estimate of the cost"
    )
    parser.add_argument("--yes", action="store_true", help="go on without asking")


def main(args: argparse.Namespace) -> int:
    """Run the command.

    Raises:
        UserError: If there is no audit, the model refuses, or nobody says yes.
    """
    if args.top < 1 or args.concurrency < 1:
        raise UserError("--top and --concurrency must be 1 or more.")
    import asyncio

    from ..audit.labels.labellers import LabellerError, endpoint
    from ..audit.labels.titles import CACHE, ask, read_cache, tasks, with_titles
    from ..audit.page.render import write_page
    from ..audit.page.source import Audit

    with as_user_error(ValueError, prefix="--labeller: "):
        place = endpoint(args.labeller)
    model = args.labeller if place is None else place[1]
    with as_user_error(FileNotFoundError, ValueError):
        audit = Audit.open(args.audit)
    if not audit.analysis.hypotheses:
        raise UserError(f"The audit in '{args.audit}' found nothing that could be named.")
    if not audit.labels.features:
        raise UserError(
            f"'{args.audit}' has no labels.json of its analysis. Run the same `shapedpo audit` again: it writes one."
        )
    found = tasks(audit.analysis, audit.harvest, audit.labels, audit.maps, foremost(audit.analysis, args.top))
    cache = audit.folder / CACHE
    known = read_cache(cache)
    asked = {task.key(model): task for task in found}
    new = [task for key, task in asked.items() if key not in known]
    print(f"{len(found):,} labels; {len(asked) - len(new):,} answers known from before")
    if new:
        agree(new, model, args)
    with as_user_error(ImportError, OSError, ValueError):
        labeller = _labeller(place, model, args.key_env)

    async def asking() -> Any:
        try:
            return await ask(found, labeller, cache, concurrency=args.concurrency)
        finally:
            await labeller.close()

    try:
        answers = asyncio.run(asking())
    except* LabellerError as errors:
        raise UserError(
            f"{str(errors.exceptions[0]).rstrip('.')}. What was answered is kept: the same command goes on from there."
        ) from None
    if failed := sum(answer is None for answer in answers):
        print(f"{failed:,} answers were not as asked for, three times over: tokens stay their labels.", file=sys.stderr)
    audit.labels = with_titles(audit.labels, found, answers, model)
    path = audit.labels.save(audit.folder, audit.analysis)
    print(f"{path}; {write_page(audit, audit.tokenizer())}")
    return 0


def foremost(analysis: Any, most: int) -> list[Any]:
    """The hypotheses to name: first those that stand for lessons, then the strongest of each view, by turns."""
    from ..audit.analysis.hypotheses import VIEWS
    from ..audit.analysis.lessons import lessons

    first = [lesson.first for lesson in lessons(analysis)]
    turns = zip_longest(*(analysis.of(view) for view in VIEWS))
    found = [*first, *(h for turn in turns for h in turn if h is not None)]
    return list({id(h): h for h in found}.values())[:most]


def agree(new: list[Any], model: str, args: argparse.Namespace) -> None:
    """Say what it takes, and ask.

    Raises:
        UserError: If the answer is no, or there is nobody to ask.
    """
    from ..audit.labels.titles import estimate

    given, taken = estimate(new)
    cost = ""
    if args.price:
        cost = f", {(given * args.price[0] + taken * args.price[1]) / 1e6:.2f} at most at these prices"
    print(f"{len(new):,} to ask {model} for: about {given:,} tokens in, at most {taken:,} out{cost}")
    if args.yes:
        return
    if not sys.stdin.isatty():
        raise UserError("There is nobody to ask whether to go on: say --yes.")
    if input("Go on? [y/N] ").strip().lower() not in ("y", "yes"):
        raise UserError("Nothing was asked.")


def _labeller(place: tuple[str, str] | None, model: str, key_env: str) -> Any:
    from ..audit.labels.labellers import Endpoint, LocalModel

    return LocalModel(model) if place is None else Endpoint(*place, os.environ.get(key_env))
