"""A held concept in the trainer: what the controller sees, when it moves, what is logged, and that evaluation is not shaped."""

from __future__ import annotations

import pytest
import torch
from trl import DPOTrainer

from shapedpo import Concept, Direction, Gate, Regex
from shapedpo.shapers.hold import HoldController
from tests.helpers import arguments, build, pairs, shaped, train, vector


def way(**fields) -> Concept:
    return Concept("way", Direction(vector(), layer=1), "hold", **fields)


def test_strength_is_that_of_the_controller():
    """The run's strengths are those that a controller by itself finds on the run's own log-ratios and deltas."""
    trainer = shaped(way(), Concept("goblin", Regex("goblin"), "suppress", strength=2.0))
    controller, seen = trainer._shaping.hold, []
    observe = controller.observe

    def spy(log_ratios, deltas):
        seen.append((log_ratios.clone(), deltas.clone()))
        observe(log_ratios, deltas)

    controller.observe = spy
    run = train(trainer)
    again = HoldController([0.0], trainer.beta)
    again.start(trainer._calibration.deltas[:, :1], trainer._calibration.gates[:, :1])
    for logged, (log_ratios, deltas) in zip(run.metric("concepts/way/strength"), seen, strict=True):
        assert logged == again.strengths.item() != 0
        again.observe(log_ratios, deltas)
        again.update()
    assert run.metric("concepts/goblin/strength") == [2.0] * 3
    # What it sees is unshaped: with these the metrics can be made again.
    for (log_ratios, deltas), value in zip(seen, run.metric("concepts/way/amplification"), strict=True):
        assert (log_ratios * deltas[:, 0]).mean().item() / 4 == pytest.approx(value, abs=1e-6)


def test_moves_once_an_optimizer_step():
    trainer = shaped(way(), gradient_accumulation_steps=3, per_device_train_batch_size=2)
    controller, calls = trainer._shaping.hold, []
    observe, update = controller.observe, controller.update
    controller.observe = lambda *batch: (calls.append("observe"), observe(*batch))
    controller.update = lambda: (calls.append("update"), update())
    train(trainer)
    assert calls == ["observe", "observe", "observe", "update"] * 3


def test_the_gate_is_all_it_sees():
    """Outside the gate a pair neither counts nor is shaped."""
    data = pairs(creative=[index % 2 == 0 for index in range(24)])
    trainer = shaped(way(gate=Gate(column="creative")), data=data)
    controller, seen = trainer._shaping.hold, []
    observe = controller.observe
    controller.observe = lambda log_ratios, deltas: (seen.append(deltas), observe(log_ratios, deltas))
    train(trainer)
    zero = torch.cat(seen)[:, 0] == 0
    assert 0 < int(zero.sum()) < len(zero)
    assert controller.state()["share"].item() == pytest.approx(0.5)


def test_evaluation_is_plain_and_leaves_the_controller_alone():
    trainer = shaped(way(), trainer={"eval_dataset": pairs(8, seed=1)})
    train(trainer)
    before = {name: tensor.clone() for name, tensor in trainer._shaping.hold.state().items()}
    ours = trainer.evaluate()
    for name, tensor in trainer._shaping.hold.state().items():
        assert torch.equal(tensor, before[name]), name
    theirs = build(
        DPOTrainer, arguments(False), trainer.model, eval_dataset=pairs(8, seed=1), ref_model=trainer.ref_model
    )
    assert ours["eval_loss"] == theirs.evaluate()["eval_loss"]


def test_precomputed_reference_gives_the_same():
    one, two = (train(shaped(way(), precompute_ref_log_probs=cached, calibration_size=24)) for cached in (False, True))
    assert one.metric("concepts/way/strength") == pytest.approx(two.metric("concepts/way/strength"), abs=1e-4)


def test_probes_reach_the_concept_they_name():
    trainer = shaped(way(), Concept("goblin", Regex("goblin")), Concept("dog", Regex("dog"), "hold"))
    train(trainer)
    bias = trainer._shaping.hold.bias
    assert bias.tolist() == [0, 0]
    trainer._shaping.correct({"dog": (0.5, 0.01), "goblin": (9.0, 0.01), "elsewhere": (9.0, 0.01)})
    bias = trainer._shaping.hold.bias
    assert bias[0] == 0 < bias[1]
    shaped(Concept("goblin", Regex("goblin")))._shaping.correct(
        {"goblin": (9.0, 0.01)}
    )  # nothing is held: nothing happens
