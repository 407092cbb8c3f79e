"""What a trained model says beside the model it was trained from, on the same prompts, read by the latter as a harvest of pairs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor

from ...collator import ROW
from ...files import replacing
from ...monitor.estimators import bridge_weights
from ...monitor.probe.rollouts import Probe, Reading, Readings, Rows
from ...readouts.sae_reader import SAEReader
from ..harvesting import shards
from ..harvesting.harvester import Harvester
from ..harvesting.layout import Tokens
from ..harvesting.pairs import Pairs
from ..harvesting.run import HarvestSettings
from ..harvesting.store import Harvest


FILE = "log_ratios.parquet"
_LARGEST_RATIO = 5.0  # nats: one answer must not outweigh all others
_LOGITS = 2**26  # at once: 256 MB


@dataclass(frozen=True)
class RolloutSettings:
    """How prompts are answered.

    Args:
        draws: Times that each prompt is answered by each model, two answers a time.
        max_new_tokens: Where an answer is cut.
        batch_size: Prompts answered at once.
        seed: Of the sampling. Both models draw with the same random numbers, so that they say the same until they disagree.

    Raises:
        ValueError: If a number is below 1.
    """

    draws: int = 1
    max_new_tokens: int = 128
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for f in fields(self):
            if f.name != "seed" and getattr(self, f.name) < 1:
                raise ValueError(f"`{f.name}` must be 1 or more, got {getattr(self, f.name)!r}.")


@dataclass(frozen=True)
class Rollouts:
    """Pairs of answers to the same prompts.

    Attributes:
        harvest: A row for each pair of answers: `rejected` is the base model's, `chosen` the trained model's, or also the base model's.
        log_ratios: `(n, 2)` float64, log-probability of either answer under the trained model minus that under the base model, nats.
        both: Whether both models answered. Otherwise the base model did, and the trained one is only known by its log-ratios.
    """

    harvest: Harvest
    log_ratios: NDArray[np.float64]
    both: bool = True

    @property
    def weights(self) -> NDArray[np.float64]:
        r"""`(n, 2)`, by which scores are multiplied so that their mean is the change of the mean score: \( (\pi - \text{ref})/q \), with `q`
        what the answers were drawn from, both models (bridge sampling, Meng and Wong 1996) or the base model."""
        return (
            bridge_weights(self.log_ratios, 0.5) if self.both else np.expm1(np.minimum(self.log_ratios, _LARGEST_RATIO))
        )

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Rollouts:
        """Open what [`roll_out`] wrote.

        Raises:
            FileNotFoundError: If the folder holds none, or not all of it.
        """
        import pyarrow.parquet as pq

        path = Path(folder) / FILE
        if not path.is_file():
            raise FileNotFoundError(f"There are no rollouts in '{folder}': it has no {FILE}.")
        table = pq.ParquetFile(path).read()
        ratios = np.stack([table[name].to_numpy() for name in ("chosen", "rejected")], axis=1)
        harvest = Harvest.open(folder)
        return cls(harvest, ratios, harvest.settings.get("both", True))


class _Answers(Pairs):
    """Pairs of answers that are tokens already."""

    def __init__(self, rows: Sequence[dict[str, list[int]]], tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.tokens = Tokens(tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        self._data = Dataset.from_list([{ROW: number, **row} for number, row in enumerate(rows)])
        self.dropped = 0
        self._measure(None, "keep_start")


def roll_out(
    base: Any,
    trained: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    reader: SAEReader,
    folder: str | os.PathLike[str],
    settings: RolloutSettings | None = None,
    *,
    both: bool = True,
) -> Rollouts:
    """Answer prompts at temperature 1, and read the answers with the base model.

    Args:
        base: The model before training, which is the reference.
        trained: The model after it, or after a few steps of it; the base model itself where only its answers are wanted.
        tokenizer: Of both.
        prompts: Tokens of each prompt, as the models see them.
        reader: Reads all features of the SAE.
        folder: Where the answers go; an empty one.
        settings: How.
        both: Whether both models answer. Otherwise the base model does, and the trained one only weighs its answers: enough while it is
            near, and half the work.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    settings = settings or RolloutSettings()
    folder = Path(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    pad = tokenizer.pad_token_id
    probe = Probe(prompts, Accelerator(), settings.max_new_tokens, pad, settings.seed, settings.batch_size)

    def read(model: Any, rows: Rows) -> Reading:
        """Log-probabilities of the answers under both models."""
        before = log_probs(base, rows, pad)
        after = before if trained is base else log_probs(trained, rows, pad)
        return Reading(before.new_zeros(len(before), 0), None, before, after)

    modes = base.training, trained.training
    base.eval()
    trained.eval()
    ends = _ends_alike(base, trained, tokenizer)
    answers = probe.run(base, read, settings.draws)
    sides = _sides(answers) if not both else (_flat(probe.run(trained, read, settings.draws)), _flat(answers))
    order = np.arange(len(prompts)).repeat(2 if both else 1)
    rows = [
        {"prompt_ids": prompts[prompt], "chosen_ids": chosen, "rejected_ids": rejected}
        for prompt, chosen, rejected in zip(
            np.tile(order, settings.draws).tolist(), *(ids for ids, _ in sides), strict=True
        )
    ]
    pairs = _Answers(rows, tokenizer)
    harvesting = HarvestSettings(max_length=None)
    harvester = Harvester(base, reader, pairs, harvesting)
    shards.write_manifest(
        folder,
        d_sae=reader.n_features,
        n_rows=len(pairs),
        shard_rows=harvesting.shard_rows,
        settings={"rollouts": vars(settings), "both": both},
    )
    harvester.write(folder, list(range(shards.n_shards(len(pairs), harvesting.shard_rows))))
    base.train(modes[0])
    trained.train(modes[1])
    base.generation_config.eos_token_id, trained.generation_config.eos_token_id = ends
    with replacing(folder / FILE) as partial:
        pq.write_table(
            pa.table({name: ratios for name, (_, ratios) in zip(("chosen", "rejected"), sides, strict=True)}), partial
        )
    return Rollouts.open(folder)


def _ends_alike(base: Any, trained: Any, tokenizer: Any) -> tuple[Any, Any]:
    """Have both models end their answers at the tokens that end one for either or for the tokenizer: a generation config is saved by some trainers
    and not by others, and a model that goes on where the other stops would differ in what follows. Returns what each had."""
    before = base.generation_config.eos_token_id, trained.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id}
    for own in before:
        ends |= set(own if isinstance(own, list) else [own])
    base.generation_config.eos_token_id = trained.generation_config.eos_token_id = sorted(ends - {None}) or None
    return before


_Side = tuple[list[list[int]], NDArray[np.float64]]


def _flat(readings: Readings) -> _Side:
    """All answers, draw after draw and prompt after prompt: tokens and log-ratios."""
    ids = [_ids(padded) for padded in readings.ids.flatten(0, 2)]
    return ids, (readings.policy - readings.reference).flatten().double().cpu().numpy()


def _sides(readings: Readings) -> tuple[_Side, _Side]:
    """The first and the second answer to each prompt."""
    ids, ratios = _flat(readings)
    return (ids[::2], ratios[::2]), (ids[1::2], ratios[1::2])


def _ids(padded: Tensor) -> list[int]:
    return padded[padded >= 0].tolist()


@torch.no_grad()
def log_probs(model: Any, rows: Rows, pad: int) -> Tensor:
    """`(2B,)` float32, of the completions given their prompts, chosen ones first."""
    sides = [(row["prompt_ids"], row[side]) for side in ("chosen_ids", "rejected_ids") for row in rows]
    width = max(len(prompt) + len(written) for prompt, written in sides)
    device = next(model.parameters()).device
    ids = torch.tensor([[*p, *w, *[pad] * (width - len(p) - len(w))] for p, w in sides], device=device)
    place = torch.arange(width, device=device)
    ends = torch.tensor([len(p) + len(w) for p, w in sides], device=device)[:, None]
    starts = torch.tensor([len(p) for p, _ in sides], device=device)[:, None]
    written, attended = (place >= starts) & (place < ends), place < ends
    chunk = max(1, _LOGITS // (width * model.config.get_text_config().vocab_size))
    found = []
    for some in torch.arange(len(ids), device=device).split(chunk):
        logits = model(input_ids=ids[some], attention_mask=attended[some].long()).logits[:, :-1].float()
        tokens = logits.gather(-1, ids[some, 1:, None])[..., 0] - logits.logsumexp(-1)
        found.append((tokens * written[some, 1:]).sum(dim=1))
    return torch.cat(found)
