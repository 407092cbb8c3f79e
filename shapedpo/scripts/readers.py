"""What `shapedpo sae` and `shapedpo concepts direction` do: make and check what reads a concept, from a recipe's model and data."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from ..errors import UserError, as_user_error
from ..sources import load_preferences, model_source, sae_source
from .recipe import read_recipe
from .train import parse


if TYPE_CHECKING:
    from datasets import Dataset
    from sae_lens import SAE

    from ..readouts.responses import Response


class Setting(NamedTuple):
    """What a recipe says of model and data.

    Attributes:
        model: Folder or hub name.
        dtype: Of the model's weights.
        train: Pairs to train an SAE on.
        heldout: Pairs to check on: the test split, or every twentieth pair where there is none.
        sae: The SAE that the recipe watches (release or folder, and `sae_id`).
        args: The trainer's arguments.
    """

    model: str
    dtype: str
    train: Dataset
    heldout: Dataset
    sae: tuple[str | None, str | None]
    args: Any

    @classmethod
    def read(cls, config: str, overrides: Sequence[str]) -> Setting:
        """Read a recipe, with the command line's changes.

        Raises:
            UserError: If the recipe is at fault, or streams its data.
        """
        script, args, model, mixture = parse(read_recipe(config), overrides)
        splits = load_preferences(script, mixture)
        if script.dataset_streaming:
            raise UserError("This needs the data whole: set dataset_streaming to false.")
        if script.dataset_train_split not in splits:
            raise UserError(f"dataset_train_split: the data has no split {script.dataset_train_split!r}.")
        train = splits[script.dataset_train_split]
        if script.dataset_test_split in splits:
            heldout = splits[script.dataset_test_split]
        else:
            heldout = train.select(range(0, len(train), 20))
            train = train.select([row for row in range(len(train)) if row % 20])
        dtype = (model.dtype or "auto") if torch.cuda.is_available() else "float32"
        watched = (args.monitor_sae, args.monitor_sae_id)
        return cls(model_source(model.model_name_or_path), dtype, train, heldout, watched, args)

    def tokenizer(self) -> Any:
        """The model's tokenizer, with padding as TRL sets it."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.model)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        return tokenizer

    def load_model(self) -> Any:
        """The model: on the GPUs of this machine, over several where one is too small, or on the CPU."""
        from transformers import AutoModelForCausalLM

        where = "auto" if torch.cuda.is_available() else "cpu"
        return AutoModelForCausalLM.from_pretrained(self.model, dtype=self.dtype, device_map=where)

    def load_sae(self, name: str | None, sae_id: str | None) -> SAE[Any]:
        """The SAE of that name, or the one that the recipe watches."""
        from ..readouts.sae import load_sae

        if name is None:
            name, sae_id = self.sae
        if name is None:
            raise UserError("Which SAE? Give --sae (a folder or a release), or `monitor_sae` in the recipe.")
        with as_user_error(ValueError):
            return load_sae(sae_source(name), sae_id)

    def responses(self, rows: Dataset, pairs: int) -> list[Response]:
        """Both completions of the first so many pairs, drawn with the run's seed."""
        from ..readouts.responses import pair_responses

        return list(pair_responses(rows.shuffle(seed=self.args.seed).select(range(min(pairs, len(rows))))))


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
    from ..readouts.responses import pair_responses, tokenize_response
    from ..sae.train import fixed_length, train_sae

    setting = Setting.read(config, overrides)
    tokenizer = setting.tokenizer()
    length = setting.args.max_length or 1024

    def tokens(columns: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        ids = (tokenize_response(tokenizer, *response)[0] for response in pair_responses(rows))
        return {"input_ids": [fixed_length(row, length, tokenizer.pad_token_id) for row in ids]}

    data = setting.train.shuffle(seed=setting.args.seed).map(
        tokens,
        batched=True,
        batch_size=100,
        remove_columns=setting.train.column_names,
        num_proc=setting.args.dataset_num_proc,
        desc="Tokenizing",
    )
    with as_user_error(ValueError):
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
    from ..sae.check import check_sae

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


def direction(config: str, overrides: Sequence[str], *, pattern: str, layer: int, out: str, pairs: int) -> int:
    """Make the direction from completions that do not match a regular expression to those that do, and save it."""
    from ..readouts import Direction

    setting = Setting.read(config, overrides)
    responses = setting.responses(setting.train, pairs)
    shows = matches(responses, pattern)
    with as_user_error(ValueError):
        found = Direction.from_contrast(
            setting.load_model(),
            setting.tokenizer(),
            [response for response, positive in zip(responses, shows, strict=True) if positive],
            [response for response, positive in zip(responses, shows, strict=True) if not positive],
            layer,
        )
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    found.save(out)
    print(f"{out}: from {shows.sum()} completions that match and {(~shows).sum()} that do not, after layer {layer}")
    return 0


def matches(responses: Sequence[Response], pattern: str) -> Any:
    """Which responses match a regular expression: `(N,)` bool."""
    import numpy as np

    from ..readouts.responses import response_text

    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UserError(f"--pattern {pattern!r} is no regular expression: {error}.") from error
    shows = np.array([expression.search(response_text(response)) is not None for _, response in responses])
    if min(shows.sum(), (~shows).sum()) < 10:
        raise UserError(
            f"{shows.sum()} of {len(shows)} completions match {pattern!r}: at least 10 that do and 10 that do not are needed. "
            "Look at more with --sample, or change the pattern."
        )
    return shows
