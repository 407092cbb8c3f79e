"""Filtering: which rows leave, and that training on the others is plain DPO on them, to the last bit."""

from __future__ import annotations

import json
import math

import pytest
import torch
from trl import DPOTrainer

from shapedpo import Concept, Direction, Filter, Gate, Regex
from shapedpo.filtering import load_record
from shapedpo.shapers import ConceptSignal
from tests.helpers import Forwards, arguments, assert_same, build, pairs, shaped, train, vector
from tests.slow import Slow, standardise, trainer_of


EPOCH = {"max_steps": -1, "num_train_epochs": 1}


def way(action="suppress", gate=None, **options):
    return Concept("way", Direction(vector(), layer=1), action, Filter(**options), gate=gate)


def data(n=24):
    return pairs(n, creative=[index % 3 != 0 for index in range(n)], cluster=[index % 5 for index in range(n)])


@pytest.fixture(scope="module")
def delta():
    """Of every row, standardised over all of them."""
    slow = Slow(trainer_of(Concept("way", Direction(vector(), layer=1)), data=data()))
    chosen, rejected = standardise([tokens.max() for tokens in slow.token_scores(vector(), 1)]).chunk(2)
    return chosen - rejected


def top(delta, count, where=None):
    delta = delta if where is None else torch.where(where, delta, -torch.inf)
    return sorted(delta.topk(count).indices.tolist())


GATE = torch.tensor([index % 3 != 0 for index in range(24)])


@pytest.mark.parametrize(
    ("precompute", "concept", "expected"),
    [
        (True, way(fraction=0.25), lambda d: top(d, 6)),
        (True, way("amplify", fraction=0.25), lambda d: top(-d, 6)),
        (False, way(fraction=0.25, gate=Gate(column="creative")), lambda d: top(d, 4, GATE)),
        (False, way(threshold=0.7), lambda d: (d >= 0.7).nonzero()[:, 0].tolist()),
        (
            False,
            way(expression="delta > 0.2 and cluster in [1, 3] and score_chosen > score_rejected"),
            lambda d: [i for i in range(24) if d[i] > 0.2 and i % 5 in (1, 3)],
        ),
    ],
    ids=["fraction", "amplify", "gate", "threshold", "expression"],
)
def test_training_is_plain_on_the_rows_that_stay(tmp_path, delta, precompute, concept, expected):
    gone = expected(delta)
    assert 0 < len(gone) < 12
    settings = {**EPOCH, "precompute_ref_log_probs": precompute}
    trainer = shaped(concept, data=data(), output_dir=str(tmp_path), **settings)
    run = train(trainer)
    record = json.loads((tmp_path / "filtered.json").read_text())
    assert record["concepts"] == {"way": gone}
    assert (record["rows"], record["left"]) == (24, len(gone))
    assert trainer.state.max_steps == len(run.steps) == math.ceil((24 - len(gone)) / 4)
    stay = data().select([row for row in range(24) if row not in gone])
    plain = train(build(DPOTrainer, arguments(False, **settings), train_dataset=stay))
    if precompute:  # in other batches, whose sums differ in the last bits
        assert run.metric("loss") == pytest.approx(plain.metric("loss"), abs=1e-5)
    else:
        assert_same(plain, run)
    assert run.trainer._calibration.deltas.shape[0] == 24 - len(gone)  # of what is trained on


def test_with_an_adapter_and_another_concept(tmp_path, delta):
    """The filter reads the base model; rows that any concept wants out are out; others are shaped as ever."""
    from peft import LoraConfig

    goblin = Concept("goblin", Regex("goblin"), "suppress", Filter(threshold=0.5))
    reward = Concept("other", Direction(vector(1), layer=0), "suppress", strength=1.0)
    options = {"peft_config": LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)}
    trainer = shaped(way(fraction=0.25), goblin, reward, data=data(), trainer=options, output_dir=str(tmp_path))
    trainer.train()
    record = json.loads((tmp_path / "filtered.json").read_text())["concepts"]
    assert record["way"] == top(delta, 6)
    only = [index for index, row in enumerate(data()) if "goblin" in row["chosen"] and "goblin" not in row["rejected"]]
    assert record["goblin"] == only
    assert len(trainer.train_dataset) == 24 - len({*record["way"], *only})


def test_a_resumed_run_takes_the_rows_of_its_checkpoint(tmp_path):
    settings = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 1}
    first = train(shaped(way(fraction=0.25), data=data(), **settings))
    trainer = shaped(way(fraction=0.25), data=data(), **settings)
    with Forwards(trainer.ref_model) as reference:
        again = train(trainer, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(reference) == 1  # the third step's: nothing was read again
    assert trainer._filtered == first.trainer._filtered
    assert load_record(tmp_path / "checkpoint-2", 24, "of another filter") is None
    assert again.steps[-1]["loss"] == first.steps[-1]["loss"]


def test_equal_deltas_leave_in_order_and_only_positive_ones():
    delta = torch.tensor([1.0, 0.0, 1.0, -1.0, 1.0, 0.0])
    signal = ConceptSignal(torch.zeros(12), delta, torch.ones(6))
    assert Filter(fraction=0.34).leaves(signal, 1.0, None).tolist() == [True, False, True, False, False, False]
    assert Filter(fraction=0.9).leaves(signal, 1.0, None).tolist() == [True, False, True, False, True, False]
    assert Filter(fraction=0.9).leaves(signal, -1.0, None).tolist() == [False, False, False, True, False, False]


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        ("delta >", "SyntaxError"),
        ("nonsense > 2", "UndefinedVariableError"),
        ("prompt_ids > 2", "UndefinedVariableError"),
        ("delta", "true or false of each row"),
    ],
)
def test_bad_expressions_are_refused_before_a_model_is_loaded(expression, text):
    with pytest.raises(ValueError, match=f"Concept 'way': method 'filter' cannot evaluate '{expression}'.*{text}"):
        shaped(way(expression=expression), data=data(), model="no such model")


@pytest.mark.parametrize(
    "expression",
    ["@torch.os.system('x') > 1", "delta.__class__ != 1", "delta. _x > 1", r"'\'' + @x + '\'' == 1", "(@x"],
)
def test_expressions_see_the_columns_only(expression):
    with pytest.raises(ValueError, match="may name columns and their methods"):
        Filter(expression=expression)


def test_expressions_of_text():
    """In a string an at sign or an underscore is text."""
    table = data(4).add_column("a b", ["x", "a@b", "._", "y_"]).to_pandas()
    signal = ConceptSignal(torch.zeros(8), torch.zeros(4), torch.ones(4))
    gone = Filter(expression="`a b`.str.contains('@') or `a b` == '._'").leaves(signal, 1.0, table)
    assert gone.tolist() == [False, True, True, False]


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="Concept 'way': method 'filter' reads all rows"):
        shaped(way(fraction=0.1), data=data().to_iterable_dataset())
    with pytest.raises(ValueError, match="would leave none of the 24 pairs"):
        shaped(way(expression="delta > -100"), data=data()).train()
    for options, text in (
        ({}, "takes one of.*got none"),
        ({"fraction": 0.1, "threshold": 1}, "got fraction and threshold"),
        ({"fraction": 1.5}, "above 0 and below 1"),
        ({"expression": " "}, "must be a text"),
    ):
        with pytest.raises(ValueError, match=f"Method 'filter'.*{text}"):
            way(**options)
