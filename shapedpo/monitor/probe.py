"""Probe rollouts: what the model says now on held-out prompts, read with the frozen reference, beside what it said before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from scipy.stats import binomtest
from torch import Tensor
from tqdm.auto import tqdm

from .estimates import Estimates


ROLLOUTS = 2
"""Rollouts of each prompt: a pair, which the reading of pairs takes as it is."""

BATCH = 16
"""Prompts sampled at once. Fixed, so that the same rollouts come out on any number of processes."""


class Readings(NamedTuple):
    """What one probe read on N prompts, each sampled twice. Float32.

    Attributes:
        scores: `(N, 2, C)`, the concepts' standardised scores, the same on all processes.
        features: `(n, F)`, monitored features, averaged over the prompt's rollouts, of this process's n prompts; or `None`.
    """

    scores: Tensor
    features: Tensor | None


class Probe:
    """Samples a fixed set of prompts with fixed seeds, dealt out over processes in fixed batches.

    Args:
        prompts: Token ids of the prompts, the same on all processes.
        accelerator: The run's.
        max_new_tokens: Where a rollout is cut.
        pad_token_id: What fills batches up.
        seed: Of the sampling: the same at every probe, so that the same model says the same.
    """

    def __init__(
        self, prompts: Sequence[list[int]], accelerator: Accelerator, max_new_tokens: int, pad_token_id: int, seed: int
    ) -> None:
        self.prompts = list(prompts)
        self.accelerator = accelerator
        self.max_new_tokens = max_new_tokens
        self.pad_token_id = pad_token_id
        self.seed = seed
        batches = -(-len(self.prompts) // BATCH)
        rounds = -(-batches // accelerator.num_processes)
        # Wrapped around to full rounds: all processes make as many passes, or sharded models would wait in vain.
        self._mine = [
            round_ * accelerator.num_processes + accelerator.process_index for round_ in range(rounds)
        ]  # numbers of batches; those from `batches` on are repeats
        self._batches = batches

    def batches(self) -> Iterator[tuple[int, list[int], bool]]:
        """This process's batches: number, prompts, and whether it counts (it is no repeat)."""
        for number in self._mine:
            start = (number % self._batches) * BATCH
            yield (
                number % self._batches,
                list(range(start, min(start + BATCH, len(self.prompts)))),
                number < self._batches,
            )

    @property
    def own_prompts(self) -> list[int]:
        """The prompts that this process reads, repeats left out."""
        return [prompt for _, prompts, counts in self.batches() if counts for prompt in prompts]

    @torch.no_grad()
    def sample(self, model: Any, prompts: Sequence[int], number: int) -> list[list[int]]:
        """Two rollouts of each prompt, one behind the other, from the model's full distribution at temperature 1.

        Args:
            model: The policy, unwrapped and whole.
            prompts: Which prompts.
            number: Of the batch; with the seed it decides the draw.
        """
        ids = [self.prompts[prompt] for prompt in prompts]
        length = max(map(len, ids))
        device = self.accelerator.device
        input_ids = torch.tensor([[self.pad_token_id] * (length - len(row)) + row for row in ids], device=device)
        attention_mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in ids], device=device)
        torch.manual_seed(self.seed + number)
        out = model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            num_return_sequences=ROLLOUTS,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=self.max_new_tokens,
            pad_token_id=self.pad_token_id,
            use_cache=True,
        )
        ends = model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        return [_cut(row, ends) for row in out[:, length:].tolist()]

    def run(
        self, model: Any, read: Callable[[list[dict[str, Any]]], tuple[Tensor, Tensor | None]]
    ) -> tuple[Readings, list[list[int]]]:
        """Sample and read.

        Args:
            model: The policy, unwrapped and whole. Its mode is left as it was.
            read: Reads pairs of completions with the reference: from rows with `prompt_ids`, `chosen_ids` and `rejected_ids` to
                standardised scores `(2B, C)` and features `(2B, F)` or `None`.

        Returns:
            The readings, and the first rollout of each prompt of the first batch (on the main process; any others elsewhere).
        """
        devices = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
        scores: list[Tensor] = []
        features: list[Tensor] = []
        first: list[list[int]] = []
        training = model.training
        model.eval()
        try:
            with torch.random.fork_rng(devices=devices):
                rounds = tqdm(
                    list(self.batches()),
                    desc="Probe rollouts",
                    leave=False,
                    disable=not self.accelerator.is_main_process,
                )
                for number, prompts, counts in rounds:
                    texts = self.sample(model, prompts, number)
                    rows = [
                        {
                            "prompt_ids": self.prompts[prompt],
                            "chosen_ids": texts[2 * i],
                            "rejected_ids": texts[2 * i + 1],
                        }
                        for i, prompt in enumerate(prompts)
                    ]
                    score, feature = read(rows)
                    score = torch.stack(score.chunk(2), dim=1)  # (B, 2, C)
                    # All processes gather as many rows, full batches.
                    scores.append(torch.nn.functional.pad(score, (0, 0, 0, 0, 0, BATCH - len(score))))
                    if feature is not None and counts:
                        features.append(torch.stack(feature.chunk(2)).mean(dim=0))
                    first = first or texts[::2]
        finally:
            model.train(training)
        table = torch.stack(scores)  # (rounds, BATCH, 2, C)
        if self.accelerator.num_processes > 1:
            table = self.accelerator.gather(table[None]).transpose(0, 1)  # (rounds, world, ...)
        table = table.reshape(-1, *table.shape[-2:])[: len(self.prompts)]
        return Readings(table, torch.cat(features) if features else None), first

    def changes(self, now: Readings, before: Readings, n_features: int) -> tuple[Estimates, Estimates | None]:
        """Change of the mean score, and its standard error over prompts: of concepts, `(C,)`, and of features, `(F,)`.

        Paired by prompt, so that how prompts differ does not count as noise.
        """
        concepts = paired(now.scores.mean(dim=1) - before.scores.mean(dim=1), lambda sums: sums)
        if not n_features:
            return concepts, None
        # A process may have no prompts of its own.
        difference = torch.zeros(0, n_features, device=self.accelerator.device)
        if now.features is not None and before.features is not None:
            difference = now.features - before.features
        return concepts, paired(difference, self._sum)

    def gather(self, own: Tensor | None, n_features: int) -> Tensor:
        """All prompts' features, `(N, F)`, of each process's `(n, F)`; all must call this together."""
        table = torch.zeros(len(self.prompts), n_features, device=self.accelerator.device)
        if own is not None:
            table[torch.tensor(self.own_prompts, device=table.device)] = own
        return self._sum(table)

    def _sum(self, sums: Tensor) -> Tensor:
        return self.accelerator.reduce(sums, "sum") if self.accelerator.num_processes > 1 else sums


def paired(difference: Tensor, reduce: Callable[[Tensor], Tensor]) -> Estimates:
    """Mean and standard error of `(n, F)` differences over all processes' rows, `(F,)` each."""
    sums = torch.stack([difference.double().sum(dim=0), difference.double().square().sum(dim=0)])
    count = torch.full_like(sums[:1], len(difference))
    total, square, n = reduce(torch.cat([sums, count]))
    mean = total / n
    variance = (square / n - mean.square()).clamp(min=0) / (n - 1).clamp(min=1)
    return Estimates(mean.float(), variance.sqrt().float())


def wilson(shown: int, n: int) -> list[float]:
    """A rate with its 95 % Wilson interval."""
    interval = binomtest(shown, n).proportion_ci(confidence_level=0.95, method="wilson")
    return [shown / n, float(interval.low), float(interval.high)]


def choose_prompts(dataset: Any, n: int, longest: int, seed: int) -> list[list[int]]:
    """Draw prompts from prepared data, each at most once.

    Args:
        dataset: Rows with `prompt_ids`; a stream gives its first ones.
        n: How many.
        longest: Prompts of more tokens are passed over.
        seed: Of the draw.

    Raises:
        ValueError: If there is none that is short enough.
    """
    if hasattr(dataset, "__len__"):
        order = np.random.default_rng(seed).permutation(len(dataset))
        rows = (dataset[int(i)] for i in order)
    else:
        rows = iter(dataset)
    found: dict[tuple[int, ...], None] = {}
    shortest = None
    for seen, row in enumerate(rows):
        ids = row["prompt_ids"]
        shortest = len(ids) if shortest is None else min(shortest, len(ids))
        if 0 < len(ids) <= longest:
            found[tuple(ids)] = None
        if len(found) == n or seen > 50 * n:
            break
    if not found:
        raise ValueError(
            f"No prompt is short enough for probe rollouts: the shortest of those looked at has {shortest} tokens, and {longest} leave "
            "room for `probe_max_new_tokens` within the model's context. Lower `probe_max_new_tokens`."
        )
    return [list(ids) for ids in found]


def _cut(ids: list[int], ends: set[int]) -> list[int]:
    """A rollout up to its first end token, that included."""
    return next((ids[: i + 1] for i, token in enumerate(ids) if token in ends), ids)
