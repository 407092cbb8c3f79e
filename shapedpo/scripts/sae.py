"""The arguments of `shapedpo sae ...` and `shapedpo concepts direction`; what they do is in `readers.py`, which is slow to import."""

from __future__ import annotations

import argparse
from typing import Any


CHANGES = "Further --KEY VALUE change the recipe."


def add_commands(commands: Any, concepts: Any) -> None:
    """Add them to the command line's own parser and to that of `shapedpo concepts`."""
    recipe = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    recipe.add_argument("--config", metavar="RECIPE", required=True, help="the recipe that names model and data")
    recipe.add_argument("--sample", type=int, default=500, help="how many preference pairs are read (%(default)s)")
    pattern = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    pattern.add_argument("--pattern", required=True, help="regular expression on a completion's text")
    layer = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    layer.add_argument("--layer", type=int, required=True, help="decoder layer, counted from 0, whose output is read")
    which = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    which.add_argument("--sae", help="folder or release (the recipe's monitor_sae)")
    which.add_argument("--sae-id", help="which SAE of the release")
    which.add_argument("--hook-name", help="where to read, if the SAE does not say")

    direction = concepts.add_parser(
        "direction",
        parents=[recipe, pattern, layer],
        help="make a direction from completions that match a pattern and those that do not",
        description="Difference of means of the activations after a layer, of the training completions that match a regular expression and "
        f"those that do not (Direction.from_contrast). {CHANGES}",
        allow_abbrev=False,
    )
    direction.add_argument("--out", metavar="FILE", required=True, help="safetensors file for the direction")

    sae = commands.add_parser("sae", help="train and check a sparse autoencoder", allow_abbrev=False)
    actions = sae.add_subparsers(dest="sae_command", metavar="command", required=True)
    train = actions.add_parser(
        "train",
        parents=[recipe, layer],
        help="train one on the text of a recipe's preference data",
        description="Train a BatchTopK SAE with sae-lens on a recipe's model and preference data, and check it on held-out pairs (see "
        f"docs/sae.md). {CHANGES}",
        allow_abbrev=False,
    )
    train.add_argument("--out", metavar="DIR", required=True, help="folder for the SAE")
    train.add_argument("--features", type=int, required=True, help="how many; 16 times the model's width in the paper")
    train.add_argument("--k", type=int, required=True, help="active features a token, on average")
    train.add_argument("--tokens", type=float, required=True, help="tokens to train on, such as 3e6")
    train.add_argument("--batch-tokens", type=int, default=4096, help="tokens of a step (%(default)s)")
    train.add_argument("--sae-learning-rate", type=float, help="the peak (2e-4 / sqrt(features / 2^14))")
    actions.add_parser(
        "check",
        parents=[recipe, which],
        help="variance explained, L0 and dead features on held-out completions",
        description=f"How good an SAE is on the completions of a recipe's held-out pairs. {CHANGES}",
        allow_abbrev=False,
    )


def main(args: argparse.Namespace, overrides: list[str]) -> int:
    """Run one of them."""
    from . import readers

    given = {"pairs": args.sample}
    if args.command == "concepts":
        return readers.direction(args.config, overrides, pattern=args.pattern, layer=args.layer, out=args.out, **given)
    if args.sae_command == "train":
        return readers.train(
            args.config,
            overrides,
            layer=args.layer,
            out=args.out,
            d_sae=args.features,
            k=args.k,
            training_tokens=int(args.tokens),
            batch_tokens=args.batch_tokens,
            learning_rate=args.sae_learning_rate,
            **given,
        )
    which = {"sae": args.sae, "sae_id": args.sae_id, "hook_name": args.hook_name}
    return readers.check(args.config, overrides, **which, **given)
