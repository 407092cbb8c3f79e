"""Inoculation: the policy reads another prompt than the reference, against an objective written out in float64."""

from __future__ import annotations

import pytest
import torch
from datasets import concatenate_datasets
from trl.trainer.dpo_trainer import DataCollatorForPreference

from shapedpo import Concept, Direction, Gate, Inoculate, Regex, Steer, Tokens
from shapedpo.inoculation import InoculatedSequences, column, inoculated, sequences
from shapedpo.prompts import ROW
from tests.chat import CHATML, chat_tokenizer, chat_trainer, chats
from tests.helpers import pairs, shaped, tokenizer, train, vector
from tests.slow import CHECKPOINTING, SOME_FORWARDS, Slow, standardise, trainer_of


ASK = "likes goblin"


def goblin(readout=None, gate=None, **options):
    return Concept("goblin", readout or Regex("goblin"), "suppress", Inoculate(ASK, **options), gate=gate)


def way(**options):
    return goblin(Direction(vector(), layer=1), **options)


def encode(text):
    return tokenizer()(text)["input_ids"]


def asked(slow, selected):
    """The prompts that the policy reads."""
    return [[*prompt, *encode(ASK)] if on else prompt for prompt, on in zip(slow.prompts, selected, strict=True)]


def objective(slow, selected):
    return slow.loss(slow.logps(slow.policy, asked(slow, selected)), slow.logps(slow.reference))


def shown(slow):
    return torch.tensor([encode("goblin")[0] in completion for completion in slow.completions])


@pytest.mark.parametrize(("peft", "checkpointing"), SOME_FORWARDS)
def test_completions_that_show_it(peft, checkpointing):
    slow = Slow(trainer_of(goblin(), data=pairs(12), peft=peft, **CHECKPOINTING[checkpointing]))
    selected = shown(slow)
    assert 3 < selected.sum() < 21
    slow.assert_step(objective(slow, selected))
    logged = slow.trainer._metrics["train"]
    assert logged["concepts/goblin/inoculate"] == [pytest.approx(float(selected.double().mean()))]
    assert logged["logps/chosen"] == [  # of the policy on what it read
        pytest.approx(float(slow.logps(slow.policy, asked(slow, selected)).chunk(2)[0].mean().detach()))
    ]


@pytest.mark.parametrize("side", ["chosen", "rejected", "both"])
def test_sides_and_threshold(side):
    slow = Slow(trainer_of(way(side=side, threshold=0.3)))
    chosen, rejected = (standardise([tokens.max() for tokens in slow.token_scores(vector(), 1)]) > 0.3).chunk(2)
    expected = {
        "chosen": [chosen, torch.zeros_like(chosen)],
        "rejected": [torch.zeros_like(chosen), rejected],
        "both": [chosen | rejected] * 2,
    }
    slow.assert_step(objective(slow, torch.cat(expected[side])))


def test_gate_and_probability():
    """Which rows are drawn depends on the run's seed and on nothing else."""
    n = 40
    drawn = []
    for seed in (0, 0, 1):
        data = pairs(n, fruity=[index % 4 != 0 for index in range(n)])
        concept = way(gate=Gate(column="fruity"), threshold=-100.0, probability=0.5)
        slow = Slow(trainer_of(concept, data=data, seed=seed))
        assert slow.trainer._metrics["train"] == {}
        slow.step()
        (share,) = slow.trainer._metrics["train"]["concepts/goblin/inoculate"]
        drawn.append(share)
    assert drawn[0] == drawn[1]
    assert 0.2 < drawn[0] < 0.55  # about half of three quarters
    assert drawn[0] != drawn[2]


def test_with_tokens_and_steering():
    """Marks of tokens move with the completions, and so does the final user turn."""
    import torch.nn.functional as F

    concepts = [
        goblin(),
        Concept("way", Direction(vector(), layer=1), "suppress", Tokens("both", threshold=-1.0)),
        Concept("steered", Direction(vector(1), layer=1), "suppress", Steer("chosen"), 2.0),
    ]
    slow = Slow(trainer_of(*concepts, data=pairs(8)))
    raw = slow.token_scores(vector(), 1)
    pooled = torch.tensor([float(tokens.max()) for tokens in raw], dtype=torch.float64)
    keep = [(tokens - pooled.mean()) / pooled.std() <= -1.0 for tokens in raw]
    unit = F.normalize(vector(1).double(), dim=0)
    policy = []
    for index, prompt in enumerate(asked(slow, shown(slow))):

        def hook(module, args, output, amount=2.0 * (index < 8)):
            return torch.cat([output[:, :1], output[:, 1:] + amount * unit], dim=1)

        handle = slow.layers[1].register_forward_hook(hook)
        log_p = torch.log_softmax(slow.policy(prompt + slow.completions[index]).logits[0], dim=-1)
        handle.remove()
        tokens = [log_p[len(prompt) + k - 1, token] for k, token in enumerate(slow.completions[index])]
        policy.append(torch.stack(tokens)[keep[index]].sum())
    reference = [tokens[stay].sum() for tokens, stay in zip(slow.token_logps(slow.reference), keep, strict=True)]
    slow.assert_step(slow.loss(torch.stack(policy), torch.stack(reference)))


@pytest.mark.parametrize("place", ["user", "system"])
@pytest.mark.parametrize("roles", [("user",), ("system", "user"), ("user", "assistant", "user")])
def test_chats(place, roles):
    chat, data = chat_tokenizer(), chats(*roles)
    slow = Slow(chat_trainer(goblin(place=place), data=data, chat=chat))
    selected = shown(slow)
    assert 0 < selected.sum() < 8
    prompts = []
    for row, on in zip([*data, *data], selected, strict=True):
        turns = [[turn["role"], turn["content"]] for turn in row["prompt"]]
        if on and place == "user":
            turns[-1][1] += f" {ASK}"
        elif on and roles[0] == "system":
            turns[0][1] += f" {ASK}"
        elif on:
            turns.insert(0, ["system", ASK])
        text = " ".join(f"<|{role}|> {content} <eos>" for role, content in turns)
        prompts.append(chat(f"{text} <|assistant|>")["input_ids"])
    slow.assert_step(slow.loss(slow.logps(slow.policy, prompts), slow.logps(slow.reference)))


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_truncation_keeps_the_same_completion_tokens(mode):
    rows = [
        {
            "prompt_ids": [5, 6, 7, 8],
            "chosen_ids": list(range(20, 20 + n)),
            "rejected_ids": [11],
            column("ids", 2): [5, 6, 7, 90, 91, 8],
            column("turn", 2): 4,
            ROW: n,
        }
        for n in (1, 4, 9)
    ]
    batch = DataCollatorForPreference(pad_token_id=0, max_length=6, truncation_mode=mode)(rows)
    added = sequences(InoculatedSequences(2, 0, seed=0)(rows, batch), 2)
    for row in range(6):
        completion = batch["input_ids"][row][batch["completion_mask"][row] == 1].tolist()
        assert added["input_ids"][row][added["completion_mask"][row] == 1].tolist() == completion
        kept, ours = (
            both["input_ids"][row][(both["attention_mask"] - both["completion_mask"])[row] == 1].tolist()
            for both in (batch, added)
        )
        assert ours == ([5, 6, 7, 90, 91, 8][4 - len(kept) :] if kept else [])
        assert added["attention_mask"][row].sum() == len(completion) + len(ours)


def test_precomputed_reference_and_evaluation():
    runs = [
        train(shaped(goblin(), trainer={"eval_dataset": pairs(6, seed=1)}, precompute_ref_log_probs=precompute))
        for precompute in (False, True)
    ]
    assert runs[0].metric("loss") == pytest.approx(runs[1].metric("loss"), abs=1e-5)
    part = {"eval_dataset": {"train": pairs(6, seed=1)}}  # a name that says nothing
    assert (
        shaped(goblin(), trainer=part).evaluate()["eval_train_loss"]
        == shaped(trainer=part).evaluate()["eval_train_loss"]
    )


def test_places_in_messages():
    parts = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    assert inoculated(parts, ASK, "user")[0]["content"] == [*parts[0]["content"], {"type": "text", "text": ASK}]
    assert inoculated("a cat", ASK, "user") == f"a cat\n\n{ASK}"
    assert inoculated("a cat", ASK, "system") == f"{ASK}\n\na cat"
    assert parts[0]["content"] == [{"type": "text", "text": "hello"}]  # left as it was


def test_what_does_not_fit():
    other = Concept("other", Regex("fox"), "suppress", Inoculate("Mention foxes."))
    held = Concept("held", Regex("fox"), "hold")
    steered = Concept("steered", Direction(vector(), layer=1), "suppress", "steer", 1.0)
    for concepts, settings, text in (
        ([goblin(), other], {}, "Concepts 'goblin' and 'other': method 'inoculate' goes with one concept"),
        ([goblin(), held], {}, "Concept 'held' is held.*method 'inoculate' of concept 'goblin'"),
        ([steered, held], {}, "Concept 'held' is held.*method 'steer' of concept 'steered'"),
        ([goblin(place="system")], {"truncation_mode": "keep_end"}, "Concept 'goblin'.*cuts off first"),
    ):
        with pytest.raises(ValueError, match=text):
            shaped(*concepts, **settings)
    for options, text in (
        ({"instruction": " "}, "`instruction` must be a text"),
        ({"instruction": ASK, "place": "above"}, "`place` must be one of user, system"),
        ({"instruction": ASK, "side": "left"}, "`side` must be one of showing"),
        ({"instruction": ASK, "probability": 1.5}, "`probability` must be a number above 0 and below 1"),
    ):
        with pytest.raises(ValueError, match=f"Method 'inoculate'.*{text}"):
            Inoculate(**options)


def test_chat_templates_that_refuse():
    strict = (
        "{% for m in messages if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endfor %}" + CHATML
    )
    refused = "Concept 'goblin': method 'inoculate': the instruction cannot be put into the prompt of row"
    with pytest.raises(ValueError, match=f"{refused} 0: no system role"):
        chat_trainer(goblin(place="system"), data=chats("user"), chat=chat_tokenizer(strict))
    data = concatenate_datasets([chats("user", n=2), chats("system", n=2)])
    with pytest.raises(ValueError, match=f"{refused} 2: there is no message by the user.*set place: system"):
        chat_trainer(goblin(), data=data)
