"""`shapedpo sae`: train an SAE on a recipe's model and data, and check one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError, as_user_error
from .fit import number


CHANGES = "Further --KEY VALUE change the recipe."


def add_commands(commands: Any) -> None:
    """Add `sae` to the command line's own parser."""
    recipe = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    recipe.add_argument("--config", metavar="RECIPE", required=True, help="the recipe that names model and data")
    recipe.add_argument(
        "--sample",
        type=number(int, 1),
        default=500,
        metavar="N",
        help="held-out pairs to check on, at random (%(default)s)",
    )

    sae = commands.add_parser("sae", help="train and check a sparse autoencoder", allow_abbrev=False)
    actions = sae.add_subparsers(dest="sae_command", metavar="command", required=True)
    train = actions.add_parser(
        "train",
        parents=[recipe],
        help="train one on the text of a recipe's preference data",
        description="Train a BatchTopK SAE with sae-lens on a recipe's model and preference data, and check it on held-out pairs (see "
        f"docs/sae.md). {CHANGES}",
        allow_abbrev=False,
    )
    train.add_argument(
        "--layer", type=number(int, 0), required=True, help="decoder layer, counted from 0, whose output is read"
    )
    train.add_argument("--out", metavar="DIR", required=True, help="folder for the SAE")
    train.add_argument(
        "--features", type=number(int, 1), required=True, help="how many; 16 times the model's width in the paper"
    )
    train.add_argument("--k", type=number(int, 1), required=True, help="active features a token, on average")
    train.add_argument("--tokens", type=number(float, 1), required=True, help="tokens to train on, such as 3e6")
    train.add_argument("--batch-tokens", type=number(int, 1), default=4096, help="tokens of a step (%(default)s)")
    train.add_argument(
        "--sae-learning-rate", type=number(float, 0, above=True), help="the peak (2e-4 / sqrt(features / 2^14))"
    )
    check = actions.add_parser(
        "check",
        parents=[recipe],
        help="variance explained, L0 and dead features on held-out completions",
        description=f"How good an SAE is on the completions of a recipe's held-out pairs. {CHANGES}",
        allow_abbrev=False,
    )
    check.add_argument("--sae", help="folder or release (the recipe's monitor_sae)")
    check.add_argument("--sae-id", help="which SAE of the release")
    check.add_argument("--hook-name", help="where to read, if the SAE does not say")


def main(args: argparse.Namespace, overrides: list[str]) -> int:
    """Run one of them."""
    if args.sae_command == "train":
        return train(
            args.config,
            overrides,
            layer=args.layer,
            out=args.out,
            pairs=args.sample,
            d_sae=args.features,
            k=args.k,
            training_tokens=int(args.tokens),
            batch_tokens=args.batch_tokens,
            learning_rate=args.sae_learning_rate,
        )
    which = {"sae": args.sae, "sae_id": args.sae_id, "hook_name": args.hook_name}
    return check(args.config, overrides, **which, pairs=args.sample)


def train(config: str, overrides: Sequence[str], *, layer: int, out: str, pairs: int, **sizes: Any) -> int:
    """Train an SAE on the text of a recipe's preference data, then check it on pairs that it has not seen.

    Args:
        config: Path of the recipe.
        overrides: Changes of its keys.
        layer: Decoder layer whose output is read.
        out: Folder for the SAE.
        pairs: Pairs to check on.
        **sizes: Of [`train_sae`](../sae/train.py).
    """
    if Path(out).exists() and not Path(out).is_dir():
        raise UserError(f"--out: {out!r} is a file. Name a folder.")
    import torch

    from ..readouts.responses import pair_responses, tokenize_response
    from ..sae.train import fixed_length, train_sae
    from .setting import Setting

    setting = Setting.read(config, overrides)
    tokenizer = setting.tokenizer()
    length = setting.args.max_length or 1024

    def tokens(columns: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        ids = (tokenize_response(tokenizer, *response)[0] for response in pair_responses(rows))
        return {"input_ids": [fixed_length(row, length, tokenizer.pad_token_id) for row in ids]}

    with as_user_error(ValueError):
        data = setting.train.shuffle(seed=setting.args.seed).map(
            tokens,
            batched=True,
            batch_size=100,
            remove_columns=setting.train.column_names,
            num_proc=setting.args.dataset_num_proc,
            desc="Tokenizing",
        )
        train_sae(
            setting.model,
            tokenizer,
            data.with_format(None),
            out,
            layer=layer,
            seed=setting.args.seed,
            device="cuda" if torch.cuda.is_available() else "cpu",
            model_name=Path(setting.model).name if Path(setting.model).exists() else setting.model,
            dtype=setting.dtype,
            **sizes,
        )
    return check(config, overrides, sae=out, sae_id=None, hook_name=None, pairs=pairs)


def check(
    config: str, overrides: Sequence[str], *, sae: str | None, sae_id: str | None, hook_name: str | None, pairs: int
) -> int:
    """Print how good an SAE is on the completions of a recipe's held-out pairs."""
    from rich.console import Console
    from rich.table import Table

    from ..sae.check import check_sae
    from .setting import Setting

    setting = Setting.read(config, overrides)
    loaded = setting.load_sae(sae, sae_id)
    with as_user_error(ValueError):
        quality = check_sae(
            setting.load_model(),
            setting.tokenizer(),
            loaded,
            setting.responses(setting.heldout, pairs),
            hook_name=hook_name,
            max_length=setting.args.max_length,
        )
    table = Table("on held-out completions", "", title=f"{sae or setting.sae[0]}")
    table.add_row("tokens", f"{quality.tokens:,}")
    table.add_row("variance explained", f"{quality.variance_explained:.3f}")
    table.add_row("active features a token (L0)", f"{quality.l0:.1f}")
    table.add_row("features active on no token", f"{quality.dead:.1%} of {len(quality.frequency):,}")
    table.add_row("features active on over 10 % of tokens", f"{float((quality.frequency > 0.1).double().mean()):.1%}")
    Console().print(table)
    return 0
