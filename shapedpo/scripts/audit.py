"""`shapedpo audit`: what a preference dataset teaches, before anything is trained."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .errors import as_user_error


HELP = """\
Read what a preference dataset teaches, before anything is trained. One pass of the reference over the data reads every feature of
an SAE in each prompt, chosen and rejected completion; what it reads is kept in OUT/harvest and used again as long as model,
SAE, data and settings stay the same. A pass that was killed goes on where it was. Several processes share it:

  shapedpo audit --model meta-llama/Llama-3.1-8B-Instruct --sae SAE --dataset pairs.jsonl --out audits/pairs
  accelerate launch -m shapedpo audit --model M --sae RELEASE --sae-id ID --dataset D --sample 20000 --dtype bfloat16 --out OUT
"""

HARVEST_FOLDER = "harvest"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments. Their defaults are those of `HarvestSettings`, which is too slow to import here."""
    what = parser.add_argument_group("what is read")
    what.add_argument("--model", required=True, help="the reference: a folder, a name on the hub, or `lab`")
    what.add_argument("--sae", required=True, help="the SAE: a folder that sae-lens saved, or a release that it knows")
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


def _length(text: str) -> int | None:
    return None if text.lower() == "none" else int(text)


def main(args: argparse.Namespace) -> int:
    """Run the command.

    Raises:
        UserError: If something that an argument names is not there, or does not fit.
    """
    harvest = run_harvest(args)
    size = sum(path.stat().st_size for path in harvest.folder.glob("*.parquet"))
    from ..audit.data import processes

    processes().print(f"{harvest.n_rows} pairs, {harvest.d_sae} features: {harvest.folder} ({size / 2**20:.1f} MiB)")
    return 0


def run_harvest(args: argparse.Namespace) -> Any:
    """The first stage: the harvest in `OUT/harvest`."""
    from ..audit.data import load_pairs
    from ..audit.harvesting import HarvestSettings, harvest
    from ..readouts import SAEFeatures

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
        return harvest(args.model, sae, data, Path(args.out) / HARVEST_FOLDER, settings, source=args.dataset)
