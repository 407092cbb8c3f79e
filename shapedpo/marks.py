"""Which tokens of a text a pattern's matches touch, and which words they make up; found by the collator, off the training step."""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .readouts import Regex


MATCHED = "concept_matched_tokens"
WORDS = "concept_words"


class TokenMarks:
    """Adds to a batch which completion tokens a pattern's matches touch, and which word each belongs to.

    Args:
        tokenizer: Decodes tokens.
        patterns: Whose matches are marked, `(2B, T, n)` uint8 under `MATCHED`.
        words: Whether to number words too, `(2B, T)` int32 under `WORDS`, from 1 in each completion; 0 is no word.
    """

    def __init__(self, tokenizer: Any, patterns: Sequence[Regex], words: bool) -> None:
        self.tokenizer = tokenizer
        self.patterns = list(patterns)
        self.words = words
        self._letters: dict[int, tuple[bool, bool]] = {}
        self._special = set(tokenizer.all_special_ids)

    def __call__(self, examples: Sequence[Any], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        mask, added = batch["completion_mask"].bool(), {}
        rows = [row[keep].tolist() for row, keep in zip(batch["input_ids"], mask, strict=True)]
        if self.patterns:
            marks = torch.zeros(*mask.shape, len(self.patterns), dtype=torch.uint8)
            for row, ids in enumerate(rows):
                marks[row, mask[row]] = torch.stack([self._touched(ids, pattern) for pattern in self.patterns], dim=1)
            added[MATCHED] = marks
        if self.words:
            numbers = torch.zeros(mask.shape, dtype=torch.int32)
            for row, ids in enumerate(rows):
                numbers[row, mask[row]] = torch.tensor(self._numbered(ids), dtype=torch.int32)
            added[WORDS] = numbers
        return added

    def _touched(self, ids: list[int], pattern: Regex) -> Tensor:
        """`(len(ids),)` uint8: 1 for each token that a match touches. Special tokens, which are no text, are not touched."""
        marks = torch.zeros(len(ids), dtype=torch.uint8)

        @functools.cache  # many matches ask for the same
        def length(count: int) -> int:
            """Of the text of the first tokens; a character of several tokens comes with the last."""
            return len(self.tokenizer.decode(ids[:count], skip_special_tokens=True).rstrip("\N{REPLACEMENT CHARACTER}"))

        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        counts = range(len(ids) + 1)
        for match in pattern.compiled().finditer(text):
            if match.start() == match.end():
                continue
            first = bisect_left(counts, match.start(), key=length)
            if first > 0 and length(first) > match.start():
                first -= 1  # it straddles the match's start
            marks[first : bisect_left(counts, match.end(), key=length)] = 1
        special = [position for position, token in enumerate(ids) if token in self._special]
        marks[special] = 0
        return marks

    def _numbered(self, ids: list[int]) -> list[int]:
        """For each token the number of its word: it goes on with the last one's where letters or digits meet."""
        numbers, last, inside = [], 0, False
        for token in ids:
            starts, ends = self._alphanumeric(token)
            if not (inside and starts):
                last += 1
            numbers.append(last)
            inside = ends
        return numbers

    def _alphanumeric(self, token: int) -> tuple[bool, bool]:
        """Whether a token's text, within a text, starts and ends with a letter or digit, or with a part of a character."""
        if token not in self._letters:
            anchor = self.tokenizer("a", add_special_tokens=False)["input_ids"][-1]
            text = self.tokenizer.decode([anchor, token])[len(self.tokenizer.decode([anchor])) :]
            inside = [
                bool(text) and (end.isalnum() or end == "\N{REPLACEMENT CHARACTER}") for end in (text[:1], text[-1:])
            ]
            self._letters[token] = (inside[0], inside[1])
        return self._letters[token]
