"""One pass of the reference over preference pairs: each SAE feature's maximum and frequency in each span, on disk.

After Bergen et al. (arXiv 2606.12360), the harvest of the data-centric audit. The numbers are those that training reads: the tokens are
TRL's, the activations the reference's, and the SAE is read by the trainer's own reader.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from torch import nn

from ...errors import as_user_error
from ...readouts import SAEFeatures
from ...readouts.base import fingerprint
from ...sources import model_source
from .harvester import Harvester
from .pairs import Pairs, load_pairs, processes
from .shards import MANIFEST, missing_shards, n_shards, read_manifest, write_manifest
from .store import Harvest


logger = get_logger(__name__)

DTYPES = ("float32", "bfloat16", "float16")
TRUNCATION_MODES = ("keep_start", "keep_end")
_NAMED = {"data": ("dataset", "split", "config", "limit", "sample", "seed"), "SAE": ("sae",)}
"""The settings that say what a fingerprint is of, where they are not called like it."""


@dataclass(frozen=True)
class HarvestSettings:
    """How to harvest.

    Args:
        limit: Take the first rows of the dataset only; of a stream no more are fetched.
        sample: Take that many of those at random.
        seed: Of the sample.
        max_length: Longest prompt and completion together, in tokens, as in `DPOConfig`; `None` for no truncation.
        truncation_mode: What to keep of longer ones, `keep_start` or `keep_end`, as in `DPOConfig`.
        dtype: Type in which the model computes: `float32` (as TRL loads it), `bfloat16` or `float16`. One that is loaded already stays as it is.
        min_freq: Leave out of the store what is active on a smaller fraction of a span's tokens.
        shard_rows: Pairs in a file. What a kill costs is at most one file's work.
        batch_tokens: Tokens in a forward pass, padding included. Does not change the result but for rounding.

    Raises:
        ValueError: If a number is out of range, or a choice unknown.
    """

    limit: int | None = None
    sample: int | None = None
    seed: int = 0
    max_length: int | None = 1024
    truncation_mode: str = "keep_start"
    dtype: str = "float32"
    min_freq: float = 0.0
    shard_rows: int = 512
    batch_tokens: int = 8192

    def __post_init__(self) -> None:
        for name in ("limit", "sample", "max_length", "shard_rows", "batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be 1 or more, got {value!r}.")
        if self.seed < 0:
            raise ValueError(f"`seed` must be 0 or more, got {self.seed!r}.")
        for name, known in (("truncation_mode", TRUNCATION_MODES), ("dtype", DTYPES)):
            if getattr(self, name) not in known:
                raise ValueError(f"Unknown {name} {getattr(self, name)!r}. Choose one of {', '.join(known)}.")
        if not 0 <= self.min_freq < 1:
            raise ValueError(f"`min_freq` must be at least 0 and less than 1, got {self.min_freq!r}.")


def harvest(
    model: str | nn.Module,
    sae: str | SAEFeatures,
    dataset: str | Dataset | IterableDataset,
    folder: str | Path,
    settings: HarvestSettings | None = None,
    *,
    tokenizer: Any = None,
    source: str | None = None,
    split: str = "train",
    config: str | None = None,
) -> Harvest:
    """Harvest a preference dataset, or open the harvest that is there.

    What is in `folder` already is used: all of it at once if it is finished, else its finished shards. Several processes
    (`accelerate launch`, `torchrun`) each make their own shards.

    Args:
        model: The reference: a folder, a name on the hub, `lab`, or a loaded causal language model, of which `name_or_path` is kept for later steps.
        sae: The SAE, as [`SAEFeatures`] takes it, or one of these with all features, for further fields.
        dataset: Preference pairs in any form that TRL takes, or the name of some (see [`~shapedpo.audit.harvesting.pairs.load_pairs`]).
        folder: Where the harvest goes.
        settings: How to harvest.
        tokenizer: The model's, if it is not where the model is.
        source: What to call the dataset in the harvest's settings; its name by default.
        split, config: Of a dataset that is named, which split and which configuration.

    Raises:
        ValueError: If model, SAE and dataset do not fit each other, or the folder holds a harvest of something else.
    """
    settings = settings or HarvestSettings()
    readout = sae if isinstance(sae, SAEFeatures) else SAEFeatures(sae, "all")
    if readout.features != "all":
        raise ValueError(f"A harvest reads all features of the SAE: pass features='all', not {readout.features!r}.")
    state = processes()
    folder = Path(folder)
    reader = readout.load()
    pairs = Pairs(
        load_pairs(dataset, split, config) if isinstance(dataset, str) else dataset,
        tokenizer or _tokenizer(model),
        max_length=settings.max_length,
        truncation_mode=settings.truncation_mode,
        limit=settings.limit,
        sample=settings.sample,
        seed=settings.seed,
    )
    if pairs.dropped:
        logger.warning(f"{pairs.dropped} pairs are left out, as in training: their prompt alone fills max_length.")
    if pairs.repeated:
        logger.warning(
            f"{pairs.repeated} of the {len(pairs)} pairs repeat others: what is found counts each as if it were new."
        )
    if pairs.same:
        logger.warning(f"{pairs.same} of the {len(pairs)} pairs have the same completion as chosen and rejected.")
    given = {
        "model": _name(model) or None,
        "dataset": dataset if source is None and isinstance(dataset, str) else source,
        "split": split,
        "config": config,
        "sae": readout.to_dict(),
        **dataclasses.asdict(settings),
    }
    prints = {
        "model": _model_fingerprint(model),
        "SAE": reader.fingerprint,
        "data": pairs.fingerprint,
        **{name: given[name] for name in ("max_length", "truncation_mode", "dtype", "min_freq", "shard_rows")},
    }
    count = n_shards(len(pairs), settings.shard_rows)
    # What failed before its first file was whole has left nothing that could be mixed up.
    begun = (folder / MANIFEST).exists() and any(folder.glob("shard-*.parquet"))
    if begun:
        _check_same(folder, read_manifest(folder), given, prints)
    # By number, not by what is missing: another process may have finished one by the time that this one looks.
    mine = [index for index in missing_shards(folder, count) if index % state.num_processes == state.process_index]
    if mine:
        harvester = Harvester(_loaded(model, settings.dtype, state.device), reader, pairs, settings)
        if state.is_main_process and not begun:
            write_manifest(
                folder,
                d_sae=reader.n_features,
                n_rows=len(pairs),
                shard_rows=settings.shard_rows,
                settings=given,
                fingerprint=prints,
            )
        folder.mkdir(parents=True, exist_ok=True)
        harvester.write(folder, mine)
    state.wait_for_everyone()
    return Harvest.open(folder)


def _name(model: str | nn.Module) -> str:
    """Where a model came from; empty if a loaded one does not say."""
    return model if isinstance(model, str) else getattr(model, "name_or_path", "")


def _tokenizer(model: str | nn.Module) -> Any:
    from transformers import AutoTokenizer

    if not _name(model):
        raise ValueError("The model does not say where it came from: pass its `tokenizer` too.")
    name = model_source(_name(model))
    with as_user_error(OSError, prefix=f"The model {name!r}: cannot load its tokenizer: "):
        return AutoTokenizer.from_pretrained(name)


def _loaded(model: str | nn.Module, dtype: str, device: torch.device) -> nn.Module:
    if not isinstance(model, str):
        return model
    from transformers import AutoModelForCausalLM

    with as_user_error(OSError, prefix=f"The model {model!r} cannot be loaded: "):
        loaded: Any = AutoModelForCausalLM.from_pretrained(model_source(model), dtype=getattr(torch, dtype))
    return loaded.to(device).eval().requires_grad_(False)


def _model_fingerprint(model: str | nn.Module) -> str:
    """Hash of a model's files, its commit on the hub, or its weights where it is loaded: of what it is, not of where it lies."""
    if not isinstance(model, str):
        names, tensors = zip(*sorted(model.state_dict().items()), strict=True)
        return fingerprint(names, *tensors)
    name = model_source(model)
    if not Path(name).is_dir():
        from transformers import AutoConfig

        return f"{name}@{AutoConfig.from_pretrained(name)._commit_hash}"
    digest = hashlib.sha256()
    patterns = ("config.json", "*.safetensors", "*.bin")
    for path in sorted(path for pattern in patterns for path in Path(name).glob(pattern)):
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()};".encode())
    return digest.hexdigest()


def _check_same(folder: Path, manifest: Mapping[str, Any], given: Mapping[str, Any], prints: Mapping[str, Any]) -> None:
    there, settings = manifest["fingerprint"], manifest["settings"]
    changed = [name for name in prints if there.get(name) != prints[name]]
    if changed:
        both = "; ".join(_change(settings, given, _NAMED.get(name, (name,))) for name in changed)
        raise ValueError(
            f"The folder '{folder}' holds a harvest of something else: {' and '.join(changed)} differ ({both}). Choose another "
            "folder, or delete that one."
        )


def _change(before: Mapping[str, Any], now: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """What has changed of some settings; the content of what the first names, where they are the same."""
    if apart := [name for name in names if before.get(name) != now[name]]:
        return ", ".join(f"{name} was {before.get(name)!r}, now {now[name]!r}" for name in apart)
    return f"{names[0]} is {now[names[0]]!r} as before, with other content"
