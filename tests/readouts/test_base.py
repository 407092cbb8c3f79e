"""The registry, pooling, and the guess at model families."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

from shapedpo.readouts import Readout, Regex, SAEFeatures, family_mismatch, readout_from_dict
from shapedpo.readouts.base import fingerprint, gather_tokens


class TestRegistry:
    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (
                {"type": "probe"},
                "Unknown readout type 'probe'. Known types are attention_probe, direction, function, lab, linear_probe, regex, sae_features",
            ),
            ({"pattern": "a"}, "Unknown readout type None"),
            ("regex", "must be a mapping with a `type`, got 'regex'"),
            (
                {"type": "regex", "pattrn": "a"},
                "Readout 'regex' has no field 'pattrn'. Did you mean 'pattern'? Its fields are pattern, flags",
            ),
            ({"type": "regex"}, "Readout 'regex' needs the field 'pattern'"),
            ({"type": "sae_features", "sae": "x"}, "Readout 'sae_features' needs the field 'features'"),
        ],
    )
    def test_bad_data(self, data, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            readout_from_dict(data)

    def test_from_dict(self):
        data = {"type": "regex", "pattern": "a"}
        assert Readout.from_dict(data) == Regex.from_dict(data) == Regex("a")
        assert data == {"type": "regex", "pattern": "a"}
        with pytest.raises(ValueError, match="Expected a readout of type 'sae_features', got 'regex'"):
            SAEFeatures.from_dict(data)


class TestGatherTokens:
    def test_tokens_come_first_and_the_rest_repeats(self):
        x = torch.arange(12.0).view(3, 4, 1)
        mask = torch.tensor([[0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]]).bool()
        tokens, inside = gather_tokens(x, mask)
        assert tokens[..., 0].tolist() == [[1.0, 3.0], [6.0, 6.0], [8.0, 8.0]]
        assert inside.tolist() == [[True, True], [True, False], [False, False]]


class TestFingerprint:
    def test_tells_apart(self):
        x = torch.arange(4.0)
        parts = [
            (x,),
            (x.view(2, 2),),
            (x.double(),),
            (x.bfloat16(),),
            (x, x),
            ("a",),
            ("a", "b"),
            ("ab",),
            (None,),
            (),
        ]
        assert len({fingerprint(*p) for p in parts}) == len(parts)
        assert fingerprint(x.view(2, 2).t()) == fingerprint(x.view(2, 2).t().contiguous())


class TestFamily:
    @pytest.mark.parametrize(
        ("name", "model_type"),
        [
            ("gpt2-small", "gpt2"),
            ("pythia-70m-deduped", "gpt_neox"),
            ("EleutherAI/pythia-70m", "gpt_neox"),
            ("meta-llama/Llama-3.1-8B-Instruct", "llama"),
            ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "llama"),
            ("allenai/Llama-3.1-Tulu-3-8B-SFT", "llama"),
            ("gemma-2b", "gemma"),
            ("gemma-2b-it", "gemma"),
            ("gemma-2-2b", "gemma2"),
            ("google/gemma-2-9b-it", "gemma2"),
            ("google/gemma-3-1b-pt", "gemma3_text"),
            ("google/gemma-3-4b-it", "gemma3"),
            ("Qwen/Qwen2.5-7B-Instruct", "qwen2"),
            ("Qwen/Qwen3-1.7B-Base", "qwen3"),
            ("allenai/OLMo-2-0425-1B", "olmo2"),
            ("allenai/Olmo-3-1025-7B", "olmo3"),
            ("allenai/Olmo-3.1-32B-Think", "olmo3"),
            ("mistral-7b", "mistral"),
        ],
    )
    def test_same_family_and_no_other(self, name, model_type):
        types = [
            "gpt2",
            "gpt_neox",
            "llama",
            "gemma",
            "gemma2",
            "gemma3",
            "qwen2",
            "qwen3",
            "olmo2",
            "olmo3",
            "mistral",
        ]
        assert family_mismatch(name, SimpleNamespace(model_type=model_type)) is None
        for other in types:
            if other != model_type.removesuffix("_text"):
                assert repr(name) in family_mismatch(name, SimpleNamespace(model_type=other))

    @pytest.mark.parametrize(
        "name", [None, "", "my-model", "stories260k", "out/llama-or-qwen2", "/data/gemma-2-2b/run/step-5"]
    )
    def test_unsure(self, name):
        assert family_mismatch(name, SimpleNamespace(model_type="mistral")) is None

    def test_unknown_architecture(self):
        assert family_mismatch("gpt2", SimpleNamespace(model_type="falcon")) is None
        assert family_mismatch("gpt2", SimpleNamespace()) is None
