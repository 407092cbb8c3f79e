"""The collator: TRL's batch untouched, and beside it what shaping needs of a row."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl.trainer.dpo_trainer import DataCollatorForPreference

from shapedpo import Concept, Gate, Regex, ShapedDPOTrainer, TextFunction
from shapedpo.collator import CACHED, GATES, KEYS, PROMPT_TEXT, ROW, TEXT, WEIGHT, ConceptCollator, pack, unpack
from tests.helpers import ANIMALS, FRUITS, arguments, build, pairs, shaped, tokenizer, train


def length(text: str) -> float:
    return float(len(text))


def ids(text: str) -> list[int]:
    return tokenizer()(text)["input_ids"]


ROWS = [
    {"prompt_ids": ids("<bos> the cat"), "chosen_ids": ids("eats apple <eos>"), "rejected_ids": ids("sings <eos>")},
    {"prompt_ids": ids("<bos> a"), "chosen_ids": ids("goblin sees the wood <eos>"), "rejected_ids": ids("dog <eos>")},
    {"prompt_ids": ids("<bos> a goblin and then"), "chosen_ids": ids("fox <eos>"), "rejected_ids": ids("a dog <eos>")},
]


def trls(**fields: Any) -> DataCollatorForPreference:
    return DataCollatorForPreference(pad_token_id=0, **fields)


def collate(rows: list[dict[str, Any]], inner: Any = None, **options: Any) -> dict[str, Any]:
    return ConceptCollator(inner or trls(), tokenizer(), **options)(rows)


class TestCollator:
    def test_leaves_trls_batch_alone(self):
        rows = [{**row, "weight": 0.5, "creative": True} for row in ROWS]
        theirs = trls()(ROWS)
        ours = collate(rows, text_readouts=[Regex("goblin")], weight_column="weight", gate_columns=["creative"])
        assert ours.keys() - theirs.keys() == {WEIGHT, GATES, TEXT}
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
        assert rows == [{**row, "weight": 0.5, "creative": True} for row in ROWS]
        assert collate(ROWS).keys() == theirs.keys()

    def test_texts_are_the_completions(self):
        batch = collate(ROWS, text_readouts=[Regex("goblin"), TextFunction(length)], prompt_text=True)
        texts = [
            "eats apple",
            "goblin sees the wood",
            "fox",
            "sings",
            "dog",
            "a dog",
        ]  # no prompt, no padding, no <eos>
        assert unpack(batch[TEXT]).tolist() == [[float("goblin" in text), len(text)] for text in texts]
        prompts = ["the cat", "a", "a goblin and then"]
        assert unpack(batch[PROMPT_TEXT]).tolist() == [[float("goblin" in text), len(text)] for text in prompts]

    def test_texts_are_scored_as_truncated(self):
        (seen,) = collate(ROWS[1:2], trls(max_length=4), text_readouts=[TextFunction(length)])[TEXT].split(2)
        assert unpack(seen)[:, 0].tolist() == [len("goblin sees"), len("dog")]
        assert unpack(collate(ROWS[1:2], trls(max_length=2), text_readouts=[Regex("a")])[TEXT]).tolist() == [[0], [0]]

    def test_numbers_survive_a_cast_of_floats(self):
        """DeepSpeed casts the floating inputs of a batch to bf16."""
        values = [[0.1, 1e-30], [float("inf"), 3.0]]
        packed = pack(values)
        assert not packed.is_floating_point()
        assert torch.equal(unpack(packed), torch.tensor(values))
        rows = [{**row, "weight": weight, "creative": 1 / 3} for row, weight in zip(ROWS, (0.1, 2, True), strict=True)]
        batch = collate(rows, text_readouts=[Regex("a")], weight_column="weight", gate_columns=["creative"])
        assert not any(batch[key].is_floating_point() for key in KEYS if key in batch)
        assert torch.equal(unpack(batch[WEIGHT]), torch.tensor([[0.1], [2.0], [1.0]]))
        assert torch.equal(unpack(batch[GATES]), torch.full((3, 1), 1 / 3))

    def test_cached_scores(self):
        """Scores ride behind the reference's log-probability in TRL's own columns."""
        rows = [
            {**row, "ref_chosen_logps": [-1.0 - i, 0.1, 5.0], "ref_rejected_logps": [-7.0, 0.3, 6.0 + i]}
            for i, row in enumerate(ROWS)
        ]
        batch = collate(rows, text_readouts=[TextFunction((1).__truediv__)])  # never called
        assert batch["ref_chosen_logps"].tolist() == [-1.0, -2.0, -3.0]
        assert batch["ref_rejected_logps"].tolist() == [-7.0] * 3
        assert torch.equal(unpack(batch[CACHED])[:, 0], torch.tensor([-1.0, -2.0, -3.0, -7.0, -7.0, -7.0]))
        assert torch.equal(unpack(batch[CACHED])[:, 2], torch.tensor([5.0, 5.0, 5.0, 6.0, 7.0, 8.0]))
        assert TEXT not in batch

    def test_pickles(self):
        """A worker process gets a copy, and loads its own readers, which may be what cannot be pickled."""
        collator = ConceptCollator(trls(), tokenizer(), text_readouts=[Regex("goblin")])
        batch = collator(ROWS)
        again = pickle.loads(pickle.dumps(collator))(ROWS)
        assert torch.equal(again[TEXT], batch[TEXT])

    @pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf"), None])
    def test_bad_weights(self, weight):
        rows = [{**row, "weight": weight} for row in ROWS]
        with pytest.raises(ValueError, match=rf"Column 'weight': .*finite and not negative, got {weight!r}"):
            collate(rows, weight_column="weight")

    @pytest.mark.parametrize("gate", [-0.1, 1.5, float("nan"), None, "yes"])
    def test_bad_gates(self, gate):
        rows = [{**row, "creative": gate, ROW: number} for number, row in enumerate(ROWS)]
        with pytest.raises(ValueError, match=rf"Column 'creative': .*between 0 and 1, got {gate!r}"):
            collate(rows, gate_columns=["creative"])


class TestInTheTrainer:
    def test_columns_reach_the_batch(self):
        """TRL drops columns that it does not know twice: in its data loader, and in its collator."""
        data = pairs(weight=[0.5] * 24, creative=[True, False] * 12, other=list(range(24)))
        trainer = shaped(
            Concept("goblin", Regex("goblin"), "suppress", strength=1.0, gate=Gate(column="creative")), data=data
        )
        batch = next(iter(trainer.get_train_dataloader()))
        assert unpack(batch[WEIGHT])[:, 0].tolist() == [0.5] * 4
        assert set(unpack(batch[GATES])[:, 0].tolist()) <= {0.0, 1.0}
        assert "other" not in batch

    @pytest.mark.parametrize("remove", [True, False])
    @pytest.mark.parametrize("stream", [True, False])
    def test_weights_weight(self, remove, stream):
        """A weight of 2 on every pair doubles the loss; so it arrives whatever TRL does with unknown columns."""
        twice = pairs(weight=[2.0] * 24)
        runs = [
            train(shaped(data=data.to_iterable_dataset() if stream else data, remove_unused_columns=remove))
            for data in (pairs(), twice)
        ]
        assert runs[1].metric("loss")[0] == pytest.approx(2 * runs[0].metric("loss")[0], rel=1e-6)

    def test_another_name(self):
        data = pairs(trust=[2.0] * 24, weight=[0.0] * 24)
        assert train(shaped(data=data, weight_column="trust")).metric("loss")[0] == pytest.approx(1.386294, rel=1e-5)
        assert train(shaped(data=data, weight_column=None)).metric("loss")[0] == pytest.approx(0.693147, rel=1e-5)
        # A plain DPOConfig asks for no weights.
        run = train(build(ShapedDPOTrainer, arguments(False), train_dataset=data))
        assert run.metric("loss")[0] == pytest.approx(0.693147, rel=1e-5)

    def test_evaluation_is_neither_weighted_nor_gated(self):
        """So that its columns may be empty."""
        goblin = Concept("goblin", Regex("goblin"), "suppress", strength=1.0, gate=Gate(column="creative"))
        data, metrics = pairs(weight=[2.0] * 24, creative=[True, False] * 12), []
        for columns in ({}, {"weight": [None, 1.0, None, 2.0], "creative": [None, True, None, False]}):
            trainer = shaped(goblin, data=data, trainer={"eval_dataset": pairs(4, seed=1, **columns)})
            metrics.append(trainer.evaluate())
        for name in ("eval_loss", "eval_concepts/goblin/pressure"):
            assert metrics[0][name] == metrics[1][name]

    def test_our_collator_around_the_users(self):
        seen = []

        class Collator(DataCollatorForPreference):
            def torch_call(self, examples):
                seen.append(len(examples))
                batch = super().torch_call(examples)
                for example in examples:
                    example.clear()  # rows of the calibration are read again where it fills its last batch up
                return batch

        options = {"data": pairs(10), "trainer": {"data_collator": Collator(pad_token_id=0)}}
        trainer = shaped(Concept("goblin", Regex("goblin")), **options)
        trainer.train()
        assert len(seen) >= 3 + 3  # the steps and the calibration, and what is fetched ahead
        assert "concepts/goblin/delta" in trainer.state.log_history[0]

    @pytest.mark.parametrize("workers", [0, 2])
    def test_worker_processes(self, workers):
        concepts = [Concept("goblin", Regex("goblin")), Concept("length", TextFunction(length))]
        run = train(shaped(*concepts, dataloader_num_workers=workers, max_steps=2))
        baseline = train(shaped(*concepts, max_steps=2))
        assert run.metric("concepts/length/delta") == baseline.metric("concepts/length/delta")
        assert run.metric("loss") == baseline.metric("loss")

    def test_conversations(self):
        """Chat data through a template: the text that is scored is the answer, without the template's words."""
        template = (
            "{% for message in messages %}{{ '<bos> ' if loop.first }}{{ message.role }} {{ message.content }} <eos> "
            "{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
        )
        words = copy.deepcopy(tokenizer())
        words.chat_template = template
        seen: list[str] = []

        def remember(text: str) -> float:
            seen.append(text)
            return float(len(text))

        rows = [
            {
                "prompt": [{"role": "user", "content": f"the {animal}"}],
                "chosen": [{"role": "assistant", "content": f"eats {fruit}"}],
                "rejected": [{"role": "assistant", "content": f"likes the {animal}"}],
            }
            for animal, fruit in zip(ANIMALS, FRUITS, strict=True)
        ]
        trainer = shaped(
            Concept("length", TextFunction(remember)), data=Dataset.from_list(rows), trainer={"processing_class": words}
        )
        trainer.train()
        assert {text.strip() for text in seen} == {f"eats {fruit}" for fruit in FRUITS} | {
            f"likes the {animal}" for animal in ANIMALS
        }
