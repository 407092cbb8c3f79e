"""Steering and ablation, against a policy whose forward pass is written out with them, in float64."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from trl.trainer.dpo_trainer import DataCollatorForPreference

from shapedpo import Ablate, Concept, Direction, Gate, Regex, SAEFeatures, Steer
from shapedpo.prompts import TURN, TURN_COLUMN, TurnStart, turn_tokens
from shapedpo.shapers.projection import ResidualProjection
from shapedpo.steering import Edit, Steering
from tests.chat import chat_tokenizer, chat_trainer, chats, messages
from tests.helpers import (
    FEATURES,
    HIDDEN,
    LAYERS,
    Forwards,
    load_model,
    pairs,
    sae_path,
    shaped,
    tokenizer,
    train,
    vector,
)
from tests.slow import CHECKPOINTING, EVERY_FORWARD, SOME_FORWARDS, Slow, standardise, trainer_of


LAYER, ALPHA = 1, 2.0
UNIT = F.normalize(vector().double(), dim=0)


def way(method, action="suppress", strength=ALPHA, hook=None, **fields):
    where = {"layer": LAYER} if hook is None else {"hook_name": hook}
    return Concept("way", Direction(vector(), **where), action, method, strength, **fields)


def ablated(method=None, **fields):
    return way(method or Ablate(), strength=None, **fields)


def deltas(slow, layer=LAYER):
    chosen, rejected = standardise([tokens.max() for tokens in slow.token_scores(vector(), layer)]).chunk(2)
    return chosen - rejected


def hooks(slow):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in slow.layers.modules())


@contextmanager
def changed(layers, change):
    """A model whose hidden states after some layers are `change(h)`, but for the first token's (BOS)."""

    def hook(module, args, output):
        return torch.cat([output[:, :1], change(output[:, 1:])], dim=1)

    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def steered_logps(slow, amounts, layers=(LAYER,), unit=UNIT, change=None):
    """`(2B,)`, each completion under the policy steered by its own amount."""
    found = []
    for index, amount in enumerate(amounts):
        edit = change or (lambda h, amount=amount: h + float(amount) * unit)
        with changed([slow.layers[layer] for layer in layers], edit if amount != 0 else lambda h: h):
            ids = slow.prompts[index] + slow.completions[index]
            log_p = torch.log_softmax(slow.policy(ids).logits[0], dim=-1)
        start = len(slow.prompts[index])
        found.append(sum(log_p[start + k - 1, token] for k, token in enumerate(slow.completions[index])))
    return torch.stack(found)


@pytest.mark.parametrize(("peft", "checkpointing"), EVERY_FORWARD)
def test_explaining_away(peft, checkpointing):
    """By default the completion is steered that shows the concept more, towards it."""
    slow = Slow(trainer_of(way("steer"), peft=peft, **CHECKPOINTING[checkpointing]))
    delta = deltas(slow)
    amounts = ALPHA * torch.cat([delta > 0, delta < 0]).double()
    assert 0 < (delta > 0).sum() < len(delta)
    objective = slow.loss(steered_logps(slow, amounts), slow.logps(slow.reference))
    before = hooks(slow)
    slow.assert_step(objective)
    assert slow.trainer._metrics["train"]["concepts/way/steer"] == [0.5]
    assert hooks(slow) == before


@pytest.mark.parametrize("side", ["chosen", "rejected", "both"])
@pytest.mark.parametrize("action", ["suppress", "amplify"])
def test_sides_layers_and_action(side, action):
    slow = Slow(trainer_of(way(Steer(side, layers=[0, 2]), action)))
    sides = torch.tensor([side != "rejected", side != "chosen"]).repeat_interleave(len(slow.rows)).double()
    amounts = ALPHA * sides * (1 if action == "suppress" else -1)
    slow.assert_step(slow.loss(steered_logps(slow, amounts, layers=(0, 2)), slow.logps(slow.reference)))


@pytest.mark.parametrize("side", ["showing", "rejected"])
def test_top_fraction_within_a_gate(side):
    data = pairs(12, creative=[index % 4 != 0 for index in range(12)])
    slow = Slow(trainer_of(way(Steer(side, fraction=0.3), gate=Gate(column="creative")), data=data))
    delta = deltas(slow)
    gate = torch.tensor([index % 4 != 0 for index in range(12)])
    ahead = torch.where(gate, delta.abs() if side == "showing" else -delta, -torch.inf)
    on = ahead >= ahead.sort(descending=True).values[2]  # of nine, the 0.7-quantile leaves the top three
    on &= ahead > 0
    assert on.sum() == 3
    sides = (
        torch.cat([delta > 0, delta < 0]) if side == "showing" else torch.tensor([False, True]).repeat_interleave(12)
    )
    amounts = ALPHA * (on.repeat(2) & sides).double()
    slow.assert_step(slow.loss(steered_logps(slow, amounts), slow.logps(slow.reference)))


def test_where_the_concept_is_read():
    """At the input of a module too; and a concept of several features steers by the mean of their unit rows."""
    slow = Slow(trainer_of(way(Steer("chosen"), hook=f"blocks.{LAYER + 1}.hook_resid_pre")))
    amounts = ALPHA * torch.tensor([True, False]).repeat_interleave(len(slow.rows)).double()
    slow.assert_step(slow.loss(steered_logps(slow, amounts), slow.logps(slow.reference)))

    import sae_lens

    rows = sae_lens.SAE.load_from_disk(sae_path()).W_dec.detach()[[3, 17]].double()
    unit = F.normalize(F.normalize(rows, dim=1).mean(dim=0), dim=0)
    concept = Concept("f", SAEFeatures(str(sae_path()), [3, 17]), "suppress", Steer("chosen"), ALPHA)
    slow = Slow(trainer_of(concept))
    slow.assert_step(slow.loss(steered_logps(slow, amounts, unit=unit), slow.logps(slow.reference)))


def test_another_direction_than_the_readouts(tmp_path):
    """Of a readout that has none, at the place that the file names, or at layers."""
    goblin = tokenizer()("goblin")["input_ids"][0]
    path = tmp_path / "way.safetensors"
    Direction(vector(), layer=LAYER).save(path)
    for layers in (None, [0, 2]):
        concept = Concept("goblin", Regex("goblin"), "suppress", Steer("both", layers=layers, direction=path), ALPHA)
        slow = Slow(trainer_of(concept))
        assert any(goblin in completion for completion in slow.completions)
        policy = steered_logps(slow, [ALPHA] * 2 * len(slow.rows), layers=layers or (LAYER,))
        slow.assert_step(slow.loss(policy, slow.logps(slow.reference)))
    assert Concept.from_dict(concept.to_dict()) == concept


@pytest.mark.parametrize(("peft", "checkpointing"), SOME_FORWARDS)
def test_ablation(peft, checkpointing):
    slow = Slow(trainer_of(ablated(), peft=peft, **CHECKPOINTING[checkpointing]))
    policy = steered_logps(slow, [1.0] * 2 * len(slow.rows), change=lambda h: h - (h @ UNIT)[..., None] * UNIT)
    slow.assert_step(slow.loss(policy, slow.logps(slow.reference)))


def test_ablation_of_parallel_features():
    rows = torch.stack([vector(1), vector(2), vector(1) + vector(2)]).double()
    q, _ = torch.linalg.qr(rows[:2].T)
    edit = Edit([], torch.zeros(0), True)
    x = torch.randn(2, 3, HIDDEN, dtype=torch.float64)
    from shapedpo.shapers.projection import orthonormal_basis

    found = edit._replace(basis=orthonormal_basis(rows))(x, torch.ones(2, 3, 1))
    torch.testing.assert_close(found, x - x @ q @ q.T, atol=1e-5, rtol=1e-5)


def test_two_concepts_and_a_third_method():
    concepts = [
        way(Steer("chosen")),
        Concept("other", Direction(vector(1), layer=2), "suppress", Ablate("both")),
        Concept("third", Direction(vector(2), layer=0), "suppress", strength=1.5),
    ]
    slow = Slow(trainer_of(*concepts))
    other = F.normalize(vector(1).double(), dim=0)
    with changed([slow.layers[2]], lambda h: h - (h @ other)[..., None] * other):
        amounts = ALPHA * torch.tensor([True, False]).repeat_interleave(len(slow.rows)).double()
        policy = steered_logps(slow, amounts)
    score = standardise([tokens.max() for tokens in slow.token_scores(vector(2), 0)])
    from tests.slow import BETA

    slow.assert_step(slow.loss(policy, slow.logps(slow.reference) - 1.5 / BETA * score))


def test_a_stream():
    run = train(shaped(way("steer"), data=pairs().to_iterable_dataset()))
    assert run.metric("concepts/way/steer") == [0.5] * 3


def test_precomputed_reference():
    runs = [
        train(shaped(way("steer"), precompute_ref_log_probs=precompute)).metric("loss") for precompute in (False, True)
    ]
    assert runs[0] == pytest.approx(runs[1], abs=1e-5)
    assert runs[0] != pytest.approx(train(shaped()).metric("loss"), abs=1e-3)


def test_evaluation_and_generation_are_not_steered():
    trainer = shaped(way("steer"), trainer={"eval_dataset": pairs(6, seed=1)}, learning_rate=0.0)
    plain = shaped(trainer={"eval_dataset": pairs(6, seed=1)}, learning_rate=0.0)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    assert trainer._metrics["train"] == {}


class TestSteering:
    def test_hooks_go_after_a_failure_and_nothing_happens_before_the_aim(self):
        model = load_model()
        ids = torch.tensor([[1, 5, 6, 7]])
        plain = model(ids).logits
        steering = Steering({0: Edit([(model.model.layers[0], "output")], UNIT.float()[:, None], False)})

        def fail():
            with steering:
                assert torch.equal(model(ids).logits, plain)
                steering.aim({0: torch.tensor([3.0])}, torch.ones(1, 4, dtype=torch.bool))
                assert not torch.allclose(model(ids).logits, plain)
                raise RuntimeError("on purpose")

        with pytest.raises(RuntimeError, match="on purpose"):
            fail()
        assert torch.equal(model(ids).logits, plain)
        with steering:
            assert torch.equal(model(ids).logits, plain)  # the last aim is forgotten

    def test_hooks_that_do_not_run_are_an_error(self):
        """As in a model that was compiled before without them: nothing would be steered, and nobody told."""
        layer, aim = torch.nn.Identity(), ({0: torch.tensor([2.0])}, torch.ones(1, 3, dtype=torch.bool))
        steering = Steering({0: Edit([(layer, "output")], torch.eye(2)[:, :1], False)})
        projection = ResidualProjection([(layer, torch.eye(2)[:, :1])])
        for run in (layer.forward, layer):  # which runs no hooks, and which does
            x, passed_over = torch.zeros(1, 3, 2, requires_grad=True), run is not layer
            with pytest.raises(RuntimeError, match="torch_compile=False") if passed_over else nullcontext(), steering:
                steering.aim(*aim)
                run(x)
            with pytest.raises(RuntimeError, match="torch_compile=False") if passed_over else nullcontext(), projection:
                run(x)

    def test_a_tuple_and_virtual_tokens(self):
        class Layer(torch.nn.Module):
            def forward(self, hidden_states):
                return hidden_states, "cache"

        layer = Layer()
        steering = Steering({0: Edit([(layer, "output"), (layer, "input")], torch.eye(2)[:, :1], False)})
        with steering:
            steering.aim({0: torch.tensor([2.0])}, torch.tensor([[False, True]]))
            x, rest = layer(hidden_states=torch.zeros(1, 3, 2))  # one virtual token before two of the text
        assert rest == "cache"
        assert x.tolist() == [[[0, 0], [0, 0], [4, 0]]]


class TestFinalUserTurn:
    @pytest.mark.parametrize(
        ("roles", "tokens"),
        [
            (("user",), 4),  # apple red <eos> <|assistant|>
            (("system", "user"), 4),
            (("system", "user", "assistant", "user"), 4),
            (("user", "assistant"), 8),  # the answer's header, its words and its end too
            (("system",), 5),  # nobody asked: all of it
        ],
    )
    def test_turns_of_a_chat(self, roles, tokens):
        chat = chat_tokenizer()
        prompt = messages(*roles)
        ids = chat.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
        assert turn_tokens({"prompt": prompt, "prompt_ids": ids}, chat) == tokens

    def test_contents_like_those_it_is_compared_with(self):
        chat = chat_tokenizer()
        for content in ("a red", "1 red", "a"):
            prompt = [*messages("system"), {"role": "user", "content": content}]
            ids = chat.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)[
                "input_ids"
            ]
            assert turn_tokens({"prompt": prompt, "prompt_ids": ids}, chat) == len(content.split()) + 2

    def test_plain_text(self):
        assert turn_tokens({"prompt": "<bos> a cat", "prompt_ids": [1, 5, 6]}, tokenizer()) == 3

    @pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
    @pytest.mark.parametrize("padding", ["right", "left"])
    def test_start_after_truncation(self, mode, padding):
        rows = [
            {"prompt_ids": [5, 6, 7, 8, 9], "chosen_ids": [10] * n, "rejected_ids": [11], TURN_COLUMN: 2}
            for n in (1, 3, 9)
        ]
        batch = DataCollatorForPreference(pad_token_id=0, max_length=7, truncation_mode=mode)(rows)
        if padding == "left":  # as a user's collator may do
            shifts = (batch["attention_mask"] == 0).sum(dim=1).tolist()
            batch = {
                name: torch.stack([row.roll(n) for row, n in zip(tensor, shifts, strict=True)])
                for name, tensor in batch.items()
            }
        starts = TurnStart()(rows, batch)[TURN].tolist()
        for start, ids in zip(starts, batch["input_ids"].tolist(), strict=True):
            assert ids[start] == 8 if 8 in ids else start == next(i for i, token in enumerate(ids) if token)

    def test_a_chat_is_steered_from_the_turn_on(self):
        chat = chat_tokenizer()
        slow = Slow(chat_trainer(way(Steer("chosen")), data=chats("system", "user"), chat=chat))
        found = []
        for index in range(8):
            prompt, completion = slow.prompts[index], slow.completions[index]
            start = prompt.index(chat.convert_tokens_to_ids("<|user|>")) + 1

            def hook(module, inputs, output, start=start, amount=ALPHA * (index < 4)):
                return torch.cat([output[:, :start], output[:, start:] + amount * UNIT], dim=1)

            handle = slow.layers[LAYER].register_forward_hook(hook)
            log_p = torch.log_softmax(slow.policy(prompt + completion).logits[0], dim=-1)
            handle.remove()
            found.append(sum(log_p[len(prompt) + k - 1, token] for k, token in enumerate(completion)))
        slow.assert_step(slow.loss(torch.stack(found), slow.logps(slow.reference)))


@pytest.mark.parametrize(
    ("concept", "text"),
    [
        (Concept("way", Regex("x"), "suppress", "steer", 1.0), "method 'steer' needs a readout with a direction"),
        (Concept("way", Regex("x"), "suppress", "ablate"), "method 'ablate' needs a readout with a direction"),
        (
            Concept("way", SAEFeatures(str(sae_path()), "all"), "suppress", "ablate"),
            f"method 'ablate' takes its {FEATURES} directions out of {HIDDEN} dimensions",
        ),
        (way(Steer(direction="no.safetensors")), "method 'steer': There is no file 'no.safetensors'"),
        (way(Steer(layers=[0, LAYERS])), f"method 'steer': there is no layer {LAYERS}: the model has {LAYERS}"),
    ],
)
def test_what_does_not_fit(concept, text):
    """It is said before the reference's pass over the data."""
    model = load_model()
    with Forwards(model) as passes, pytest.raises(ValueError, match=f"Concept 'way': {text}"):
        shaped(concept, model=model, precompute_ref_log_probs=True)
    assert not len(passes)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"name": "steer", "side": "left"}, "`side` must be one of showing, chosen, rejected, both"),
        ({"name": "steer", "fraction": 1}, "`fraction` must be a number above 0 and below 1"),
        ({"name": "ablate", "layers": []}, "`layers` must be a list of layer indices"),
        ({"name": "ablate", "layers": [-1]}, "`layers` must be a list of layer indices"),
        ({"name": "ablate", "direction": 3}, "`direction` must be the path of a safetensors file, got 3"),
    ],
)
def test_bad_options(options, text):
    with pytest.raises(ValueError, match=f"Concept 'way': Method '{options['name']}': {text}"):
        way(options, strength=1.0 if options["name"] == "steer" else None)
