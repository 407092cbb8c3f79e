"""Probes, against the formulas written out for one completion at a time, in float64; and in a run."""

from __future__ import annotations

import pickle
import re

import pytest
import torch
from safetensors.torch import save_file

from shapedpo import Ablate, AttentionProbe, Concept, LinearProbe, Tokens
from shapedpo.capture import CapturePass
from shapedpo.readouts import readout_from_dict
from shapedpo.readouts.probe import save_probe
from tests.helpers import HIDDEN, load_model, pairs, shaped, train
from tests.slow import BETA, Slow, standardise, trainer_of


LAYER = 1
HOOK = f"blocks.{LAYER}.hook_resid_post"
DICE = torch.Generator().manual_seed(5)
WEIGHT, BIAS = torch.randn(HIDDEN, generator=DICE), torch.tensor(0.7)
QUERY, VALUE = (torch.randn(2, HIDDEN, generator=DICE) for _ in range(2))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probes")
    about = {"hook_name": HOOK, "pooling": "mean", "model_name": "llama-tiny", "auroc": 0.9}
    save_probe(folder / "linear.safetensors", {"weight": WEIGHT, "bias": BIAS}, about)
    save_probe(folder / "attention.safetensors", {"query": QUERY, "value": VALUE, "bias": BIAS}, about)
    return {
        "linear": LinearProbe(folder / "linear.safetensors"),
        "attention": AttentionProbe(folder / "attention.safetensors"),
    }


def attended(states, query=QUERY, value=VALUE, bias=BIAS):
    """The attention probe's score at each of a completion's tokens: `(T, d)` to `(T,)`, position by position."""
    found = []
    for end in range(1, len(states) + 1):
        seen, score = states[:end].double(), bias.double()
        for q, v in zip(query.double(), value.double(), strict=True):
            weights = torch.softmax(seen @ q, dim=0)
            score = score + weights @ (seen @ v)
        found.append(score)
    return torch.stack(found)


def linear(states):
    return states.double() @ WEIGHT.double() + BIAS.double()


SCORES = {"linear": lambda states: linear(states).mean(), "attention": lambda states: attended(states)[-1]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", SCORES)
def test_against_the_formula(files, kind, dtype):
    """Whatever lies outside the mask, be it infinite; a row without tokens scores 0."""
    x, mask = torch.randn(4, 9, HIDDEN, generator=DICE).to(dtype), torch.rand(4, 9, generator=DICE) < 0.5
    mask[1] = False
    mask[0, 0] = mask[0, 1] = False  # a prompt
    x[0, 0], x[0, 1] = torch.inf, torch.nan
    reader = files[kind].load()
    pooled, tokens = reader.pooled(x, mask), reader.tokens(x, mask) if kind == "attention" else None
    assert pooled.dtype == torch.float32
    for row in range(4):
        expected = SCORES[kind](x[row, mask[row]]) if mask[row].any() else torch.tensor(0.0)
        assert float(pooled[row]) == pytest.approx(float(expected), abs=2e-5)
        if tokens is not None and mask[row].any():
            torch.testing.assert_close(
                tokens[row, mask[row], 0].double(), attended(x[row, mask[row]]), atol=2e-5, rtol=1e-5
            )
            assert not tokens[row, ~mask[row]].any()


def test_probability_is_the_sigmoid(files):
    path = files["attention"].path
    probe, x, mask = (
        AttentionProbe(path, output="probability"),
        torch.randn(3, 7, HIDDEN, generator=DICE),
        torch.ones(3, 7).bool(),
    )
    mask[1, 4:], mask[2] = False, False
    reader, logits = probe.load(), files["attention"].load()
    pooled = reader.pooled(x, mask)[:, 0].double()
    expected = torch.stack([attended(x[row, mask[row]])[-1].sigmoid() for row in range(2)])
    torch.testing.assert_close(pooled[:2], expected, atol=1e-5, rtol=0)
    assert pooled[2] == 0
    torch.testing.assert_close(reader.tokens(x, mask)[0], logits.tokens(x, mask)[0].sigmoid(), atol=1e-6, rtol=0)
    assert not reader.tokens(x, mask)[2].any()
    assert reader.fingerprint != logits.fingerprint
    assert probe.to_dict() == {"type": "attention_probe", "path": path, "output": "probability"}
    assert readout_from_dict(probe.to_dict()) == probe
    with pytest.raises(ValueError, match="Choose one of logit, probability"):
        AttentionProbe(path, output="odds")


def test_attention_is_causal_and_stable():
    """Later tokens change nothing, and keys may lie hundreds of nats apart."""
    from shapedpo.readouts.probe import AttentionProbeReader

    reader = AttentionProbeReader(100 * QUERY, VALUE, BIAS, HOOK)
    x = torch.randn(2, 12, HIDDEN, generator=DICE)
    keys = x @ (100 * QUERY).T
    assert (keys.amax() - keys.amin()) > 1000
    scores = reader.encode(x)
    other = x.clone()
    other[:, 7:] = torch.randn(2, 5, HIDDEN, generator=DICE)
    torch.testing.assert_close(reader.encode(other)[:, :7], scores[:, :7], atol=1e-5, rtol=1e-5)
    x = x * 0.3  # some 600 nats: exact still
    torch.testing.assert_close(reader.encode(x)[0, :, 0].double(), attended(x[0], 100 * QUERY), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("kind", SCORES)
def test_in_a_step(files, kind, mode):
    """Padding and truncation on either side: the trainer's step is the objective's, read one completion at a time."""
    slow = Slow(trainer_of(Concept("p", files[kind], "suppress", strength=1.5), max_length=14, truncation_mode=mode))
    cut = [prompt + completion for prompt, completion in zip(slow.prompts, slow.completions, strict=True)]
    assert max(map(len, cut)) > 14 > min(map(len, cut))
    for index, (prompt, completion) in enumerate(zip(slow.prompts, slow.completions, strict=True)):
        ids = (prompt + completion)[:14] if mode == "keep_start" else (prompt + completion)[-14:]
        left = len(prompt) if mode == "keep_start" else max(len(ids) - len(completion), 0)
        slow.prompts[index], slow.completions[index] = ids[:left], ids[left:]
    states = [
        slow.reference(p + c).hidden_states[LAYER + 1][0, max(len(p), 1) :]
        for p, c in zip(slow.prompts, slow.completions, strict=True)
    ]
    tilt = 1.5 / BETA * standardise([SCORES[kind](s) for s in states])
    slow.assert_step(slow.loss(slow.logps(slow.policy), slow.logps(slow.reference) - tilt))


def test_tokens_leave(files):
    """Each token by the score that the probe has there."""
    slow = Slow(trainer_of(Concept("p", files["attention"], "suppress", Tokens("both", threshold=0.3))))
    raw = [
        attended(slow.reference(p + c).hidden_states[LAYER + 1][0, len(p) :])
        for p, c in zip(slow.prompts, slow.completions, strict=True)
    ]
    last = torch.stack([scores[-1] for scores in raw])
    left = [(scores - last.mean()) / last.std() > 0.3 for scores in raw]
    assert 0 < sum(int(part.sum()) for part in left) < sum(map(len, left))
    kept = [
        torch.stack([t[~out].sum() for t, out in zip(slow.token_logps(run), left, strict=True)])
        for run in (slow.policy, slow.reference)
    ]
    slow.assert_step(slow.loss(*kept))


def test_every_action(files):
    """Watched, held and monitored by rollouts, from YAML; and nothing is back-propagated through a probe."""
    data = [
        {"name": kind, "readout": readout.to_dict(), "action": action}
        for (kind, readout), action in zip(files.items(), ("hold", "watch"), strict=True)
    ]
    concepts = [Concept.from_dict(pickle.loads(pickle.dumps(entry))) for entry in data]
    assert [concept.readout for concept in concepts] == list(files.values())
    run = train(
        shaped(*concepts, probe_steps=2, probe_prompts=4, probe_max_new_tokens=4, trainer={"eval_dataset": pairs(4, 1)})
    )
    assert run.metric("concepts/linear/strength")[0] != 0
    assert all(abs(value) < 100 for value in run.metric("concepts/attention/amplification"))
    model, x = load_model(), torch.tensor([[1, 5, 6, 7]])
    with CapturePass(model, [readout.load() for readout in files.values()], [x > 1] * 2) as capture:
        model(x)
    assert not any(scores.requires_grad for scores in capture.scores)


def test_a_linear_probe_has_a_direction(files):
    trainer = trainer_of(Concept("p", files["linear"], "suppress", Ablate()))
    basis = trainer._steering._edits[0].basis[:, 0]
    unit = WEIGHT / WEIGHT.norm()
    torch.testing.assert_close(basis * (basis @ unit).sign(), unit, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"Concept 'p': method 'ablate': an attention probe has no direction"):
        trainer_of(Concept("p", files["attention"], "suppress", Ablate()))


@pytest.mark.parametrize(
    ("readout", "tensors", "message"),
    [
        (LinearProbe, {"direction": WEIGHT}, "has no tensor 'weight'. It holds direction"),
        (LinearProbe, {"weight": QUERY, "bias": BIAS}, "have the shapes (2, 32), (). Expected"),
        (LinearProbe, {"weight": WEIGHT * torch.nan, "bias": BIAS}, "is not finite"),
        (AttentionProbe, {"query": QUERY, "value": VALUE[:1].contiguous(), "bias": BIAS}, "Expected (d,) and ()"),
    ],
)
def test_bad_files(readout, tensors, message, tmp_path):
    save_file(tensors, tmp_path / "p.safetensors", metadata={"hook_name": HOOK})
    with pytest.raises(ValueError, match=re.escape(message)):
        readout(tmp_path / "p.safetensors").load()
    save_probe(tmp_path / "q.safetensors", {"weight": WEIGHT, "bias": BIAS}, {})
    with pytest.raises(ValueError, match="neither hook_name nor layer"):
        LinearProbe(tmp_path / "q.safetensors").load()


def test_plain_data(files):
    for readout in files.values():
        assert readout_from_dict(readout.to_dict()) == readout
    assert LinearProbe("p", pooling="max").to_dict() == {"type": "linear_probe", "path": "p", "pooling": "max"}
    with pytest.raises(ValueError, match="Unknown pooling 'sum'"):
        LinearProbe("p", pooling="sum")
