"""Reading shards of pairs with a model that is loaded."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.logging import get_logger
from torch import Tensor, nn

from ...progress import progress_bar
from ...reading import check_reader
from ...readouts.sae_reader import SAEReader
from .layout import best_layout, run
from .pairs import Pairs, processes
from .pooling import Entries, pool
from .shards import SPANS, Active, shard_path, write_shard


if TYPE_CHECKING:
    from .run import HarvestSettings


logger = get_logger(__name__)


class Harvester:
    """Reads pairs and writes shards.

    Args:
        model: The reference; put into evaluation mode.
        reader: Reads all features of the SAE.
        pairs: The pairs.
        settings: How to read them.

    Attributes:
        layout: How pairs are laid out for the model.
        n_tokens: Tokens computed so far.
        n_computed: The same with padding.

    Raises:
        ValueError: If the SAE does not fit the model.
    """

    def __init__(self, model: nn.Module, reader: SAEReader, pairs: Pairs, settings: HarvestSettings) -> None:
        self.state = processes()
        self.model, self.reader, self.pairs, self.settings = model.eval(), reader, pairs, settings
        config: Any = model.config
        self.config = config.get_text_config()
        if warning := check_reader("The SAE", reader, model, self.config):
            logger.warning(warning)
        longest = pairs.collated([pairs.longest])
        self.layout = best_layout(model, reader.hook_name, longest, self.config, pairs.tokens)
        self.n_tokens = self.n_computed = 0

    def write(self, folder: Path, shards: list[int]) -> None:
        """Make shards, with a progress bar in the main process."""
        main, size = self.state.is_main_process, self.settings.shard_rows
        places = [np.arange(index * size, min((index + 1) * size, len(self.pairs))) for index in shards]
        for index in shards:
            for stale in folder.glob(f".{shard_path(folder, index).name}.*"):
                stale.unlink()  # what a kill left
        started = time.perf_counter()
        total = int(self.pairs.lengths[np.concatenate(places)].sum())
        # Pairs differ in length, tokens do not: rate and time left are those of tokens.
        with progress_bar(total=total, unit=" tokens", unit_scale=True, show=main, desc="harvest") as bar:
            for done, (index, part) in enumerate(zip(shards, places, strict=True)):
                bar.set_postfix_str(f"file {done + 1} of {len(shards)}")
                self._write_shard(folder, index, part, bar)
        seconds, padding = time.perf_counter() - started, 1 - self.n_tokens / self.n_computed
        n = sum(map(len, places))
        logger.info(f"{n} pairs, {self.n_tokens} tokens, {padding:.1%} padding, {seconds:.0f} s")

    def read(self, inputs: dict[str, Tensor]) -> tuple[Entries, Tensor, Tensor]:
        """Read a batch of TRL's collator.

        Args:
            inputs: B pairs, `(2B, T)` each.

        Returns:
            The active features, by slot (`3 x pair + span`); the tokens that were read, `(M,)` int64; and their slots, `(M,)` int64.
        """
        batch = self.layout(inputs, self.config, self.pairs.tokens)
        self.n_tokens += batch.n_tokens
        self.n_computed += batch.ids.numel()
        x, slot = run(self.model, self.reader.hook_name, batch)
        entries = pool(self.reader.to(x.device), x, slot)
        return Entries(*(part.cpu() for part in entries)), batch.ids[batch.slot >= 0], slot.cpu()

    def _write_shard(self, folder: Path, index: int, places: np.ndarray, bar: Any) -> None:
        n = len(places)
        found: list[Entries] = []
        tokens = np.zeros(3 * n, np.int32)
        ids: list[list[int]] = [[]] * (3 * n)
        texts = [""] * (3 * n)
        for batch in self.pairs.batches(places, self.settings.batch_tokens):
            inputs = self.pairs.collated(batch)
            entries, read, slot = self.read(inputs)
            # Slots of the batch to slots of the shard.
            home = torch.from_numpy(3 * (batch - places[0])[:, None] + np.arange(3)).flatten()
            found.append(entries._replace(slot=home[entries.slot]))
            order = slot.argsort(stable=True)
            counts = slot.bincount(minlength=len(home))
            for place, count, part in zip(
                home.tolist(), counts.tolist(), read[order].split(counts.tolist()), strict=True
            ):
                tokens[place], ids[place] = count, part.tolist()
            for place, text in zip(home.tolist(), self._texts(inputs), strict=True):
                texts[place] = text
            bar.update(int(self.pairs.lengths[batch].sum()))
        merged = Entries(*(torch.cat(parts) for parts in zip(*found, strict=True)))
        spans = {span: self._active(merged, tokens, number) for number, span in enumerate(SPANS)}
        write_shard(
            folder,
            index,
            self.pairs.rows[places],
            spans,
            ids={span: ids[number::3] for number, span in enumerate(SPANS)},
            texts={span: texts[number::3] for number, span in enumerate(SPANS)},
        )

    def _active(self, entries: Entries, tokens: np.ndarray, span: int) -> Active:
        """What is stored of a span: the entries of its slots, in their rows' order."""
        keep = entries.slot % 3 == span
        if self.settings.min_freq > 0:
            keep &= entries.counts >= self.settings.min_freq * torch.from_numpy(tokens)[entries.slot]
        row, feature, counts, largest, peak = (part[keep] for part in entries)
        row = row // 3
        order = row.argsort(stable=True)
        ends = row.bincount(minlength=len(tokens) // 3).cumsum(0)
        return Active(
            indptr=torch.cat([ends.new_zeros(1), ends]).int().numpy(),
            features=feature[order].int().numpy(),
            counts=counts[order].int().numpy(),
            max=largest[order].numpy(),
            peak=peak[order].int().numpy(),
            tokens=tokens[span::3],
        )

    def _texts(self, inputs: dict[str, Tensor]) -> list[str]:
        """The spans' texts, by slot, with the tokens that are not read."""
        attended, completion = inputs["attention_mask"].bool(), inputs["completion_mask"].bool()
        pairs = len(attended) // 2
        ids = []
        for pair in range(pairs):
            chosen, rejected = inputs["input_ids"][pair], inputs["input_ids"][pairs + pair]
            ids.append(chosen[attended[pair] & ~completion[pair]].tolist())
            ids.append(chosen[completion[pair]].tolist())
            ids.append(rejected[completion[pairs + pair]].tolist())
        return self.pairs.tokenizer.batch_decode(ids, skip_special_tokens=True)
