"""The contrast set that a command line asks for: of files, of the recipe's completions, or of what the model answers."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import Any

from ..errors import UserError, as_user_error
from ..probes.contrast import Contrast, Row, check_labels, read_contrast
from ..probes.instructed import answers, instructed_rows
from ..probes.judge import judge_from
from ..readouts.responses import response_text, tokenize_response
from .setting import Setting


FEWEST = 10
"""Responses of either kind that the data, or the model's answers, must have."""


def check_source(args: argparse.Namespace) -> None:
    """Raise `UserError` unless the command line asks for one contrast set; before anything is loaded."""
    ways = {
        "--contrast": args.contrast,
        "--positive": args.positive or args.negative,
        "--pattern": args.pattern,
        "--instruct": args.instruct,
        "--judge": args.judge and not args.instruct,
    }
    given = [name for name, value in ways.items() if value]
    if len(given) != 1 or bool(args.positive) != bool(args.negative):
        raise UserError(
            f"Give one of --contrast, --positive with --negative, --pattern, --judge and --instruct; got {', '.join(given) or 'none'}"
            f"{' with one side only' if bool(args.positive) != bool(args.negative) else ''}."
        )
    if args.own_answers and not (args.pattern or (args.judge and not args.instruct)):
        raise UserError(
            "--own-answers makes the model answer the recipe's prompts: it goes with --pattern or --judge, which label the answers."
        )
    if args.judge and not (args.instruct or args.concept) and args.judge.startswith("http"):
        raise UserError("--judge: an endpoint must be told what to look for. Say it with --concept.")
    for other in args.other:
        if not re.match(r"[^=]+=.", other):
            raise UserError(f"--other: expected NAME=JUDGE, as in praise=regex:genius, got {other!r}.")
    if args.instruct and (not all(map(str.strip, args.instruct)) or args.instruct[0] == args.instruct[1]):
        raise UserError(
            f"--instruct: expected two instructions that differ, got {args.instruct[0]!r} and {args.instruct[1]!r}."
        )


def contrast_of(args: argparse.Namespace, setting: Setting, load_model: Callable[[], Any], tokenizer: Any) -> Contrast:
    """The contrast set that the command line asks for, without responses that `max_length` cuts off whole.

    Args:
        load_model: Gives the model, which is needed for its own answers only.

    Raises:
        UserError: If what it asks for does not fit.
    """
    with as_user_error(ValueError):
        judges = {name: judge_from(judge, name) for name, _, judge in (other.partition("=") for other in args.other)}
        rows = _kept(_rows(args, setting, load_model, tokenizer), tokenizer, setting.args.max_length)
        texts = [(response_text(row.prompt), response_text(row.response)) for row in rows]
        for name, judge in judges.items():
            rows = [
                row._replace(others=(*row.others, name)) if is_so else row
                for row, is_so in zip(rows, judge(texts), strict=True)
            ]
        contrast = Contrast.of(rows)
        contrast.split(
            args.heldout, setting.args.seed
        )  # if it cannot be, that is better known before the model is loaded
        return contrast


def _kept(rows: list[Row], tokenizer: Any, max_length: int | None) -> list[Row]:
    """The rows of which anything is left within `max_length` tokens; says how many are not."""
    chat = next((row for row in rows if not isinstance(row.prompt, str)), None)
    if chat is not None and tokenizer.chat_template is None:
        raise ValueError(
            f"The contrast set has messages ({chat.source}), and the model's tokenizer has no chat template. Give strings, without --chat."
        )
    starts = [tokenize_response(tokenizer, row.prompt, row.response)[1] for row in rows] if max_length else []
    kept = [row for row, start in zip(rows, starts, strict=True) if start < max_length] if max_length else rows
    if len(kept) < len(rows):
        print(
            f"{len(rows) - len(kept)} of {len(rows)} responses are left out: their prompts alone fill max_length={max_length}."
        )
    return kept


def _rows(args: argparse.Namespace, setting: Setting, load_model: Callable[[], Any], tokenizer: Any) -> list[Row]:
    """Responses, labelled as the command line says."""
    if args.contrast or args.positive:
        options: dict[str, Any] = {"chat": args.chat, "concept": args.concept}
        if args.contrast:
            rows = read_contrast(args.contrast, **options)
        else:
            rows = read_contrast(args.positive, label=True, **options)
            rows += read_contrast(args.negative, label=False, **options)
        check_labels(rows)
        return rows
    sizes = {"seed": setting.args.seed, "batch_size": args.batch_size, "max_new_tokens": args.max_new_tokens}
    name = f"regex:{args.pattern}" if args.pattern else args.judge
    judge = judge_from(name, args.concept or (args.instruct[0] if args.instruct else "")) if name else None
    pairs = setting.responses(setting.train, args.sample)
    if args.instruct:
        prompts, told = [prompt for prompt, _ in pairs[::2]], (args.instruct[0], args.instruct[1])
        return instructed_rows(load_model(), tokenizer, prompts, told, place=args.place, judge=judge, **sizes)
    if args.own_answers:
        pairs = answers(load_model(), tokenizer, [prompt for prompt, _ in pairs[::2]], **sizes)
    texts = [(response_text(prompt), response_text(response)) for prompt, response in pairs]
    assert judge is not None  # by `_check_source`
    shows = judge(texts)
    source = "answers" if args.own_answers else "completions"
    if min(sum(shows), len(shows) - sum(shows)) < FEWEST:
        raise UserError(
            f"{sum(shows)} of {len(shows)} {source} show it: at least {FEWEST} that do and {FEWEST} that do not are needed. "
            "Look at more with --sample, or change the pattern or the judge."
        )
    return [Row(prompt, answer, bool(shown), source) for (prompt, answer), shown in zip(pairs, shows, strict=True)]
