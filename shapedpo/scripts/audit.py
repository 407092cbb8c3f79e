"""`shapedpo audit`: what a preference dataset teaches, before anything is trained."""

from __future__ import annotations

import argparse
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from ..audit.folder import ANALYSIS, ANSWERS, HARVEST, SUMMARY
from ..errors import UserError, as_user_error, suggest


HELP = """\
Read what a preference dataset teaches, before anything is trained. One pass of the reference over the data reads every feature of
an SAE in each prompt, chosen and rejected completion; what it reads is kept in OUT/harvest and used again as long as model,
SAE, data and settings stay the same. A pass that was killed goes on where it was. Several processes share it.

Then it is analysed: clusters of features, where in the data each is rewarded, what chosen answers move toward when a prompt expresses
something, each with its rows. That goes to OUT/analysis, what clusters are called to OUT/labels.json, and the strongest lessons are
printed, also to OUT/summary.txt. OUT/audit.html is a page of it all; `shapedpo view OUT` shows all rows of a large audit.

  shapedpo audit --model meta-llama/Llama-3.1-8B-Instruct --sae SAE --dataset pairs.jsonl --out audits/pairs
  accelerate launch -m shapedpo audit --model M --sae RELEASE --sae-id ID --dataset D --sample 20000 --dtype bfloat16 --out OUT
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments. Their defaults are those of `HarvestSettings`, which is too slow to import here."""
    what = parser.add_argument_group("what is read")
    what.add_argument("--model", required=True, help="the reference: a folder, a name on the hub, or `lab`")
    what.add_argument("--sae", required=True, help="a folder that sae-lens saved, a release that it knows, or `lab`")
    what.add_argument("--sae-id", help="which SAE of the release")
    what.add_argument("--hook-name", help="where to read, if the SAE's metadata does not say")
    what.add_argument("--dataset", required=True, help="a file, a folder, a name on the hub, or lab:WORLD")
    what.add_argument("--dataset-config", help="configuration of a dataset on the hub")
    what.add_argument("--split", default="train", help="(%(default)s)")
    what.add_argument("--streaming", action="store_true", help="fetch rows one by one, with --limit no more than that")
    what.add_argument("--limit", type=int, metavar="N", help="the first N rows only")
    what.add_argument("--sample", type=int, metavar="N", help="N of those rows at random")
    what.add_argument("--seed", type=int, default=0, help="of the sample (%(default)s)")
    how = parser.add_argument_group("how")
    how.add_argument("--out", required=True, metavar="DIR", help="where everything goes")
    how.add_argument(
        "--max-length", type=_length, default=1024, metavar="N", help="tokens, or none, as in training (%(default)s)"
    )
    how.add_argument("--truncation-mode", default="keep_start", help="or keep_end, as in training (%(default)s)")
    how.add_argument("--dtype", default="float32", help="of the model: or bfloat16, float16 (%(default)s)")
    how.add_argument("--sae-dtype", default="float32", help="of the SAE (%(default)s)")
    how.add_argument("--batch-tokens", type=int, default=8192, help="tokens in a forward pass (%(default)s)")
    how.add_argument("--shard-rows", type=int, default=512, help="pairs in a file (%(default)s)")
    how.add_argument(
        "--min-freq", type=float, default=0.0, help="forget what is active on a smaller share of a span (%(default)s)"
    )
    predicted = parser.add_argument_group("how far it predicts that a run moves each")
    predicted.add_argument(
        "--answers",
        type=int,
        default=0,
        metavar="N",
        help="the reference answers N of the prompts twice, which says what can move, and what with it (%(default)s: none)",
    )
    predicted.add_argument(
        "--pilot",
        metavar="M2",
        help="the model after the first part of a run on this data (a quarter of its steps, say), or its adapter: how it generalises, by its "
        "log-probabilities of the answers",
    )
    predicted.add_argument(
        "--pilot-share",
        type=float,
        metavar="SHARE",
        help="the share of the run's steps, weighted by their learning rates, that the pilot has had: the scale of the predictions follows",
    )
    predicted.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="where an answer is cut (256, or half of the model's context)"
    )
    found = parser.add_argument_group("what is made of it")
    found.add_argument("--harvest-only", action="store_true", help="stop after the pass")
    found.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a constant of the analysis (a field of AuditSettings), such as data_clusters=64; else they scale with the data",
    )


def _length(text: str) -> int | None:
    try:
        return None if text.lower() == "none" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number of tokens or none, got {text!r}") from None


def main(args: argparse.Namespace) -> int:
    """Run the command.

    Raises:
        UserError: If something that an argument names is not there, or does not fit.
    """
    from accelerate import PartialState

    constants = _constants(args.set)
    _check_answers(args)  # before the pass, which takes hours
    harvest = run_harvest(args)
    size = sum(path.stat().st_size for path in harvest.folder.glob("*.parquet"))
    state = PartialState()
    state.print(f"{harvest.n_rows} pairs, {harvest.d_sae} features: {harvest.folder} ({size / 2**20:.1f} MiB)")
    if state.is_main_process and not args.harvest_only:
        run_analysis(args, harvest, constants)
    return 0


def _check_answers(args: argparse.Namespace) -> None:
    """See that what is asked of answers and pilot fits."""
    from ..audit.prediction.run import PredictionSettings
    from ..sources import model_source

    if args.pilot_share and not args.pilot:
        raise UserError("--pilot-share is of a pilot: name it with --pilot M2.")
    if args.pilot and not args.answers:
        raise UserError("--pilot weighs the reference's answers: say how many prompts with --answers N (256, say).")
    if args.answers < 0:
        raise UserError(f"--answers must be 0 or more, got {args.answers}.")
    if args.answers and args.streaming:
        raise UserError("--answers: the prompts of a streamed dataset cannot be drawn from. Leave out --streaming.")
    with as_user_error(ValueError):
        PredictionSettings(pilot_share=args.pilot_share)
    if args.pilot:
        model_source(args.pilot, "--pilot")


def _constants(given: list[str]) -> dict[str, Any]:
    """The constants of `--set`, by name."""
    from ..audit.analysis.settings import AuditSettings

    known: dict[str, type] = {field.name: type(getattr(AuditSettings, field.name)) for field in fields(AuditSettings)}
    constants: dict[str, Any] = {}
    for item in given:
        name, equals, value = item.partition("=")
        if not equals:
            raise UserError(f"--set {item}: expected NAME=VALUE, such as data_clusters=64.")
        if name not in known:
            raise UserError(f"--set {item}: there is no constant {name!r}.{suggest(name, known)}")
        with as_user_error(ValueError, prefix=f"--set {item}: "):
            constants[name] = known[name](value)
            AuditSettings(**{name: constants[name]})
    return constants


def run_analysis(args: argparse.Namespace, harvest: Any, constants: dict[str, Any]) -> None:
    """The second stage: both views in `OUT/analysis`, and their summary."""
    from rich.console import Console
    from transformers import AutoTokenizer

    from ..audit.analysis.maps import cluster_maps
    from ..audit.analysis.run import analyse
    from ..audit.analysis.settings import AuditSettings
    from ..audit.labels.names import Labels, token_labels
    from ..audit.page.render import write_page
    from ..audit.page.source import Audit
    from ..audit.prediction.run import PredictionSettings, predict
    from ..sources import model_source

    out = Path(args.out)
    with as_user_error(ValueError):
        settings = AuditSettings.for_data(harvest.n_rows, harvest.d_sae, **{"seed": args.seed, **constants})
        analysis = analyse(harvest, settings, out / ANALYSIS)
    with as_user_error(ValueError):
        how = PredictionSettings(pilot_share=args.pilot_share)
        prediction = predict(harvest, analysis, how, rollouts=_answers(args, harvest))
    prediction.save(out / ANALYSIS)
    tokenizer: Any = AutoTokenizer.from_pretrained(model_source(args.model))
    maps = cluster_maps(analysis, harvest)
    with as_user_error(ValueError):
        labels = Labels.load(out, analysis)  # the titles of an earlier `shapedpo label`, too
    if labels is None:
        labels = token_labels(analysis, harvest, maps, partial(tokenizer.decode, skip_special_tokens=True))
        labels.save(out, analysis)
    audit = Audit(out, analysis, harvest, labels, maps, prediction)
    Console().print(audit.summary)
    with (out / SUMMARY).open("w", encoding="utf-8") as file:
        Console(file=file, width=160).print(audit.summary)
    page = write_page(audit, tokenizer)
    print(f"{len(analysis.hypotheses):,} hypotheses: {out / ANALYSIS}; this summary: {out / SUMMARY}")
    print(f"Look at it: {page} (self-contained), or `shapedpo view {out}`, which has all rows")


def _answers(args: argparse.Namespace, harvest: Any) -> Any:
    """The reference's answers to some of the data's prompts, weighed by the pilot if there is one; `None` if none are asked for."""
    if not args.answers:
        return None
    import torch
    from transformers import AutoTokenizer

    from ..audit.harvesting.pairs import load_pairs
    from ..audit.rollouts.models import answer_length, load_model, longest_prompt, prompt_tokens
    from ..audit.rollouts.run import RolloutSettings, roll_out
    from ..readouts import SAEFeatures
    from ..sources import model_source

    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    source = model_source(args.model)
    base: Any = load_model(source, args.model, args.dtype, device)
    pilot = base if args.pilot is None else load_model(model_source(args.pilot), args.model, args.dtype, device)
    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    with as_user_error(ValueError):
        settings = RolloutSettings(max_new_tokens=answer_length(base, args.max_new_tokens), seed=args.seed)
    data = load_pairs(args.dataset, args.split, args.dataset_config).select(harvest.rows)
    longest = longest_prompt(base, settings.max_new_tokens)
    prompts = prompt_tokens(data, tokenizer, args.answers, longest, args.seed)
    reader: Any = SAEFeatures.from_dict(harvest.settings["sae"]).load()
    return roll_out(base, pilot, tokenizer, prompts, reader, Path(args.out) / ANSWERS, settings, both=False)


def run_harvest(args: argparse.Namespace) -> Any:
    """The first stage: the harvest in `OUT/harvest`."""
    from ..audit.harvesting.pairs import load_pairs
    from ..audit.harvesting.run import HarvestSettings, harvest
    from ..readouts import SAEFeatures
    from ..sources import model_source

    model_source(args.model, "--model")
    names = (
        "limit",
        "sample",
        "seed",
        "max_length",
        "truncation_mode",
        "dtype",
        "min_freq",
        "shard_rows",
        "batch_tokens",
    )
    with as_user_error(ValueError, TypeError, FileNotFoundError, OSError):
        settings = HarvestSettings(**{name: getattr(args, name) for name in names})
        sae = SAEFeatures(args.sae, "all", sae_id=args.sae_id, hook_name=args.hook_name, dtype=args.sae_dtype)
        data = load_pairs(args.dataset, args.split, args.dataset_config, args.streaming)
        origin = {"source": args.dataset, "split": args.split, "config": args.dataset_config}
        return harvest(args.model, sae, data, Path(args.out) / HARVEST, settings, **origin)
