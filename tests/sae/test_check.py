"""Checking an SAE, against sums over single tokens in float64."""

from __future__ import annotations

import pytest
import sae_lens
import torch

from shapedpo import SAEFeatures
from shapedpo.readouts.responses import pair_responses, read_responses, response_text, tokenize_response
from shapedpo.sae.check import check_sae
from tests import helpers


@pytest.fixture(scope="module")
def responses():
    return list(pair_responses(helpers.pairs(12)))


def make_sae(kind: str):
    config = {"architecture": kind, "d_in": helpers.HIDDEN, "d_sae": helpers.FEATURES}
    config |= {"metadata": {"hook_name": helpers.SAE_HOOK}, **({"k": 5} if kind == "topk" else {})}
    sae = sae_lens.SAE.from_dict(config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.15 if name.startswith("W") else 0.4))
        if kind == "jumprelu":
            sae.threshold[:7] = 1e6  # features that are never active
    return sae.requires_grad_(False)


def activations(model, responses, max_length=None) -> torch.Tensor:
    """Of every completion token of every response, one response at a time: `(tokens, d)` float32."""
    found = []
    for prompt, response in responses:
        ids, start = tokenize_response(helpers.tokenizer(), prompt, response)
        ids = ids[:max_length]
        with torch.no_grad():
            hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[2][0]  # after layer 1
        found.append(hidden[start:])
    return torch.cat(found)


@pytest.mark.parametrize("max_length", [None, 9])
@pytest.mark.parametrize("kind", ["standard", "jumprelu", "topk"])
def test_against_single_tokens(kind, max_length, responses):
    model, sae = helpers.load_model(), make_sae(kind)
    x = activations(model, responses, max_length)
    squared = spread = 0.0
    mean = x.double().mean(dim=0)
    active = [0] * helpers.FEATURES
    for token in x:
        features = sae.encode(token[None])
        squared += float(((token - sae.decode(features)[0]).double() ** 2).sum())
        spread += float(((token.double() - mean) ** 2).sum())
        active = [count + bool(value) for count, value in zip(active, features[0], strict=True)]
    quality = check_sae(model, helpers.tokenizer(), sae, responses, batch_size=5, max_length=max_length)
    assert quality.tokens == len(x)
    assert quality.variance_explained == pytest.approx(1 - squared / spread, rel=1e-5)
    assert quality.l0 == pytest.approx(sum(active) / len(x))
    assert (quality.frequency * len(x)).round().int().tolist() == active
    assert quality.dead == active.count(0) / helpers.FEATURES
    assert kind != "jumprelu" or quality.dead >= 7 / helpers.FEATURES


def test_a_transcoder_has_no_reconstruction(responses):
    sae = sae_lens.SAE.from_dict(
        {"architecture": "transcoder", "d_in": 32, "d_out": 32, "d_sae": 8, "apply_b_dec_to_input": False}
    )
    with pytest.raises(ValueError, match="no reconstruction to check"):
        check_sae(helpers.load_model(), helpers.tokenizer(), sae, responses)


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_scores_are_in_the_responses_order(batch_size, responses):
    """Whatever goes together in a batch, each response has its own score."""
    model, reader = helpers.load_model(), SAEFeatures(str(helpers.sae_path()), features=[3, 17, 40]).load()
    scores = read_responses(model, helpers.tokenizer(), responses, reader, batch_size=batch_size)
    for row, response in enumerate(responses):
        tokens = reader.encode(activations(model, [response]))
        torch.testing.assert_close(scores[row], tokens.amax(dim=0), rtol=1e-4, atol=1e-5)


def test_pairs_as_conversations_or_text():
    talk = [{"role": "user", "content": "Hello"}]
    good, bad = [{"role": "assistant", "content": "Hi"}], [{"role": "assistant", "content": "Go"}]
    forms = [
        {"prompt": talk, "chosen": good, "rejected": bad},
        {"chosen": talk + good, "rejected": talk + bad},
        {"prompt": "Hello", "chosen": talk + good, "rejected": talk + bad},  # Tulu 3's mixtures
    ]
    for form in forms:
        assert list(pair_responses([{**form, "source": "x"}])) == [(talk, good), (talk, bad)]
    assert list(pair_responses([{"prompt": "a", "chosen": "b", "rejected": "c"}])) == [("a", "b"), ("a", "c")]
    assert response_text(good) == "Hi"
    assert response_text([*good, {"role": "tool", "content": None}, *bad]) == "Hi\nGo"
