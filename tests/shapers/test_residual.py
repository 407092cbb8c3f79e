"""EA-DPO, against its loss written out in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from shapedpo import Concept, Direction, Gate, Inoculate, Regex, Residual, Steer
from tests.helpers import Forwards, pairs, shaped, tokenizer, train, vector
from tests.slow import BETA, CHECKPOINTING, Slow, trainer_of


LAYER, ALPHA, STRENGTH = 1, 2.0, 0.8
UNIT = F.normalize(vector().double(), dim=0)
ASK = "likes goblin"


def steered(action="suppress", gate=None, **options):
    method = Residual(steer=ALPHA, **options)
    return Concept("way", Direction(vector(), layer=LAYER), action, method, STRENGTH, gate=gate)


def instructed(**options):
    return Concept("goblin", Regex("goblin"), "suppress", Residual(instruction=ASK, **options), STRENGTH)


def steered_logps(slow, run, layers, amounts):
    """`(2B,)`, with each sequence's hidden states changed after these layers, but for its first token's (BOS)."""
    found = []
    for index, amount in enumerate(amounts):

        def hook(module, args, output, amount=float(amount)):
            return torch.cat([output[:, :1], output[:, 1:] + amount * UNIT], dim=1)

        handles = [layer.register_forward_hook(hook) for layer in layers]
        try:
            prompt, completion = slow.prompts[index], slow.completions[index]
            log_p = torch.log_softmax(run(prompt + completion).logits[0], dim=-1)
        finally:
            for handle in handles:
                handle.remove()
        found.append(sum(log_p[len(prompt) + k - 1, token] for k, token in enumerate(completion)))
    return torch.stack(found)


def residual(slow, layers=(LAYER,)):
    """`A(y)` of the steered reference."""
    amounts = [ALPHA] * 2 * len(slow.rows)
    changed = steered_logps(slow, slow.reference, [slow.ref_layers[layer] for layer in layers], amounts)
    return changed - slow.logps(slow.reference)


def test_several_instructions_of_a_stream():
    """A stream's rows are made when they are asked for, each concept's with its own instruction."""
    other = Concept("dog", Regex("dog"), "suppress", Residual(instruction="sees red dog"), STRENGTH)
    rows = [
        next(iter(shaped(instructed(), other, data=data).train_dataset))
        for data in (pairs(4), pairs(4).to_iterable_dataset())
    ]
    ids = [name for name in rows[0] if name.startswith("shapedpo_")]
    assert len(ids) == 2 + 2 * 2
    assert len({str(rows[0][name]) for name in ids}) == 6
    assert rows[0] == rows[1]


def objective(slow, offset, policy=None):
    """The paper's: an offset of the margin."""
    policy = slow.logps(slow.policy) if policy is None else policy
    chosen, rejected = (BETA * (policy - slow.logps(slow.reference)) + offset).chunk(2)
    return -F.logsigmoid(chosen - rejected).mean()


@pytest.mark.parametrize(("peft", "checkpointing"), [(False, "plain"), (True, "checkpointing"), (False, "reentrant")])
def test_a_steered_reference(peft, checkpointing):
    slow = Slow(trainer_of(steered(), peft=peft, **CHECKPOINTING[checkpointing]))
    found = residual(slow)
    assert found.std() > 0.1
    slow.assert_step(objective(slow, STRENGTH * found))
    chosen, rejected = found.chunk(2)
    logged = slow.trainer._metrics["train"]
    assert logged["concepts/way/residual"] == [pytest.approx(float((chosen - rejected).mean()), rel=1e-4)]
    rewards = BETA * (slow.logps(slow.policy) - slow.logps(slow.reference)).detach()
    assert logged["rewards/chosen"] == [pytest.approx(float(rewards.chunk(2)[0].mean()), rel=1e-4)]  # not shifted


def test_amplified_at_other_layers_within_a_gate():
    data = pairs(8, fruity=[index % 2 == 0 for index in range(8)])
    slow = Slow(trainer_of(steered("amplify", Gate(column="fruity"), layers=[0, 2]), data=data))
    gate = torch.tensor([float(index % 2 == 0) for index in range(8)] * 2)
    slow.assert_step(objective(slow, -STRENGTH * gate * residual(slow, layers=(0, 2))))


@pytest.mark.parametrize("place", ["user", "system"])
def test_an_inoculated_reference(place):
    slow = Slow(trainer_of(instructed(place=place)))
    ask = tokenizer()(ASK)["input_ids"]
    prompts = [[*prompt, *ask] if place == "user" else [*ask, *prompt] for prompt in slow.prompts]
    found = slow.logps(slow.reference, prompts) - slow.logps(slow.reference)
    slow.assert_step(objective(slow, STRENGTH * found))


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_with_a_steered_policy_and_another_instruction(peft):
    """The policy's own steering does not reach the reference, also where they are one module."""
    ask = Concept("other", Regex("fox"), "suppress", Inoculate("sees fox"))
    steer = Concept("steer", Direction(vector(), layer=LAYER), "suppress", Steer("chosen"), ALPHA)
    slow = Slow(trainer_of(steered(), instructed(), ask, steer, peft=peft))
    shown = [tokenizer()("fox")["input_ids"][0] in completion for completion in slow.completions]
    plain = slow.prompts
    goblin = [[*prompt, *tokenizer()(ASK)["input_ids"]] for prompt in plain]
    offset = residual(slow) + slow.logps(slow.reference, goblin) - slow.logps(slow.reference)
    slow.prompts = [
        [*prompt, *tokenizer()("sees fox")["input_ids"]] if on else prompt
        for prompt, on in zip(plain, shown, strict=True)
    ]
    amounts = torch.tensor([ALPHA, 0.0]).repeat_interleave(len(slow.rows))
    policy = steered_logps(slow, slow.policy, [slow.layers[LAYER]], amounts)
    slow.prompts = plain
    slow.assert_step(objective(slow, STRENGTH * offset, policy))


@pytest.mark.parametrize("concept", [steered(), instructed()], ids=["steered", "instructed"])
def test_precomputed(concept):
    """The further pass is made once, with the other one, and none in a step; evaluation has none."""
    runs, passes = [], []
    for precompute in (False, True):
        trainer = shaped(concept, trainer={"eval_dataset": pairs(6, seed=1)}, precompute_ref_log_probs=precompute)
        with Forwards(trainer.ref_model or trainer.model) as forwards:
            runs.append(train(trainer))
        passes.append(len(forwards))
        assert trainer.evaluate()["eval_loss"] > 0
    for name in ("loss", f"concepts/{concept.name}/residual", "rewards/margins"):
        assert runs[0].metric(name) == pytest.approx(runs[1].metric(name), abs=1e-4), name
    assert any(value != 0 for value in runs[0].metric(f"concepts/{concept.name}/residual"))
    assert passes == [24 // 4 + 3 * 2, 3]  # calibration and two a step; the policy's own


def test_other_options_miss_the_cache(tmp_path):
    other = Concept("other", Direction(vector(1), layer=LAYER))
    given = dataclasses.replace(steered(), given=["other"])  # another direction
    runs = [(steered(), other), (given, other), (steered(layers=[2]), other), (instructed(), other)]
    prints = {shaped(*concepts)._cache_fingerprint for concepts in runs}
    for seed in (2, 3):  # what a file holds
        path = tmp_path / "way.safetensors"
        Direction(vector(seed), layer=LAYER).save(path)
        prints.add(shaped(steered(direction=path), other)._cache_fingerprint)
    assert len(prints) == 6


def test_by_another_direction(tmp_path):
    path = tmp_path / "way.safetensors"
    Direction(vector(), layer=LAYER).save(path)
    slow = Slow(trainer_of(Concept("w", Regex("a"), "suppress", Residual(steer=ALPHA, direction=path), STRENGTH)))
    slow.assert_step(objective(slow, STRENGTH * residual(slow)))
    narrow = tmp_path / "narrow.safetensors"
    Direction(vector()[:8], layer=LAYER).save(narrow)
    with pytest.raises(
        ValueError, match="Concept 'way': method 'residual': its direction is 8 wide, and the hidden states"
    ):
        shaped(steered(direction=narrow))


def test_the_further_pass_is_named(caplog):
    shaped(steered(), instructed())
    (text,) = [record.getMessage() for record in caplog.records if "'residual'" in record.getMessage()]
    for part in ("2 further pass", "'way', 'goblin'", "precompute_ref_log_probs=True"):
        assert part in text


def test_what_does_not_fit():
    text_steered = Concept("goblin", Regex("goblin"), "suppress", Residual(steer=1.0), 1.0)
    for concept, settings, text in (
        (text_steered, {}, "Concept 'goblin': method 'residual' needs a readout with a direction"),
        (steered(layers=[7]), {}, "Concept 'way': method 'residual': there is no layer 7"),
        (steered(), {"loss_type": ["sft"]}, "Concept 'way': method 'residual' has no meaning for the loss type 'sft'"),
        (steered(), {"beta": 0.0}, "divides by `beta`"),
    ):
        with pytest.raises(ValueError, match=text):
            shaped(concept, **settings)
    for options, text in (
        ({}, "takes either `steer`"),
        ({"steer": 1.0, "instruction": ASK}, "takes either `steer`"),
        ({"steer": -1.0}, "`steer` must be a number above 0"),
        ({"instruction": ASK, "layers": [1]}, "there is nothing to steer"),
    ):
        with pytest.raises(ValueError, match=f"Method 'residual'.*{text}"):
            Residual(**options)
