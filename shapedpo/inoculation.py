"""Prompts with an instruction, in tokens, and batches of which some sequences have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .prompts import ROW, TURN, final_user_turn, tokenized, turn_tokens


COLUMNS = "shapedpo_inoculated"
"""What the names of the columns of prepared data begin with: for each concept that has an instruction, by its index, the prompt's tokens
with the instruction (`ids`), and how many of them are the final user turn's, and what follows it (`turn`)."""
KEYS = "concept_inoculated"
"""What the keys of a batch begin with: for each such concept the inoculated sequences, `(2B, T')` each (`ids`, `attention`,
`completion`), and where their final user turns begin, `(2B,)` (`turn`)."""
DICE = f"{KEYS}_dice"
"""Key of a batch: a number of each row's own between 0 and `SIDES_OF_DICE`, `(B,)`."""
SIDES_OF_DICE = 2**31


def column(name: str, concept: int) -> str:
    """The name of a column, `ids` or `turn`."""
    return f"{COLUMNS}_{name}_{concept}"


def key(name: str, concept: int) -> str:
    """The key of a batch for `ids`, `attention`, `completion` or `turn`."""
    return f"{KEYS}_{name}_{concept}"


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
    example: Mapping[str, Any], processing_class: Any, instruction: str, place: str, concept: int
) -> dict[str, Any]:
    """A prepared row's columns for a concept, by its index.

    Raises:
        ValueError: If the instruction cannot be put into the row's prompt, or the chat template does not take it there; the text has the row.
    """
    try:
        prompt = inoculated(example["prompt"], instruction, place)
        whole = tokenized(processing_class, prompt + example["chosen"], example)
    except Exception as error:  # whatever a chat template raises
        raise ValueError(f"the instruction cannot be put into the prompt of row {example.get(ROW)}: {error}") from error
    completion = example["chosen_ids"]
    # The prompt is what stands before the completion, as in the original; but where the two would merge, as the model meets it alone.
    if completion and whole[-len(completion) :] == completion:
        ids = whole[: -len(completion)]
    else:
        ids = tokenized(processing_class, prompt, example, add_generation_prompt=True)
    return {
        column("ids", concept): ids,
        column("turn", concept): turn_tokens({**example, "prompt": prompt, "prompt_ids": ids}, processing_class),
    }


class InoculatedSequences:
    """Adds the inoculated sequences to a batch, with the same completion tokens as it holds.

    Args:
        concept: Whose instruction it is, by its index.
        pad_token_id: Fills up.
        seed: Of the rows' numbers.
    """

    def __init__(self, concept: int, pad_token_id: int, seed: int) -> None:
        self.concept = concept
        self.pad_token_id = pad_token_id
        self.seed = seed

    def __call__(self, examples: Sequence[Mapping[str, Any]], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        ids_column, turn_column = column("ids", self.concept), column("turn", self.concept)
        if ids_column not in examples[0]:  # data that is not trained on
            return {}
        sequences, prompts, turns = [], [], []
        completions = batch["completion_mask"].bool()
        for row, (ids, mask) in enumerate(zip(batch["input_ids"], completions, strict=True)):
            example = examples[row % len(examples)]
            kept = int(batch["attention_mask"][row].sum() - mask.sum())  # of the original prompt
            # What truncation takes from the start of the original, it takes here; of a prompt that is gone, nothing comes back.
            prompt = example[ids_column][len(example["prompt_ids"]) - kept :] if kept else []
            sequences.append([*prompt, *ids[mask].tolist()])
            prompts.append(len(prompt))
            turns.append(max(len(prompt) - example[turn_column], 0))
        length = max(batch["input_ids"].shape[1], *map(len, sequences))
        ids = torch.full((len(sequences), length), self.pad_token_id)
        attention, completion = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, (sequence, prompt_length) in enumerate(zip(sequences, prompts, strict=True)):
            ids[row, : len(sequence)] = torch.tensor(sequence)
            attention[row, : len(sequence)] = 1
            completion[row, prompt_length : len(sequence)] = 1
        dice = [np.random.default_rng([self.seed, example[ROW]]).integers(SIDES_OF_DICE) for example in examples]
        return {
            key("ids", self.concept): ids,
            key("attention", self.concept): attention,
            key("completion", self.concept): completion,
            key("turn", self.concept): torch.tensor(turns, dtype=torch.int32),
            DICE: torch.tensor(dice, dtype=torch.int32),
        }


class Mixed:
    """A batch of which some sequences are inoculated.

    Args:
        inputs: The batch as it is, `(2B, T)` each.
        extras: What `InoculatedSequences` added.
        concept: Whose instruction it is, by its index.
        selected: `(2B,)` bool, which sequences to take from there.
    """

    def __init__(
        self, inputs: Mapping[str, Tensor], extras: Mapping[str, Tensor], concept: int, selected: Tensor
    ) -> None:
        self._selected = selected
        self._turns = extras[key("turn", concept)], extras[TURN]
        self._completion = inputs["completion_mask"]
        instructed = sequences(extras, concept)
        # Where a sequence is padded, no one attends: any token will do.
        longer = instructed["input_ids"].shape[1] - inputs["input_ids"].shape[1]
        self.inputs = {
            name: torch.where(selected[:, None], instructed[name], F.pad(inputs[name], (0, longer)))
            for name in instructed
        }

    def moved(self, marks: Tensor) -> Tensor:
        """`(2B, T)` bool marks of the original's completion tokens, where these tokens are now: `(2B, T')`."""
        found = torch.zeros_like(self.inputs["completion_mask"], dtype=torch.bool)
        found[self.inputs["completion_mask"].bool()] = marks[self._completion.bool()]
        return found

    def turns(self) -> Tensor:
        """`(2B,)`, where the final user turns begin now."""
        return torch.where(self._selected, *self._turns)


def sequences(extras: Mapping[str, Tensor], concept: int) -> dict[str, Tensor]:
    """A concept's inoculated sequences as a batch that a model takes."""
    names = {"input_ids": "ids", "attention_mask": "attention", "completion_mask": "completion"}
    return {name: extras[key(ours, concept)] for name, ours in names.items()}
