"""Probe rollouts: what the model says now on held-out prompts, read with the frozen reference, beside what it said before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from tqdm.auto import tqdm


ROLLOUTS = 2
"""Rollouts of each prompt at a draw: a pair, which the reading of pairs takes as it is."""
BATCH = 16
"""Prompts sampled at once. Fixed, so that the same rollouts come out on any number of processes."""
DRAWS_BEFORE = 4
"""Draws before training: once, so more are worth having. The first has the random numbers of every later probe."""
FULL_DISTRIBUTION: dict[str, Any] = {
    "do_sample": True,
    "num_beams": 1,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "top_h": None,
    "min_p": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None,
    "sequence_bias": None,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "min_length": 0,
    "min_new_tokens": None,
    "stop_strings": None,
    "guidance_scale": None,
    "watermarking_config": None,
}
"""What samples the model as it is, whatever its own generation config would have instead, such as Qwen's repetition penalty."""


class Readings(NamedTuple):
    """What was read on D draws of N prompts, each sampled twice; float32, the same on all processes.

    Attributes:
        ids: `(D, N, 2, T)` int64, the rollouts' tokens, filled up with -1.
        scores: `(D, N, 2, C)`, the concepts' standardised scores.
        features: `(D, N, 2, F)`, monitored features' standardised scores, on the CPU of the main process; else `None`.
        reference: `(D, N, 2)`, the rollouts' log-probabilities under the reference, nats.
        policy: `(D, N, 2)`, under the model that was sampled.
        gates: `(D, N, 2, C)`, how far each concept's gate lets the prompt in, not a number where nothing says so; `None` where none were read.
    """

    ids: Tensor
    scores: Tensor
    features: Tensor | None
    reference: Tensor
    policy: Tensor
    gates: Tensor | None = None


class Reading(NamedTuple):
    """What was read on B pairs of completions, chosen ones first: `(2B, C)`, `(2B, F)` or `None`, `(2B,)`, `(2B,)`, and `(2B, C)` or `None`."""

    scores: Tensor
    features: Tensor | None
    reference: Tensor
    policy: Tensor
    gates: Tensor | None = None


Rows = list[dict[str, Any]]
"""Pairs of completions of a prompt, as prepared data has them: `prompt_ids`, `chosen_ids`, `rejected_ids`, and what else the prompt's row has."""


class Probe:
    """Samples a fixed set of prompts with fixed seeds, dealt out over processes in fixed batches.

    Args:
        prompts: Token ids of the prompts, the same on all processes.
        accelerator: The run's.
        max_new_tokens: Where a rollout is cut.
        pad_token_id: What fills batches up.
        seed: Of the sampling: the same at every probe, so that the same model says the same.
        batch: Prompts sampled at once.
        columns: What else of each prompt's row is read with its rollouts, such as the columns of gates.
    """

    def __init__(
        self,
        prompts: Sequence[list[int]],
        accelerator: Accelerator,
        max_new_tokens: int,
        pad_token_id: int,
        seed: int,
        batch: int = BATCH,
        columns: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        self.prompts = list(prompts)
        self._columns = [{}] * len(self.prompts) if columns is None else list(columns)
        self.accelerator = accelerator
        self.max_new_tokens = max_new_tokens
        self.pad_token_id = pad_token_id
        self.seed = seed
        self.batch = batch
        self._per_draw = -(-len(self.prompts) // batch)

    def _mine(self, draws: int) -> Iterator[tuple[int, list[int]]]:
        """This process's batches of a number of draws: number and prompts.

        Wrapped around to full rounds: all processes make as many passes, or sharded models would wait in vain.
        """
        world, batches = self.accelerator.num_processes, draws * self._per_draw
        for round_ in range(-(-batches // world)):
            number = (round_ * world + self.accelerator.process_index) % batches
            start = number % self._per_draw * self.batch
            yield number, list(range(start, min(start + self.batch, len(self.prompts))))

    @torch.no_grad()
    def sample(self, model: Any, number: int, prompts: Sequence[int]) -> Rows:
        """Two rollouts of each prompt from the model's full distribution, at temperature 1.

        Args:
            model: The policy, unwrapped and whole.
            number: Of the batch; with the seed it decides the draw.
            prompts: Which prompts.
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
            **FULL_DISTRIBUTION,
            remove_invalid_values=True,  # finite ones are left alone; drawing from others ends a process on a GPU
            max_new_tokens=self.max_new_tokens,
            pad_token_id=self.pad_token_id,
            use_cache=True,
            return_dict_in_generate=False,
            # Each step gathers the shards of all processes: they go on together until the last has ended.
            synced_gpus=isinstance(model, FSDPModule) or None,
        )
        ends = model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        texts = [_cut(row, ends) for row in out[:, length:].tolist()]
        return [
            {**self._columns[prompt], "prompt_ids": self.prompts[prompt], "chosen_ids": one, "rejected_ids": two}
            for prompt, one, two in zip(prompts, texts[::2], texts[1::2], strict=True)
        ]

    def run(self, model: Any, read: Callable[[Any, Rows], Reading], draws: int) -> Readings:
        """Sample and read; all processes together.

        Args:
            model: The policy, unwrapped and whole. Its mode and the random state are left as they were.
            read: Reads pairs of completions, with the reference, and with the model the log-probabilities.
            draws: How often each prompt's pair is drawn. Draw 0 is the same whatever their number.
        """
        found: list[Reading] = []
        ids = []
        with _sampling(model, self.accelerator):
            for number, prompts in tqdm(
                list(self._mine(draws)), "Probe rollouts", leave=False, disable=not self.accelerator.is_main_process
            ):
                rows = self.sample(model, number, prompts)
                found.append(read(model, rows))
                ids.append(self._padded(rows))
        scores, features, reference, policy, gates = zip(*found, strict=True)

        def paired(parts: Sequence[Tensor]) -> Tensor:
            return self._gather([part.unflatten(0, (2, -1)).transpose(0, 1) for part in parts], draws)

        n_features = features[0].shape[1] if features[0] is not None else 0
        table = paired(features) if n_features else None
        return Readings(
            self._gather(ids, draws),
            paired(scores),
            table.cpu() if table is not None and self.accelerator.is_main_process else None,
            paired([logps[:, None] for logps in reference])[..., 0],
            paired([logps[:, None] for logps in policy])[..., 0],
            paired(gates) if gates[0] is not None else None,
        )

    def logps(self, model: Any, readings: Readings, logps: Callable[[Any, Rows], Tensor]) -> Tensor:
        """Log-probabilities under the model of rollouts that were sampled before: `(D, N, 2)`. All processes together."""
        draws = len(readings.ids)
        found = []
        with _sampling(model, self.accelerator):
            for number, prompts in self._mine(draws):
                draw = number // self._per_draw
                rows = [
                    {
                        **self._columns[prompt],
                        "prompt_ids": self.prompts[prompt],
                        "chosen_ids": _unpadded(readings.ids[draw, prompt, 0]),
                        "rejected_ids": _unpadded(readings.ids[draw, prompt, 1]),
                    }
                    for prompt in prompts
                ]
                found.append(logps(model, rows).unflatten(0, (2, -1)).T[..., None])
        return self._gather(found, draws)[..., 0]

    def _padded(self, rows: Rows) -> Tensor:
        """`(B, 2, T)` ids of a batch's rollouts."""
        sides = [[row[side] for side in ("chosen_ids", "rejected_ids")] for row in rows]
        padded = [[ids + [-1] * (self.max_new_tokens - len(ids)) for ids in pair] for pair in sides]
        return torch.tensor(padded, device=self.accelerator.device)

    def _gather(self, batches: Sequence[Tensor], draws: int) -> Tensor:
        """`(D, N, 2, X)` of each process's batches, `(b, 2, X)` each with b up to `batch`."""
        full = [torch.nn.functional.pad(part, (0, 0, 0, 0, 0, self.batch - len(part))) for part in batches]
        table = torch.stack(full)
        if self.accelerator.num_processes > 1:
            table = self.accelerator.gather(table[None]).transpose(0, 1).flatten(0, 1)  # rounds of all processes
        table = table[: draws * self._per_draw].unflatten(0, (draws, self._per_draw)).flatten(1, 2)
        return table[:, : len(self.prompts)]


class _sampling:
    """Evaluation mode and a random state of its own, while inside."""

    def __init__(self, model: Any, accelerator: Accelerator) -> None:
        devices = [accelerator.device] if accelerator.device.type == "cuda" else []
        self.model, self.fork = model, torch.random.fork_rng(devices=devices)

    def __enter__(self) -> None:
        self.training = self.model.training
        self.fork.__enter__()
        self.model.eval()

    def __exit__(self, *error: Any) -> None:
        self.model.train(self.training)
        self.fork.__exit__(*error)


def context_length(model: nn.Module) -> int:
    """Most tokens that a model reads at once, prompt and answer; of a model whose positions have no end, more than any prompt has."""
    config: Any = model.config
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 2**31)


def choose_prompts(dataset: Any, n: int, longest: int, seed: int, option: str) -> list[list[int]]:
    """The prompts of [`choose_rows`]."""
    return [row["prompt_ids"] for row in choose_rows(dataset, n, longest, seed, option)]


def choose_rows(
    dataset: Any, n: int, longest: int, seed: int, option: str, columns: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Draw prompts from prepared data, each at most once.

    Args:
        dataset: Rows with `prompt_ids`; a stream gives its first ones.
        n: How many.
        longest: Prompts of more tokens are passed over.
        seed: Of the draw.
        option: What the caller's user sets the length of an answer with, for the error.
        columns: What else to take of a row, where it is there.

    Returns:
        `prompt_ids` of each, and those columns.

    Raises:
        ValueError: If there is none that is short enough.
    """
    if hasattr(dataset, "__len__"):
        order = np.random.default_rng(seed).permutation(len(dataset))
        rows = (dataset[int(i)] for i in order)
    else:
        rows = iter(dataset)
    found: dict[tuple[int, ...], dict[str, Any]] = {}
    shortest = None
    for seen, row in enumerate(rows):
        ids = row["prompt_ids"]
        shortest = len(ids) if shortest is None else min(shortest, len(ids))
        if 0 < len(ids) <= longest:
            found.setdefault(tuple(ids), {name: row[name] for name in columns if name in row})
        if len(found) == n or seen > 50 * n:
            break
    if not found:
        raise ValueError(
            f"No prompt is short enough to be answered: the shortest of those looked at has {shortest} tokens, and {longest} leave room for "
            f"`{option}` within the model's context. Lower `{option}`."
        )
    return [{"prompt_ids": list(ids), **others} for ids, others in found.items()]


def _cut(ids: list[int], ends: set[int]) -> list[int]:
    """A rollout up to its first end token, that included."""
    return next((ids[: i + 1] for i, token in enumerate(ids) if token in ends), ids)


def _unpadded(ids: Tensor) -> list[int]:
    return ids[ids >= 0].tolist()
