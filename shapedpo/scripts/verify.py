"""`shapedpo verify`: did what an audit predicted come true?"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..audit.folder import ANALYSIS, HARVEST, VERIFY
from ..errors import UserError, as_user_error


HELP = """\
Hold what an audit predicted against what a trained model says. The model before and after training answer the same held-out prompts with
the same random numbers; the model before training reads both answers with the audit's SAE, and each feature's and cluster's change is laid
beside the prediction, everywhere and under each condition.

Prints R^2 with its interval and the largest misses with their answers. Writes to OUT (DIR/verify) the answers, every line as
verify.parquet, the figures as verify.json, the picture verify.png and what was printed. Any model with the same tokens will do, one that was
trained elsewhere too, also a PEFT adapter.

  shapedpo verify --base meta-llama/Llama-3.1-8B-Instruct --trained runs/dpo --audit audits/pairs
"""

HELD_OUT_SPLITS = ("test", "validation")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "--base", required=True, help="the model before training, the audit's: a folder, a name on the hub, or `lab`"
    )
    parser.add_argument(
        "--trained", required=True, help="the model after it: a folder, a name on the hub, or a PEFT adapter"
    )
    parser.add_argument("--audit", required=True, metavar="DIR", help="what `shapedpo audit` wrote")
    parser.add_argument("--out", metavar="DIR", help="where everything goes (DIR/verify)")
    prompts = parser.add_argument_group("held-out prompts")
    prompts.add_argument(
        "--prompts",
        metavar="FILE",
        help="a data file with a column `prompt` (default: the test split of the audit's dataset, else rows that were not read)",
    )
    prompts.add_argument("--n-prompts", type=int, default=512, metavar="N", help="how many (%(default)s)")
    prompts.add_argument(
        "--draws", type=int, default=1, help="times each is answered, two answers a time (%(default)s)"
    )
    prompts.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="where an answer is cut (256, or half of the model's context)"
    )
    prompts.add_argument("--seed", type=int, default=0, help="of prompts and answers (%(default)s)")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--concepts",
        metavar="FILE",
        help="a YAML file of concepts, or a recipe: those of SAE features are looked at by name",
    )
    how.add_argument("--batch-size", type=int, default=32, help="prompts answered at once (%(default)s)")
    how.add_argument("--dtype", default="float32", help="of the models: or bfloat16, float16 (%(default)s)")
    how.add_argument(
        "--misses", type=int, default=10, metavar="N", help="how many of the largest misses are shown (%(default)s)"
    )


def main(args: argparse.Namespace) -> int:
    """Run the command.

    Raises:
        UserError: If something that an argument names is not there, or does not fit.
    """
    import torch
    from transformers import AutoTokenizer

    from ..audit.analysis.hypotheses import Analysis
    from ..audit.harvesting.store import Harvest
    from ..audit.prediction.conditions import Conditions
    from ..audit.prediction.run import Prediction
    from ..audit.rollouts.models import answer_length, load_model, longest_prompt
    from ..audit.rollouts.observed import observe
    from ..audit.rollouts.run import RolloutSettings, roll_out
    from ..audit.verify.comparison import compare
    from ..audit.verify.report import report
    from ..reading import check_reader
    from ..readouts import SAEFeatures
    from ..sources import model_source

    if args.n_prompts < 1 or args.misses < 0:
        raise UserError("--n-prompts must be 1 or more, and --misses 0 or more.")
    # what is not there is said before anything is loaded
    base_source, trained_source = model_source(args.base, "--base"), model_source(args.trained, "--trained")
    folder = Path(args.audit)
    with as_user_error(ValueError, FileNotFoundError, TypeError):
        harvest, analysis = Harvest.open(folder / HARVEST), Analysis.load(folder / ANALYSIS)
        prediction = Prediction.load(folder / ANALYSIS)
        sae = SAEFeatures.from_dict(harvest.settings["sae"])
        concepts = _concepts(args.concepts, sae) if args.concepts else {}
        reader: Any = sae.load()
    audited = harvest.settings["model"]
    if audited and audited != args.base:
        print(f"The audit was made with {audited!r}, and --base is {args.base!r}: they should be the same model.")
    with as_user_error(OSError, ValueError, prefix=f"--base {args.base}: "):
        tokenizer: Any = AutoTokenizer.from_pretrained(base_source)
    _check_tokens(args, tokenizer)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    base = load_model(base_source, args.base, args.dtype, device)
    with as_user_error(ValueError, prefix=f"--base {args.base}: "):
        check_reader("The audit's SAE", reader, base, base.config.get_text_config())
    trained = load_model(trained_source, args.base, args.dtype, device)
    if (known := trained.get_input_embeddings().num_embeddings) < len(tokenizer):
        raise UserError(_OTHER_TOKENS.format(args, f"it knows {known}, the base model has {len(tokenizer)}"))
    with as_user_error(ValueError, TypeError):
        settings = RolloutSettings(args.draws, answer_length(base, args.max_new_tokens), args.batch_size, args.seed)
    longest = longest_prompt(base, settings.max_new_tokens)
    prompts = held_out_prompts(harvest, tokenizer, args.prompts, args.n_prompts, longest, args.seed)
    out = Path(args.out) if args.out else folder / VERIFY
    with as_user_error(ValueError):
        rollouts = roll_out(base, trained, tokenizer, prompts, reader, out / "rollouts", settings)
    conditions = Conditions.of(analysis)
    outcome = compare(prediction, observe(rollouts, conditions))
    report(
        outcome, rollouts, conditions, harvest, analysis, tokenizer.decode, out, concepts=concepts, misses=args.misses
    )
    return 0


_OTHER_TOKENS = (
    "--trained {0.trained}: has other tokens than --base {0.base} ({1}). Give a model that was trained from that one."
)


def _check_tokens(args: argparse.Namespace, tokenizer: Any) -> None:
    """See, before models are loaded, that the trained one's tokens are the base model's.

    Raises:
        UserError: If not.
    """
    from transformers import AutoTokenizer

    from ..sources import model_source

    try:
        other = AutoTokenizer.from_pretrained(model_source(args.trained)).get_vocab()
    except (OSError, ValueError, TypeError, KeyError):  # it was saved without one
        return
    for token, number in tokenizer.get_vocab().items():
        if other.get(token) != number:
            raise UserError(_OTHER_TOKENS.format(args, f"{token!r} is {other.get(token)}, not {number}"))


def _concepts(file: str, audited: Any) -> dict[str, list[int]]:
    """The features of the named concepts that read some of the audit's SAE; the others are said."""
    from ..readouts import LabTrait, SAEFeatures
    from ..sources import concepts_from, sae_source

    def which(readout: Any) -> tuple[Any, ...]:
        path = Path(sae_source(readout.sae)).expanduser()
        return str(path.resolve() if path.exists() else readout.sae), readout.sae_id, readout.hook_name

    found, others = {}, []
    for concept in concepts_from(file):
        readout: Any = concept.readout.features() if isinstance(concept.readout, LabTrait) else concept.readout
        if isinstance(readout, SAEFeatures) and readout.features != "all" and which(readout) == which(audited):
            found[concept.name] = list(readout.features)
        else:
            others.append(concept.name)
    if others:
        print(f"Not looked at, as they read no features of the audit's SAE: {', '.join(others)}.")
    return found


def held_out_prompts(
    harvest: Any, tokenizer: Any, file: str | None, n: int, longest: int, seed: int
) -> list[list[int]]:
    """Tokens of prompts that the audit has not seen, as training would tokenise them.

    Args:
        harvest: The audit's harvest.
        tokenizer: The model's.
        file: Where prompts are taken from; by default from the harvest's dataset.
        n: How many at most; each is taken once.
        longest: Prompts of more tokens are passed over.
        seed: Which are taken.

    Raises:
        UserError: If there are none.
    """
    from datasets import load_dataset

    from ..audit.harvesting.pairs import load_pairs
    from ..audit.rollouts.models import prompt_tokens
    from ..sources import local_source

    if file is not None:
        with as_user_error(ValueError, FileNotFoundError, prefix=f"--prompts {file}: "):
            data: Any = load_dataset(**(local_source(file) or {"path": file}), split="train")
            if "prompt" not in data.column_names:
                raise UserError(f"--prompts {file}: expected a column `prompt`, found {', '.join(data.column_names)}.")
    else:
        data = _unread(harvest, load_pairs)
    return prompt_tokens(data, tokenizer, n, longest, seed)


def _unread(harvest: Any, load_pairs: Any) -> Any:
    """The test split of the harvest's dataset, or else its rows that the harvest has not read, which the run may have trained on."""
    import numpy as np

    name, audited, config = (harvest.settings.get(key) for key in ("dataset", "split", "config"))
    if name is None:
        raise UserError("The audit does not say which dataset it read: give held-out prompts with --prompts FILE.")
    audited = audited or "train"
    data = load_pairs(name, audited, config)
    others = [audited.replace("train", word) if "train" in audited else word for word in HELD_OUT_SPLITS]
    others = [split for split in others if split != audited]
    for split in others:
        try:
            return load_pairs(name, split, config)
        except UserError:
            continue
    rest = np.setdiff1d(np.arange(len(data)), harvest.rows)
    # rows that the harvest dropped since their prompts are too long are of no use here either
    if len(rest) >= max(1, len(data) // 100):
        print(
            f"Prompts: {len(rest):,} rows of {name!r} that the audit did not read. If the run trained on them, they are not held out: give others "
            "with --prompts FILE."
        )
        return data.select(rest)
    raise UserError(
        f"The audit read every row of {name!r}, and it has no split {' or '.join(others)}: give prompts that the run did not train on "
        "with --prompts FILE, a data file with a column `prompt`."
    )
