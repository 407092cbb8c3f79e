"""The texts of single tokens, which together are the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


_BROKEN = "\N{REPLACEMENT CHARACTER}"
_LONGEST = 8  # tokens of one character


class TokenTexts:
    """Splits texts into those of their tokens.

    Args:
        tokenizer: The tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._alone: dict[int, str] = {}

    def __call__(self, ids: Sequence[int]) -> list[str]:
        """What each token adds to the text; together they are the text. A character of several tokens is the last one's.

        Args:
            ids: The tokens of one text. Special tokens have an empty text.
        """
        texts = self._one_after_the_other(ids)
        # Not where a token's text depends on more than whether it is the first.
        return texts if "".join(texts) == self._decode(ids) else self._ever_longer(ids)

    def _one_after_the_other(self, ids: Sequence[int]) -> list[str]:
        texts: list[str] = []
        while (at := len(texts)) < len(ids):
            text, end = self._inside(ids[at]) if at else self._decode(ids[:1]), at + 1
            while _BROKEN in text and end < min(len(ids), at + _LONGEST):
                end += 1
                text = self._decode(ids[at:end])
            texts += [""] * (end - at - 1) + [text]
        return texts

    def _inside(self, token: int) -> str:
        """A token's text behind another one: some tokenizers drop the space before a text's first word."""
        if token not in self._alone:
            once = self._decode([token])
            twice = self._decode([token, token])
            self._alone[token] = twice[len(once) :] if twice.startswith(once) else once
        return self._alone[token]

    def _ever_longer(self, ids: Sequence[int]) -> list[str]:
        """The slow way that is always right: its time goes with the square of the length."""
        tokens, before = [], ""
        for end in range(1, len(ids) + 1):
            text = self._decode(ids[:end])
            whole = text.startswith(before) and not text.endswith(_BROKEN)
            tokens.append(text[len(before) :] if whole else "")
            before = text if whole else before
        return tokens

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))
