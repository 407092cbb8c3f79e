"""Readouts of text."""

from __future__ import annotations

import pickle
import re

import numpy as np
import pytest
import torch

from shapedpo.readouts import Regex, TextFunction, readout_from_dict


def length(text: str) -> float:
    return len(text)


class TestRegex:
    def test_scores(self):
        reader = Regex(r"https?://").load()
        scores = reader.score(["see http://a.b", "no link", "HTTP://X", ""])
        assert scores.dtype == torch.float32
        assert scores.tolist() == [1.0, 0.0, 0.0, 0.0]
        assert Regex(r"https?://", flags="i").load().score(["HTTP://X"]).item() == 1.0
        assert Regex("^b", flags="ms").load().score(["a\nb", "ab"]).tolist() == [1.0, 0.0]
        assert reader.score([]).shape == (0,)

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (("a(b",), "regular expression 'a(b' is not valid: missing ), unterminated subpattern at position 1"),
            (("a", "iq"), "Unknown flag 'q'"),
            ((3,), "must be a string, got 3"),
        ],
    )
    def test_bad_values(self, args, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            Regex(*args)

    def test_data(self):
        readout = Regex(r"\bgoblins?\b", flags="i")
        assert readout.to_dict() == {"type": "regex", "pattern": r"\bgoblins?\b", "flags": "i"}
        assert readout_from_dict(readout.to_dict()) == readout == pickle.loads(pickle.dumps(readout))
        prints = {Regex(*args).load().fingerprint for args in [("a",), ("b",), ("a", "i"), ("a", "is"), ("a", "si")]}
        assert len(prints) == 4


class TestTextFunction:
    def test_callable(self):
        assert TextFunction(length).load().score(["abc", ""]).tolist() == [3.0, 0.0]
        assert TextFunction(lambda text: "a" in text).load().score(["abc", ""]).tolist() == [1.0, 0.0]

    @pytest.mark.parametrize("value", [2, 2.0, True, np.float32(2), np.int64(2), torch.tensor(2.0)])
    def test_numbers(self, value):
        assert TextFunction(lambda text: value).load().score([""]).item() == float(value)

    @pytest.mark.parametrize("value", [None, "0.5", [1.0, 2.0], torch.ones(2), {}])
    def test_what_is_no_number(self, value):
        with pytest.raises(ValueError, match=r"function mine must return a number, got .* for 'some text'"):
            TextFunction(lambda text: value, name="mine").load().score(["some text"])
        with pytest.raises(ValueError, match=r"function .*test_text:.*<lambda>"):
            TextFunction(lambda text: value).load().score(["some text"])

    def test_from_a_place(self):
        readout = readout_from_dict({"type": "function", "function": "posixpath:basename"})
        assert readout == TextFunction("posixpath:basename")
        with pytest.raises(ValueError, match="must return a number, got 'c' for 'b/c'"):
            readout.load().score(["b/c"])
        assert TextFunction("operator:length_hint").load().score(["abc"]).item() == 3.0
        assert TextFunction("builtins:str.isupper").load().score(["A", "a"]).tolist() == [1.0, 0.0]

    def test_imported_only_when_loaded(self):
        readout = TextFunction("no_such_package.module:name")
        with pytest.raises(ValueError, match="Cannot import the text function 'no_such_package"):
            readout.load()
        with pytest.raises(ValueError, match="Cannot import the text function 'math:no_such_name'"):
            TextFunction("math:no_such_name").load()
        with pytest.raises(ValueError, match="'math:pi' is not callable"):
            TextFunction("math:pi").load()

    @pytest.mark.parametrize("value", ["module.name", "module:", 3, None])
    def test_bad_values(self, value):
        with pytest.raises(ValueError, match="must be callable, or a string such as"):
            TextFunction(value)

    def test_data(self):
        readout = TextFunction(length, name="length")
        assert readout.to_dict() == {"type": "function", "function": f"{__name__}:length", "name": "length"}
        assert pickle.loads(pickle.dumps(readout)) == readout
        one, two = TextFunction(lambda text: 1.0), TextFunction(lambda text: 2.0)
        assert one.load().fingerprint != readout.load().fingerprint
        assert TextFunction(length).load().fingerprint == readout.load().fingerprint
        assert two.to_dict()["function"].endswith("<lambda>")
        with pytest.raises(ValueError, match="must be callable"):
            readout_from_dict(two.to_dict())
