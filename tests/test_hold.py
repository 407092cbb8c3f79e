"""A held concept in the trainer: what the controller sees, when it moves, what is logged, and that evaluation is not shaped."""

from __future__ import annotations

import math

import pytest
import torch
from trl import DPOTrainer

from shapedpo import Concept, Direction, Gate, Regex
from shapedpo.calibration import Calibration
from shapedpo.metrics import Pairs
from shapedpo.shapers import ConceptSignal
from shapedpo.shapers.hold import HoldController
from shapedpo.shapers.pair_statistics import RIDGE, presence, typical_size
from shapedpo.shaping import Shaping
from tests.helpers import arguments, build, pairs, shaped, train, vector


def way(**fields) -> Concept:
    return Concept("way", Direction(vector(), layer=1), "hold", **fields)


def test_strength_is_that_of_the_controller():
    """The run's strengths are those that a controller by itself finds on the run's own log-ratios and deltas."""
    trainer = shaped(way(), Concept("goblin", Regex("goblin"), "suppress", strength=2.0))
    controller, seen = trainer._shaping.hold, []
    observe = controller.observe

    def spy(log_ratios, deltas, margins, gates, others):
        assert gates.eq(1).all()
        assert others.shape[1] == 0
        seen.append((log_ratios.clone(), deltas.clone(), margins.clone()))
        observe(log_ratios, deltas, margins, gates, others)

    controller.observe = spy
    run = train(trainer)
    again = HoldController([0.0], trainer.beta)
    again.start(trainer._calibration.deltas[:, :1], trainer._calibration.gates[:, :1])
    for logged, (log_ratios, deltas, margins) in zip(run.metric("concepts/way/strength"), seen, strict=True):
        assert logged == again.strengths.item() != 0
        again.observe(log_ratios, deltas, margins)
        again.update()
    assert run.metric("concepts/goblin/strength") == [2.0] * 3
    # The log-ratios it sees are unshaped: with these the metrics can be made again.
    for (log_ratios, deltas, _), value in zip(seen, run.metric("concepts/way/amplification"), strict=True):
        assert (log_ratios * deltas[:, 0]).mean().item() / 4 == pytest.approx(value, abs=1e-6)


def test_its_pressure_is_what_other_methods_leave_of_it():
    """A pair that a tilt has explained or a weight has silenced is pushed no more, whatever its own margin is."""
    shaping, seen = Shaping([way(), Concept("dog", Regex("dog"), "suppress", strength=2.0)], 0.2), {}
    shaping.hold.observe = lambda log_ratios, deltas, margins, **_: seen.update(ratios=log_ratios, margins=margins)
    draw = torch.Generator().manual_seed(0)
    n = 6
    policy, ref, scores = (torch.randn(2 * n, generator=draw) for _ in range(3))
    signals = [ConceptSignal(s, s[:n] - s[n:], torch.ones(n)) for s in (torch.zeros(2 * n), scores)]
    weights = torch.tensor([1.0, 0.0, 0.5, 1.0, 1.5, 0.25])
    given = Pairs(policy.chunk(2), ref.chunk(2), signals, torch.zeros(2), torch.zeros(n, dtype=torch.bool), weights)
    shaping.observe(given, torch.ones(2 * n, 4), lambda rows: rows, False, shaping.tilt(signals))
    for i in range(n):
        ratio = float(policy[i] - ref[i]) - float(policy[n + i] - ref[n + i])
        pull = float(weights[i]) / (1 + math.exp(0.2 * ratio + 2.0 * float(scores[i] - scores[n + i])))
        assert seen["ratios"][i].item() == pytest.approx(ratio, rel=1e-5)
        assert torch.sigmoid(-seen["margins"][i]).item() == pytest.approx(pull, abs=2e-6)


def test_it_pulls_as_hard_as_the_losses_weigh():
    """With all losses that compare pairs at half their weight, so is what it adds."""
    gradients = []
    for loss in ({}, {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.3, 0.2, 0.0]}):
        trainer = shaped(way(), **loss)
        inputs = next(iter(trainer.get_train_dataloader()))
        trainer.model.train()
        penalties, penalty = [], trainer._shaping.penalty
        trainer._shaping.penalty = lambda *given, of=penalty, to=penalties: to.append(of(*given)) or to[-1]
        for parameter in trainer.model.parameters():
            parameter.data *= 1.05
        trainer.compute_loss(trainer.model, inputs)
        gradients.append(penalties[0].item())
    assert gradients[1] == pytest.approx(0.5 * gradients[0], rel=1e-6)
    assert gradients[0] != 0


@pytest.mark.parametrize("spare", [(), ("cat",)])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("ld_alpha", [None, 0.3])
def test_penalty_against_a_slow_reference(ld_alpha, normalised, spare):
    """What it adds to the loss, and its gradient, token by token; two of the columns are virtual tokens in front."""
    held = [way(gate=Gate(column="creative"), spare=spare), Concept("dog", Regex("dog"), "hold")]
    shaping = Shaping([*held, Concept("cat", Regex("cat"))], 0.2, normalised)
    draw = torch.Generator().manual_seed(0)
    n, length, virtual = 8, 7, 2
    deltas = 2 * torch.randn(n, 2, generator=draw)
    gates = torch.ones(n, 2)
    gates[::2, 0] = 0
    cat = deltas[:, :1] + torch.randn(n, 1, generator=draw)
    shaping.hold.start(deltas, gates, cat if spare else None)
    mask = (torch.arange(length)[None] >= torch.randint(1, length, (2 * n, 1), generator=draw)).long().flip(0)
    mask[:, -2:] *= torch.randint(0, 2, (2 * n, 1), generator=draw)
    log_probs = torch.randn(2 * n, virtual + length - 1, generator=draw, dtype=torch.float64)
    log_probs[:, virtual:] *= mask[:, 1:]
    log_probs[:, :virtual] = 0
    log_probs.requires_grad_()
    ref = torch.randn(2 * n, generator=draw, dtype=torch.float64)
    signals = [ConceptSignal(torch.zeros(2 * n), deltas[:, c], gates[:, c]) for c in range(2)]
    signals.append(ConceptSignal(torch.zeros(2 * n), cat[:, 0], torch.ones(n)))
    pairs_read = Pairs(ref.chunk(2), ref.chunk(2), signals, torch.zeros(2), torch.zeros(n, dtype=torch.bool), None)

    found = shaping.penalty(log_probs, mask, ld_alpha, pairs_read)
    weights, strengths = shaping.hold.weights(deltas * gates).tolist(), shaping.hold.strengths.tolist()
    if spare:  # of the first, on the rows of its gate
        shows = presence(cat.double(), typical_size(cat))[:, 0].tolist()
        gate = gates[:, 0].tolist()
        both = sum(g * x * w[0] for g, x, w in zip(gate, shows, weights, strict=True))
        share = both / sum(g * x * x for g, x in zip(gate, shows, strict=True)) / (1 + RIDGE)
        assert abs(share) > 0.1
        weights = [[w[0] - g * share * x, w[1]] for g, x, w in zip(gate, shows, weights, strict=True)]
    expected, gradient = 0.0, torch.zeros_like(log_probs)
    for i in range(n):
        pull = 0.2 / 4 / n * sum(s * w for s, w in zip(strengths, weights[i], strict=True))
        shared = min(int(mask[i, 1:].sum()), int(mask[n + i, 1:].sum()))
        for row, sign in ((i, 1), (n + i, -1)):
            seen, sign = 0, sign / max(int(mask[row].sum()), 1) if normalised else sign
            expected -= sign * pull * ref[row].item()
            for t in range(1, length):
                seen += int(mask[row, t])
                weight = int(mask[row, t]) * (1.0 if ld_alpha is None or seen <= shared else ld_alpha)
                expected += sign * pull * weight * log_probs[row, virtual + t - 1].item()
                gradient[row, virtual + t - 1] = sign * pull * weight
    assert found.item() == pytest.approx(expected, rel=1e-4)
    found.backward()
    torch.testing.assert_close(log_probs.grad, gradient, rtol=1e-4, atol=1e-7)


def test_what_is_spared_reaches_the_controller():
    """By name, wherever it stands in the list, and with the deltas it has whatever the held concept's gate is."""
    data = pairs(creative=[index % 2 == 0 for index in range(24)])
    goblin, dog = Concept("goblin", Regex("goblin")), Concept("dog", Regex("dog"), "hold")
    trainer = shaped(goblin, dog, way(spare=["goblin"], gate=Gate(column="creative")), data=data)
    train(trainer)
    state, calibration = trainer._shaping.hold.state(), trainer._calibration
    assert trainer._shaping.spared == [0]
    assert state["others"].shape == (len(state["deltas"]), 1)
    assert sorted(set(state["others"][:, 0].tolist())) == pytest.approx(
        sorted(set(calibration.deltas[:, 0].tolist())), abs=1e-6
    )
    assert state["shared"][0, 0] == 0 != state["shared"][0, 1]
    again = shaped(goblin, dog, way(spare=["goblin"], gate=Gate(column="creative")), data=data)
    again._take_over(calibration._replace(hold=state))
    assert torch.equal(again._shaping.hold.strengths, trainer._shaping.hold.strengths)


def test_nothing_of_its_own_is_warned_of():
    calibration = Calibration(None, torch.randn(50, 1).repeat(1, 2), torch.ones(50, 2), torch.zeros(2))
    shaping = Shaping([way(spare=["twin"]), Concept("twin", Direction(vector(), layer=1))], 0.1)
    (warning,) = shaping.start(calibration)
    assert "Concept 'way': 0.0% of what its pairs show is not shared with twin" in warning
    assert Shaping([way(), Concept("twin", Direction(vector(), layer=1))], 0.1).start(calibration) == []


def test_nothing_held_adds_nothing():
    assert (
        Shaping([Concept("goblin", Regex("goblin"))], 0.1).penalty(torch.zeros(2, 3), torch.ones(2, 4), None, None)
        is None
    )


def test_the_loss_is_dpos_and_the_penalty():
    """Of one batch, with the strengths and without: the rewards stay, and the loss differs by the penalty."""
    trainer, added = shaped(way()), []
    controller, penalty = trainer._shaping.hold, trainer._shaping.penalty
    trainer._shaping.penalty = lambda *given: added.append(penalty(*given)) or added[-1]
    inputs = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    for parameter in trainer.model.parameters():  # away from the reference, where nothing has been amplified
        parameter.data *= 1.05
    controller.update = lambda: None
    losses, margins = [], []
    for strength in (None, 0.0):
        batch = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
        if strength is not None:
            controller.strengths = torch.zeros(1, dtype=torch.float64)
        losses.append(trainer.compute_loss(trainer.model, batch).item())
        margins.append(trainer._metrics["train"]["rewards/margins"][-1])
    assert abs(added[0].item()) > 0 == added[1].item()
    assert losses[0] - losses[1] == pytest.approx(added[0].item(), rel=1e-3, abs=1e-7)
    assert margins[0] == margins[1]


def test_moves_once_an_optimizer_step():
    trainer = shaped(way(), gradient_accumulation_steps=3, per_device_train_batch_size=2)
    controller, calls = trainer._shaping.hold, []
    observe, update = controller.observe, controller.update
    controller.observe = lambda *batch, **more: (calls.append("observe"), observe(*batch, **more))
    controller.update = lambda: (calls.append("update"), update())
    train(trainer)
    assert calls == ["observe", "observe", "observe", "update"] * 3


def test_the_gate_is_all_it_sees():
    """Outside the gate a pair neither counts nor is shaped."""
    data = pairs(creative=[index % 2 == 0 for index in range(24)])
    trainer = shaped(way(gate=Gate(column="creative")), data=data)
    controller, seen = trainer._shaping.hold, []
    observe = controller.observe

    def spy(log_ratios, deltas, margins, gates, others):
        seen.append(torch.cat([deltas, gates], dim=1))
        observe(log_ratios, deltas, margins, gates, others)

    controller.observe = spy
    train(trainer)
    deltas, gates = torch.cat(seen).T
    assert 0 < int(gates.sum()) < len(gates)
    assert torch.equal(deltas != 0, gates == 1)
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
    hold = trainer._shaping.hold
    assert hold.bias.eq(0).all()
    before = torch.randn(40, 8, 3, generator=torch.Generator().manual_seed(0))
    now = before[:, :2] + torch.tensor([0.0, 9.0, 9.0])
    gates = torch.tensor([torch.nan, 1.0, 1.0]).expand(40, 3)  # nothing is known of the first
    trainer._shaping.correct(now, before, gates)
    assert hold.bias[0] == 0 < hold.bias[1]
    shaped(Concept("goblin", Regex("goblin")))._shaping.correct(now, before, gates)  # nothing is held: nothing happens
