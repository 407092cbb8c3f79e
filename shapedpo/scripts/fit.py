"""The arguments of `shapedpo fit` and `shapedpo concepts find`; what they do is in `fitting.py`, which is slow to import."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any


SOURCES = """\
What shows the concept and what does not is said in one of five ways:

  --contrast FILE ...                   rows of `prompt`, `response` (or `completion`) and `label`, or in its place `shows`, the list of
                                        concepts that the response shows (--concept says which is the one); or of `prompt`, `positive`
                                        and `negative` (or `chosen` and `rejected`)
  --positive FILE ... --negative FILE ...   rows of `prompt` and `response`
  --pattern REGEX                       completions of the recipe's training pairs that match, and those that do not; with --own-answers
                                        the model's own answers to their prompts
  --judge JUDGE                         the same, labelled by a judge, such as a language model
  --instruct DO DONT                    the model answers the recipe's prompts under two opposite instructions, and the answers are read
                                        without them; with --judge, those that do not do as told are left out

What is easily taken for the concept is worth naming: --other NAME=JUDGE (or the rest of `shows`, or a file of negatives of its own). Of the
negatives, those that show each of the others weigh alike, however rare they are, and a table says what the readout confuses.

Files are JSON Lines, JSON, CSV or Parquet. Further --KEY VALUE change the recipe (--seed, --max_length).
"""
FIT = f"""\
Train readouts on a contrast set: a difference of means, a linear probe, an attention probe, at one layer or at all. A table says how well each
tells held-out responses (of other prompts), and the best of each kind is saved.

{SOURCES}"""
FIND = f"""\
Rank an SAE's features by how well they tell a contrast set, and propose the smallest set of them that reaches a target AUROC on held-out responses
(of other prompts), against all negatives and against those of each file.

{SOURCES}"""


def number(
    kind: Callable[[str], Any], least: float, most: float = math.inf, above: bool = False
) -> Callable[[str], Any]:
    """A type for argparse: a number between two bounds, or above the lower one."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not (least < value if above else least <= value) or not value <= most or value == math.inf:
            bounds = f"{'above' if above else 'at least'} {least:g}" + (
                f" and at most {most:g}" if most < math.inf else ""
            )
            raise argparse.ArgumentTypeError(f"must be {bounds}, got {text}")
        return value

    parse.__name__ = "whole number" if kind is int else "number"  # argparse says so of a text that is none
    return parse


def add_commands(commands: Any, concepts: Any) -> None:
    """Add `fit` to the command line's own parser and `find` to that of `shapedpo concepts`."""
    source = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    source.add_argument("--config", metavar="RECIPE", required=True, help="the recipe that names model and data")
    source.add_argument("--contrast", metavar="FILE", nargs="+", help="labelled responses, or pairs")
    source.add_argument("--positive", metavar="FILE", nargs="+", help="responses that show it")
    source.add_argument("--negative", metavar="FILE", nargs="+", help="responses that do not")
    source.add_argument("--chat", action="store_true", help="text in files is a user's message and the answer to it")
    source.add_argument("--pattern", metavar="REGEX", help="regular expression on a completion's text")
    source.add_argument("--instruct", metavar=("DO", "DONT"), nargs=2, help="two opposite instructions")
    source.add_argument("--place", choices=("user", "system"), default="user", help="where they go (%(default)s)")
    source.add_argument(
        "--judge", metavar="JUDGE", help="regex:PATTERN, package.module:function, or an OpenAI-compatible URL#MODEL"
    )
    source.add_argument("--concept", metavar="TEXT", help="what an endpoint is asked about, or which of `shows` it is")
    source.add_argument(
        "--own-answers", action="store_true", help="label the model's own answers, not the recipe's completions"
    )
    source.add_argument("--other", metavar="NAME=JUDGE", nargs="+", default=[], help="what it may be taken for")
    source.add_argument(
        "--max-new-tokens", type=number(int, 1), default=128, help="where an answer is cut (%(default)s)"
    )
    source.add_argument(
        "--sample",
        type=number(int, 1),
        default=500,
        metavar="N",
        help="pairs, at random, whose completions are read or prompts answered (%(default)s)",
    )
    source.add_argument(
        "--heldout",
        type=number(float, 0, 0.5, above=True),
        default=0.25,
        help="share of the prompts to judge on (%(default)s)",
    )
    source.add_argument(
        "--batch-size", type=number(int, 1), default=8, help="responses in a forward pass (%(default)s)"
    )

    shared: dict[str, Any] = {"parents": [source], "formatter_class": argparse.RawDescriptionHelpFormatter}
    fit = commands.add_parser(
        "fit",
        help="train a probe or a direction on a contrast set",
        description=FIT,
        usage="shapedpo fit --config RECIPE --out DIR (--contrast | --positive --negative | --pattern | --judge | --instruct) [...]",
        allow_abbrev=False,
        **shared,
    )
    fit.add_argument("--out", metavar="DIR", required=True, help="folder for the readouts and the table")
    fit.add_argument("--kinds", nargs="+", default=["direction", "linear_probe"], metavar="KIND",
        help="direction, linear_probe, attention_probe; steering_vector, learned by what it makes the model say (the first two)")  # fmt: skip
    fit.add_argument("--layers", nargs="+", default=["all"], help="decoder layers, counted from 0 (all)")
    fit.add_argument("--objective", choices=("auto", "pairs", "bce"), default="auto",
        help="of probes: between responses to one prompt, or over all; auto: pairs where each prompt has both")  # fmt: skip
    fit.add_argument(
        "--l2", type=number(float, 0), default=1e-4, help="weight of the probes' squared weights (%(default)s)"
    )
    fit.add_argument("--heads", type=number(int, 1), default=1, help="of the attention probe (%(default)s)")

    find = concepts.add_parser(
        "find",
        help="propose SAE features that tell a contrast set",
        description=FIND,
        usage="shapedpo concepts find --config RECIPE (--contrast | --positive --negative | --pattern | --judge | --instruct) [...]",
        allow_abbrev=False,
        **shared,
    )
    find.add_argument("--sae", help="folder or release (the recipe's monitor_sae)")
    find.add_argument("--sae-id", help="which SAE of the release")
    find.add_argument("--hook-name", help="where to read, if the SAE does not say")
    find.add_argument("--target", type=number(float, 0, 1), default=0.95, help="the AUROC to reach (%(default)s)")
    find.add_argument("--max-features", type=number(int, 1), default=8, help="size of the largest set (%(default)s)")
    find.add_argument("--top", type=number(int, 0), default=20, help="how many features are shown (%(default)s)")


def main(args: argparse.Namespace, overrides: list[str]) -> int:
    """Run one of them."""
    from . import fitting

    return fitting.fit(args, overrides) if args.command == "fit" else fitting.find(args, overrides)
