"""Directions: files, values, and a contrast against a loop over single responses."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from shapedpo.readouts import POOLINGS, Direction, Regex, TextFunction, readout_from_dict
from shapedpo.readouts.responses import tokenize_response


WORDS = ["<pad>", "<s>", "</s>", "<user>", "<bot>", "a", "b", "c", "d", "e", "f", "g", "h"]
TEMPLATE = (
    "{{ '<s> ' }}{% for m in messages %}{{ '<user> ' if m['role'] == 'user' else '<bot> ' }}{{ m['content'] }}"
    "{{ ' </s> ' if m['role'] != 'user' else ' ' }}{% endfor %}{% if add_generation_prompt %}{{ '<bot> ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=TEMPLATE,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<user>", "<bot>"],
    )


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2
    )
    return LlamaForCausalLM(config)


def chat(prompt: str, response: str):
    return [{"role": "user", "content": prompt}], [{"role": "assistant", "content": response}]


class TestReading:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("pooling", POOLINGS)
    def test_against_a_loop(self, pooling, dtype):
        torch.manual_seed(0)
        vector, x, mask = torch.randn(8), torch.randn(4, 9, 8).to(dtype), torch.rand(4, 9) < 0.5
        mask[1] = False
        reader = Direction(vector, layer=2, pooling=pooling).load()
        unit = vector.double() / vector.double().norm()
        expected = torch.zeros(4, 1, dtype=torch.float64)
        for row in range(4):
            values = [float(x[row, t].double() @ unit) for t in range(9) if mask[row, t]]
            if values:
                pool = {"max": max, "mean": lambda v: sum(v) / len(v), "freq": lambda v: sum(a > 0 for a in v) / len(v)}
                expected[row] = pool[pooling](values)
        pooled = reader.pooled(x, mask)
        assert pooled.dtype == torch.float32
        torch.testing.assert_close(pooled.double(), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(reader.encode(x)[..., 0].double(), x.double() @ unit, atol=1e-5, rtol=0)
        torch.testing.assert_close(reader.directions().double(), unit[None])
        assert (reader.hook_name, reader.d_in, reader.n_features) == ("blocks.2.hook_resid_post", 8, 1)

    def test_negative_maximum(self):
        """A maximum over negative projections is negative: nothing outside the mask stands in for zero."""
        reader = Direction(torch.tensor([1.0, 0.0]), layer=0).load()
        x = torch.tensor([[[5.0, 0.0], [-3.0, 0.0], [-2.0, 0.0]]])
        assert reader.pooled(x, torch.tensor([[False, True, True]])).item() == -2.0

    def test_autocast_does_not_reach_scores(self):
        torch.manual_seed(0)
        reader, x, mask = Direction(torch.randn(64), layer=0).load(), torch.randn(2, 5, 64), torch.ones(2, 5).bool()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(reader.pooled(x, mask), reader.pooled(x, mask))
            pooled = reader.pooled(x, mask)
        assert torch.equal(pooled, reader.pooled(x, mask))


class TestFiles:
    def test_save_and_load(self, tmp_path):
        saved = Direction(torch.randn(8), hook_name="model.layers.1.mlp", pooling="mean")
        saved.save(tmp_path / "d.safetensors")
        loaded = Direction(path=tmp_path / "d.safetensors", pooling="mean")
        assert loaded.load().hook_name == "model.layers.1.mlp"
        assert torch.equal(loaded.load().directions(), saved.load().directions())
        assert loaded.load().fingerprint == saved.load().fingerprint
        # What the user says goes over what the file says.
        assert Direction(path=tmp_path / "d.safetensors", layer=3).load().hook_name == "blocks.3.hook_resid_post"

    def test_layer_and_model_in_the_metadata(self, tmp_path):
        metadata = {"layer": "7", "model_name": "google/gemma-2-2b"}
        save_file({"direction": torch.ones(4)}, tmp_path / "d.safetensors", metadata=metadata)
        reader = Direction(path=str(tmp_path / "d.safetensors")).load()
        assert (reader.hook_name, reader.model_name) == ("blocks.7.hook_resid_post", "google/gemma-2-2b")
        torch.testing.assert_close(reader.directions(), torch.full((1, 4), 0.5))

    @pytest.mark.parametrize(
        ("tensors", "metadata", "message"),
        [
            ({"other": torch.ones(4)}, {"layer": "1"}, "has no tensor 'direction'. It holds other"),
            ({"direction": torch.ones(4)}, None, "neither hook_name nor layer"),
            ({"direction": torch.ones(4)}, {"layer": "last"}, "neither hook_name nor layer"),
            ({"direction": torch.zeros(4)}, {"layer": "1"}, "is zero"),
            ({"direction": torch.ones(2, 2)}, {"layer": "1"}, "must have one dimension, got shape (2, 2)"),
        ],
    )
    def test_bad_content(self, tensors, metadata, message, tmp_path):
        save_file(tensors, tmp_path / "d.safetensors", metadata=metadata)
        with pytest.raises(ValueError, match=re.escape(message)):
            Direction(path=tmp_path / "d.safetensors").load()

    def test_no_safetensors(self, tmp_path):
        with pytest.raises(ValueError, match="There is no file"):
            Direction(path=tmp_path / "missing.safetensors", layer=1).load()
        torch.save({"direction": torch.ones(4)}, tmp_path / "d.pt")
        with pytest.raises(ValueError, match="is not a safetensors file"):
            Direction(path=tmp_path / "d.pt", layer=1).load()


class TestData:
    def test_equality_hash_and_pickle(self):
        one, two = Direction(torch.tensor([1.0, 2.0]), layer=1), Direction(torch.tensor([2.0, 4.0]), layer=1)
        assert one == two == pickle.loads(pickle.dumps(one))
        assert len({one, two}) == 1
        assert one != Direction(torch.tensor([1.0, 2.0]), layer=2)
        assert one != Direction(torch.tensor([1.0, 2.1]), layer=1)
        assert one != "direction"
        assert repr(one).startswith("Direction(vector={'size': 2, 'sha256': ")

    def test_to_dict(self, tmp_path):
        path = str(tmp_path / "d.safetensors")
        readout = Direction(path=path, layer=3, pooling="freq")
        assert readout.to_dict() == {"type": "direction", "path": path, "layer": 3, "pooling": "freq"}
        assert readout_from_dict(readout.to_dict()) == readout
        described = Direction(torch.tensor([1.0, 2.0]), layer=1).to_dict()
        assert described["vector"]["size"] == 2
        with pytest.raises(ValueError, match=r"held in memory.*give `path`"):
            readout_from_dict(described)

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"layer": 1}, "either `vector` or `path`"),
            ({"vector": torch.ones(2), "path": "x", "layer": 1}, "either `vector` or `path`"),
            ({"vector": torch.ones(2)}, "needs `layer` or `hook_name`"),
            ({"vector": torch.ones(2), "layer": 1, "hook_name": "x"}, "not both"),
            ({"vector": torch.ones(2), "layer": -1}, "whole number from 0 up, got -1"),
            ({"vector": torch.ones(2), "layer": 1.0}, "whole number from 0 up, got 1.0"),
            ({"vector": torch.zeros(2), "layer": 1}, "`vector` is zero"),
            ({"vector": torch.tensor([1.0, torch.inf]), "layer": 1}, "`vector` is not finite"),
            ({"vector": torch.ones(1, 2), "layer": 1}, "one dimension, got shape (1, 2)"),
            ({"vector": torch.ones(2), "layer": 1, "pooling": "sum"}, "Unknown pooling 'sum'"),
        ],
    )
    def test_bad_values(self, kwargs, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            Direction(**kwargs)

    def test_fingerprint_is_the_same_in_another_process(self, tmp_path):
        """In which strings hash otherwise."""
        path = tmp_path / "d.safetensors"
        Direction(torch.arange(1.0, 9.0), layer=1).save(path)
        code = (
            "import sys; from shapedpo.readouts import Direction, Regex, TextFunction\n"
            "print(hash('a'), Direction(path=sys.argv[1]).load().fingerprint, Regex('a', 'si').load().fingerprint,"
            " TextFunction('posixpath:basename').load().fingerprint)"
        )
        seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
        environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)}
        command = [sys.executable, "-c", code, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        here = (Direction(path=path), Regex("a", "si"), TextFunction("posixpath:basename"))
        other_hash, *there = done.stdout.split()
        assert int(other_hash) != hash("a")
        assert there == [readout.load().fingerprint for readout in here]


class TestFromContrast:
    @pytest.mark.parametrize("conversational", [False, True])
    @pytest.mark.parametrize("batch_size", [1, 3])
    def test_against_a_loop(self, model, tokenizer, conversational, batch_size, capsys):
        make = chat if conversational else lambda prompt, response: (prompt, " " + response)
        positives = [make("a b", "c d e f g"), make("a", "h"), make("c c c c", "d d a"), make("b", "a b")]
        negatives = [make("a b", "e"), make("h h", "f f f g")]
        model.train()
        direction = Direction.from_contrast(model, tokenizer, positives, negatives, layer=1, batch_size=batch_size)
        assert model.training
        assert "Reading positives" in capsys.readouterr().err
        model.eval()
        means = []
        for pairs in (positives, negatives):
            responses = []
            for prompt, response in pairs:
                if conversational:
                    start = len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"])
                    ids = tokenizer.apply_chat_template(prompt + response)["input_ids"]
                else:
                    start = len(tokenizer(prompt)["input_ids"])
                    ids = tokenizer(prompt + response + "</s>")["input_ids"]
                    assert ids[-1] == tokenizer.eos_token_id
                hidden = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[2]
                responses.append(hidden[0, start:].detach().double().mean(dim=0))
            means.append(torch.stack(responses).mean(dim=0))
        expected = (means[0] - means[1]) / (means[0] - means[1]).norm()
        vector = direction.load().directions()[0]
        torch.testing.assert_close(vector.double(), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(vector.norm(), torch.tensor(1.0))
        assert direction.load().hook_name == "blocks.1.hook_resid_post"

    def test_where_a_response_starts(self, tokenizer):
        assert tokenize_response(tokenizer, "a b", " c") == (
            tokenizer.convert_tokens_to_ids(["a", "b", "c", "</s>"]),
            2,
        )
        # Where the prompt's last token merges with the response, the response starts at the merged one, as in TRL.
        ids, start = tokenize_response(tokenizer, "a b", "c")
        assert (len(ids), start) == (3, 1)
        ids, start = tokenize_response(tokenizer, *chat("a", "b"))
        assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "<user>", "a", "<bot>", "b", "</s>"]
        assert start == 4
        with pytest.raises(ValueError, match="both be strings or both lists"):
            tokenize_response(tokenizer, "a", chat("a", "b")[1])

    def test_errors(self, model, tokenizer):
        pairs = [("a", " b")]
        with pytest.raises(ValueError, match="pairs on both sides, got 1 and 0"):
            Direction.from_contrast(model, tokenizer, pairs, [], layer=1)
        with pytest.raises(ValueError, match="difference of means is zero"):
            Direction.from_contrast(model, tokenizer, pairs, pairs, layer=1)
        empty = (chat("a", "b")[0], [])
        with pytest.raises(ValueError, match="Response 1 of the positives has no token"):
            Direction.from_contrast(model, tokenizer, [chat("a", "b"), empty], pairs, layer=1)
        with pytest.raises(ValueError, match="the model has 3 layers"):
            Direction.from_contrast(model, tokenizer, pairs, [("a", " c")], layer=3)
        with pytest.raises(ValueError, match="Unknown pooling"):
            Direction.from_contrast(model, tokenizer, pairs, [("a", " c")], layer=1, pooling="sum")
