"""`shapedpo train`: TRL's DPO script, with concepts."""

from __future__ import annotations

import argparse
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError, as_user_error, suggest
from ..sources import concepts_from, load_preferences, model_source
from .recipe import Recipe, read_recipe


if TYPE_CHECKING:
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

    from ..concept import Concept
    from ..config import ShapedDPOConfig

    Arguments = tuple[ScriptArguments, ShapedDPOConfig, ModelConfig, DatasetMixtureConfig]


def main(config: str | None, overrides: Sequence[str], *, help_all: bool = False) -> int:
    """Train from a recipe and what the command line changes in it.

    Args:
        config: Path of the recipe, or `None` where everything is on the command line.
        overrides: The command line's `--key value` arguments.
        help_all: Print every key instead.

    Returns:
        The exit status.

    Raises:
        UserError: If the recipe, an argument or something that they name is at fault.
    """
    recipe = read_recipe(config) if config is not None else None
    if recipe is not None:
        os.environ.update(recipe.env)  # before the imports below, some of which read the environment
    if help_all:
        make_parser().print_help()
        return 0
    if recipe is None and not overrides:
        raise UserError("There is nothing to train: give a recipe, `shapedpo train --config recipes/goblin_lab.yaml`.")
    train(*parse(recipe, overrides))
    return 0


def make_parser() -> TrlParser:
    """TRL's parser over the dataclasses that make up a recipe."""
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

    from ..config import ShapedDPOConfig

    dataclasses: Any = (ScriptArguments, ShapedDPOConfig, ModelConfig, DatasetMixtureConfig)
    # Of 150 keys the usage would hide the one error that it is printed with.
    usage = "shapedpo train [--config RECIPE] [--KEY VALUE ...]  (all keys: shapedpo train --help-all)"
    parser = TrlParser(dataclasses, prog="shapedpo train", usage=usage, allow_abbrev=False)
    for action in parser._actions:
        if action.dest == "concepts":
            action.type = _concepts_argument
    return parser


def _concepts_argument(text: str) -> list[Concept] | None:
    """`--concepts` on the command line: the path of a YAML file, a JSON list, or `none` for plain DPO."""
    if text.lower() in ("none", "null"):
        return None
    try:
        return concepts_from(json.loads(text) if text.lstrip().startswith("[") else text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def parse(recipe: Recipe | None, overrides: Sequence[str]) -> Arguments:
    """Turn a recipe and the command line's arguments, which win, into the dataclasses.

    Raises:
        UserError: For an unknown key, or a value that does not fit.
        SystemExit: For a value that argparse refuses, as any command line does (status 2).
    """
    if overrides and not overrides[0].startswith("-"):
        raise UserError(
            f"unexpected {overrides[0]!r}: a recipe is given with --config, and what it is to change with --KEY VALUE."
        )
    parser = make_parser()
    if recipe is not None:
        recipe.check_keys({action.dest for action in parser._actions} - {"help"})
        values = dict(recipe.values)
        if "concepts" in values:  # built here, so that what is wrong with one is said before anything is loaded
            values["concepts"] = concepts_from(values["concepts"])
        parser.set_defaults_with_config(**values)
    with as_user_error(ValueError, TypeError), warnings.catch_warnings():
        # the name of TRL's own field, which a recipe cannot but use
        warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)
        *parsed, remaining = parser.parse_args_into_dataclasses(
            args=list(overrides), return_remaining_strings=True, look_for_args_file=False
        )
    if remaining:
        unknown = remaining[0].split("=")[0]
        known = [option for action in parser._actions for option in action.option_strings]
        raise UserError(f"unknown argument {unknown!r}.{suggest(unknown, known)} (All: shapedpo train --help-all)")
    return tuple(parsed)  # type: ignore[return-value]


def train(
    script_args: ScriptArguments,
    training_args: ShapedDPOConfig,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
) -> None:
    """Load what the arguments name, train, save.

    Raises:
        UserError: If a name leads nowhere, a split is missing, or the trainer's construction says that something does not fit.
    """
    from trl import get_peft_config, get_quantization_config

    from ..trainer import ShapedDPOTrainer

    model = model_source(model_args.model_name_or_path)
    given = training_args.model_init_kwargs or {}
    if not isinstance(given, dict):  # JSON, which the config's own checks have parsed where it is well-formed
        raise UserError(f"`model_init_kwargs` must be a mapping, got {given!r}.")
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **given,
    }
    _start_processes(training_args)
    splits = load_preferences(script_args, dataset_args)
    evaluates = str(training_args.eval_strategy) not in ("no", "IntervalStrategy.NO")
    with as_user_error(ValueError, OSError, ImportError):  # the hub's errors are of the second kind
        trainer = ShapedDPOTrainer(
            model=model,
            args=training_args,
            train_dataset=_split(splits, script_args.dataset_train_split, "dataset_train_split"),
            eval_dataset=_split(splits, script_args.dataset_test_split, "dataset_test_split") if evaluates else None,
            quantization_config=get_quantization_config(model_args),
            peft_config=get_peft_config(model_args),
        )
    if script_args.ignore_bias_buffers:
        import torch

        # What TRL's scripts do for models whose boolean attention buffers DDP cannot broadcast.
        policy: Any = trainer.model
        policy._ddp_params_and_buffers_to_ignore = [
            name for name, buffer in policy.named_buffers() if buffer.dtype == torch.bool
        ]

    trainer.train(resume_from_checkpoint=_checkpoint(training_args))
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"Model saved to {training_args.output_dir}")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
        trainer.accelerator.print(f"Model pushed to the hub as {trainer.hub_model_id}")
    if hasattr(trainer, "end"):  # transformers 5.18: finishes the trackers and the process group
        trainer.end()


def _start_processes(training_args: ShapedDPOConfig) -> None:
    """Set up the process group for ZeRO-3, which otherwise comes too late.

    The trainer loads its models, under `zero.Init`, before it sets up its processes, and without a process group `zero.Init` takes it
    that there is one process (deepspeed 0.19: `train_batch_size is not equal to micro_batch_per_gpu * ...`).
    """
    from transformers.integrations import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled():
        _ = training_args.device  # the property that sets them up


def _split(splits: Any, name: str, key: str) -> Any:
    if name not in splits:
        raise UserError(f"{key}: the data has no split {name!r}; it has {', '.join(map(str, splits))}.")
    return splits[name]


def _checkpoint(training_args: ShapedDPOConfig) -> str | bool | None:
    """What `Trainer.train` takes for `resume_from_checkpoint`; `true` stands for the last one in the output folder."""
    from transformers.trainer_utils import get_last_checkpoint

    wanted = training_args.resume_from_checkpoint
    if wanted is None or str(wanted).lower() in ("false", "none", ""):
        return None
    if str(wanted).lower() == "true":
        output = Path(str(training_args.output_dir))
        last = get_last_checkpoint(str(output)) if output.is_dir() else None
        if last is None:
            raise UserError(f"resume_from_checkpoint: there is no checkpoint in output_dir, {str(output)!r}.")
        return True  # the trainer finds the last that is whole
    if not Path(wanted).is_dir():
        raise UserError(f"resume_from_checkpoint: there is no folder {wanted!r}.")
    return str(wanted)
