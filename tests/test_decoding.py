"""The texts of single tokens, against decoding ever longer beginnings."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from benchmarks.stories import MODEL
from shapedpo.decoding import TokenTexts
from shapedpo.sources import model_source


TEXTS = [
    "Once upon a time, a goblin \U0001f47a\U0001f9cc lived — “there”. It's  so\n\n\tgood…",
    "\u05d0\u05d1\u05d2 \u4f60\u597d\u4e16\u754c e\u0301 \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "",
    " ",
]


@pytest.mark.parametrize(
    "name", ["lab", pytest.param(str(MODEL), marks=pytest.mark.skipif(not MODEL.is_dir(), reason="no model"))]
)
@pytest.mark.parametrize("text", TEXTS)
def test_tokens_together_are_the_text(name: str, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_source(name))
    ids = tokenizer(text).input_ids
    split = TokenTexts(tokenizer)
    found = split(ids)
    assert len(found) == len(ids)
    assert "".join(found) == tokenizer.decode(ids, skip_special_tokens=True)
    assert found == split._ever_longer(ids)


def test_tokens_that_make_no_text_are_counted_too() -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_source("lab"))
    ids = tokenizer("\U0001f47a").input_ids
    found = TokenTexts(tokenizer)([*ids[:-1], *ids])  # a character that is cut off
    assert len(found) == 2 * len(ids) - 1
