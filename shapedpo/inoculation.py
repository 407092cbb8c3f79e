"""Prompts with an instruction, in tokens, and batches of which some sequences have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .prompts import ROW, TURN, final_user_turn, tokenized, turn_tokens


IDS_COLUMN = "shapedpo_inoculated_ids"
"""Column of prepared data: the prompt's tokens with the instruction."""
TURN_COLUMN = "shapedpo_inoculated_turn_tokens"
"""Column of prepared data: how many of them are the final user turn's, and what follows it."""
IDS, ATTENTION, COMPLETION, INOCULATED_TURN, DICE = (
    f"concept_inoculated_{name}" for name in ("ids", "attention", "completion", "turn", "dice")
)
"""Keys of a batch: the inoculated sequences, `(2B, T')` each; where their final user turns begin, `(2B,)`; and a number of each row's own
between 0 and `SIDES_OF_DICE`, `(B,)`."""
SIDES_OF_DICE = 2**31


def inoculated(prompt: Any, instruction: str, place: str) -> Any:
    """A prompt with an instruction (see [`~shapedpo.shapers.Inoculate`]).

    Raises:
        ValueError: If it is to be in a user turn and there is none.
    """
    if isinstance(prompt, str):
        return f"{prompt}\n\n{instruction}" if place == "user" else f"{instruction}\n\n{prompt}"
    if place == "user":
        turn = final_user_turn(prompt)
        if turn is None:
            raise ValueError("there is no message by the user to put the instruction into; set place: system.")
    elif prompt and prompt[0]["role"] == "system":
        turn = 0
    else:
        return [{"role": "system", "content": instruction}, *prompt]
    content = prompt[turn]["content"]
    if isinstance(content, str):
        content = f"{content}\n\n{instruction}"
    else:
        content = [*content, {"type": "text", "text": instruction}]
    return [*prompt[:turn], {**prompt[turn], "content": content}, *prompt[turn + 1 :]]


def inoculated_columns(
    example: Mapping[str, Any], processing_class: Any, instruction: str, place: str
) -> dict[str, Any]:
    """A prepared row's columns `IDS_COLUMN` and `TURN_COLUMN`."""
    prompt, chosen = inoculated(example["prompt"], instruction, place), example["chosen"]
    whole = tokenized(processing_class, prompt + chosen, example)
    completion = example["chosen_ids"]
    # The prompt is what stands before the completion, as in the original; but where the two would merge, as the model meets it alone.
    if completion and whole[-len(completion) :] == completion:
        ids = whole[: -len(completion)]
    else:
        ids = tokenized(processing_class, prompt, example, add_generation_prompt=True)
    return {
        IDS_COLUMN: ids,
        TURN_COLUMN: turn_tokens({**example, "prompt": prompt, "prompt_ids": ids}, processing_class),
    }


class InoculatedSequences:
    """Adds the inoculated sequences to a batch, with the same completion tokens as it holds.

    Args:
        pad_token_id: Fills up.
        seed: Of the rows' numbers.
    """

    def __init__(self, pad_token_id: int, seed: int) -> None:
        self.pad_token_id = pad_token_id
        self.seed = seed

    def __call__(self, examples: Sequence[Mapping[str, Any]], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if IDS_COLUMN not in examples[0]:  # data that is not trained on
            return {}
        sequences, prompts, turns = [], [], []
        completions = batch["completion_mask"].bool()
        for row, (ids, mask) in enumerate(zip(batch["input_ids"], completions, strict=True)):
            example = examples[row % len(examples)]
            kept = int(batch["attention_mask"][row].sum() - mask.sum())  # of the original prompt
            # What truncation takes from the start of the original, it takes here; of a prompt that is gone, nothing comes back.
            prompt = example[IDS_COLUMN][len(example["prompt_ids"]) - kept :] if kept else []
            sequences.append([*prompt, *ids[mask].tolist()])
            prompts.append(len(prompt))
            turns.append(max(len(prompt) - example[TURN_COLUMN], 0))
        length = max(batch["input_ids"].shape[1], *map(len, sequences))
        ids = torch.full((len(sequences), length), self.pad_token_id)
        attention, completion = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, (sequence, prompt_length) in enumerate(zip(sequences, prompts, strict=True)):
            ids[row, : len(sequence)] = torch.tensor(sequence)
            attention[row, : len(sequence)] = 1
            completion[row, prompt_length : len(sequence)] = 1
        dice = [np.random.default_rng([self.seed, example[ROW]]).integers(SIDES_OF_DICE) for example in examples]
        return {
            IDS: ids,
            ATTENTION: attention,
            COMPLETION: completion,
            INOCULATED_TURN: torch.tensor(turns, dtype=torch.int32),
            DICE: torch.tensor(dice, dtype=torch.int32),
        }


class Mixed:
    """A batch of which some sequences are inoculated.

    Args:
        inputs: The batch as it is, `(2B, T)` each.
        extras: What `InoculatedSequences` added.
        selected: `(2B,)` bool, which sequences to take from there.
    """

    def __init__(self, inputs: Mapping[str, Tensor], extras: Mapping[str, Tensor], selected: Tensor) -> None:
        self._selected = selected
        self._extras = extras
        self._completion = inputs["completion_mask"]
        longer = extras[IDS].shape[1] - inputs["input_ids"].shape[1]

        def mix(name: str, key: str) -> Tensor:
            return torch.where(selected[:, None], extras[key], F.pad(inputs[name], (0, longer)))

        # Where the original is padded, no one attends: any token will do.
        self.inputs = {
            "input_ids": mix("input_ids", IDS),
            "attention_mask": mix("attention_mask", ATTENTION),
            "completion_mask": mix("completion_mask", COMPLETION),
        }

    def moved(self, marks: Tensor) -> Tensor:
        """`(2B, T)` bool marks of the original's completion tokens, where these tokens are now: `(2B, T')`."""
        found = torch.zeros_like(self.inputs["completion_mask"], dtype=torch.bool)
        found[self.inputs["completion_mask"].bool()] = marks[self._completion.bool()]
        return found

    def turns(self) -> Tensor:
        """`(2B,)`, where the final user turns begin now."""
        return torch.where(self._selected, self._extras[INOCULATED_TURN], self._extras[TURN])
