"""The command line: `shapedpo COMMAND`; [`build_parser`] has them all.

Nothing heavy is imported here: torch, transformers, trl and sae-lens take seconds, so each command imports what it needs
when it runs and `--help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from . import __version__
from .errors import UserError
from .errors import suggest as nearest
from .scripts import audit, fit, fix, label, sae, suggest, verify, view


TRAIN_HELP = """\
Train with ShapedDPOTrainer. Everything is in one YAML file (a recipe), and every key of it can be given on the command line
instead, which then has the last word:

  shapedpo train --config recipes/goblin_lab.yaml
  shapedpo train --config recipes/goblin_lab.yaml --learning_rate 1e-4 --output_dir runs/second --max_steps 50
  accelerate launch --config_file accelerate_configs/zero2.yaml -m shapedpo train --config recipes/llama31_8b_safeguards.yaml

keys of a recipe, the most used:
  model_name_or_path      a local folder, a name on the Hugging Face hub, or `lab` (the model that ships with shapedpo)
  dataset_name            a name on the hub, a folder saved by `save_to_disk`, a .json, .jsonl, .parquet or .csv file (also
                          .gz), or `lab:goblin_world`
  concepts                a list of concepts, or the path of a YAML file with one
  output_dir              where checkpoints and the trained model go
  resume_from_checkpoint  `true` for the last checkpoint in output_dir, or a checkpoint's folder
  use_peft, lora_r, ...   LoRA, as in TRL's ModelConfig; load_in_4bit, load_in_8bit for quantisation
  env                     environment variables, set before anything is imported

and every field of TRL's DPOConfig (beta, loss_type, learning_rate, ...): `shapedpo train --help-all` lists them all.
"""

AUDITS: dict[str, tuple[Any, str, str]] = {
    "audit": (
        audit,
        "read what a preference dataset teaches, before training",
        "--model M --sae S --dataset D --out DIR [...]",
    ),
    "view": (view, "look at an audit in the browser", "DIR [--port N] [--no-browser]"),
    "label": (
        label,
        "name what an audit found, with a language model",
        "DIR --labeller MODEL [...]",
    ),
    "fix": (
        fix,
        "from a finding of an audit to a recipe, or to data without its rows",
        "DIR --finding N [--recipe-out FILE] [--dataset-out FILE] [...]",
    ),
    "suggest": (
        suggest,
        "what an audit found that bears on a description of what the model should learn",
        "DIR --spec TEXT [...]",
    ),
    "verify": (
        verify,
        "hold what an audit predicted against what a trained model says",
        "--base M --trained M2 --audit DIR [...]",
    ),
}
"""The commands around an audit: each one's module, what it is for, and how it is called."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line. Of `train`'s arguments it knows only those that are not a recipe's keys."""
    parser = argparse.ArgumentParser(
        prog="shapedpo",
        description="DPO that reads which concepts each preference pair teaches, and shapes what the model learns.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"shapedpo {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)

    train = commands.add_parser(
        "train",
        help="train from a recipe",
        description=TRAIN_HELP,
        usage="shapedpo train [--config RECIPE] [--KEY VALUE ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    train.add_argument("--config", metavar="RECIPE", help="the YAML file")
    train.add_argument("--help-all", action="store_true", help="list every key of a recipe (takes some seconds)")

    for name, (module, what, usage) in AUDITS.items():
        command = commands.add_parser(
            name,
            help=what,
            description=module.HELP,
            usage=f"shapedpo {name} {usage}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(command)

    demo = commands.add_parser(
        "demo",
        help="plain DPO against shaped DPO in a small world, in minutes on a CPU",
        description="Train the lab's model on 5,000 pairs, one in twenty of which teaches goblins: once with plain DPO, once with goblins held. "
        "Prints a table of what either has learned. Some six minutes on two cores; no network.",
        allow_abbrev=False,
    )
    demo.add_argument(
        "--out", metavar="DIR", default="runs/demo", help="where the models and the W&B run go (%(default)s)"
    )
    demo.add_argument("--seed", type=int, default=0, help="seed of the data and of both trainings (%(default)s)")

    concepts = commands.add_parser(
        "concepts", help="look at the concepts of a file, and find features for one", allow_abbrev=False
    )
    actions = concepts.add_subparsers(dest="concepts_command", metavar="command", required=True)
    show = actions.add_parser("show", help="check a file of concepts, or a recipe, and show them", allow_abbrev=False)
    show.add_argument("file", help="a YAML file")
    show.add_argument("--load", action="store_true", help="also load each readout's weights, as a training run would")

    sae.add_commands(commands)
    fit.add_commands(commands, actions)

    page = commands.add_parser(
        "report",
        help="make report.html of a run anew",
        description="Make the page of a run anew from its concepts.jsonl. A run writes it by itself; this is for after a crash or an upgrade.",
        allow_abbrev=False,
    )
    page.add_argument("run", help="the run's output folder, or a concepts.jsonl")
    page.add_argument("--out", metavar="FILE", help="where the page goes (report.html beside concepts.jsonl)")

    report = commands.add_parser(
        "wandb-report",
        help="save a W&B report of a run's concepts",
        description="Build a report of a run's concepts in Weights & Biases, with W&B's own library (the extra `wandb-report`).",
        allow_abbrev=False,
    )
    report.add_argument("run", help="ENTITY/PROJECT/RUN_ID, the address of a run's page, or a run's output folder")
    report.add_argument("--project", help="W&B project, for an output folder")
    report.add_argument("--entity", help="W&B user or team, for an output folder (the user's default)")
    report.add_argument("--run-id", help="the W&B run's id, for an output folder (without it: the run of that name)")
    report.add_argument("--dry-run", action="store_true", help="print the report's specification as JSON; no network")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments without the program's name; those of the process by default.

    Returns:
        The exit status: 0; 2 where the user's input, a file or the disk is at fault (one message, no traceback); 130 after Ctrl-C.
    """
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    takes_keys = args.command in ("train", "sae", "fit") or getattr(args, "concepts_command", None) == "find"
    if rest and not takes_keys:
        _refuse(parser, args, rest[0])
    try:
        return _run(args, rest)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("shapedpo: interrupted", file=sys.stderr)
        return 130
    except (UserError, OSError) as error:
        # An error without a number is no system call's (a full disk, a folder that cannot be written), but a library's.
        if os.environ.get("SHAPEDPO_TRACEBACK", "0") not in ("", "0") or (
            isinstance(error, OSError) and error.errno is None
        ):
            raise
        # Every process of a distributed run meets the same error: one of them says it.
        if os.environ.get("RANK", "0") == "0":
            print(f"shapedpo: error: {error}", file=sys.stderr)
            if error.__cause__ is not None or isinstance(error, OSError):
                print("(SHAPEDPO_TRACEBACK=1 shows where it was raised)", file=sys.stderr)
        return 2


def _refuse(parser: argparse.ArgumentParser, args: argparse.Namespace, word: str) -> None:
    """End with the usage of the command that was given, which does not know an argument, and with the nearest that it knows."""
    for name in (args.command, getattr(args, "concepts_command", None)):
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction) and name in action.choices:
                parser = action.choices[name]
    unknown = word.split("=")[0]
    known = [option for action in parser._actions for option in action.option_strings]
    parser.error(f"unknown argument {unknown!r}.{nearest(unknown, known)}")


def _run(args: argparse.Namespace, rest: list[str]) -> int:
    if args.command == "train":
        from .scripts import train

        return train.main(args.config, rest, help_all=args.help_all)
    if args.command in AUDITS:
        status: int = AUDITS[args.command][0].main(args)
        return status
    if args.command == "demo":
        from . import demo

        demo.run(args.out, seed=args.seed)
        return 0
    if args.command == "report":
        from .scripts import report

        return report.main(args.run, out=args.out)
    if args.command == "wandb-report":
        from .scripts import wandb_report

        return wandb_report.main(
            args.run, project=args.project, entity=args.entity, run_id=args.run_id, dry_run=args.dry_run
        )
    if args.command == "fit" or getattr(args, "concepts_command", None) == "find":
        return fit.main(args, rest)
    if args.command == "sae":
        return sae.main(args, rest)
    from .scripts import concepts

    return concepts.show(args.file, load=args.load)
