"""Projection in parameter space, against gradients projected one by one, in float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from shapedpo import Concept, Direction, Gate, Project
from shapedpo.parameter_projection import check_parameter_projection
from tests.helpers import pairs, shaped, train, vector
from tests.slow import CHECKPOINTING, Slow, standardise, trainer_of


def way(seed, gate=None):
    return Concept(f"way{seed}", Direction(vector(seed), layer=1), "suppress", Project("parameters"), gate=gate)


def gradients(slow, objective):
    found = torch.autograd.grad(objective, list(slow.parameters.values()), retain_graph=True)
    return torch.cat([part.flatten() for part in found])


def concept_gradient(slow, seed, gate=1.0):
    chosen, rejected = standardise([tokens.max() for tokens in slow.token_scores(vector(seed), 1)]).chunk(2)
    ahead, behind = slow.logps(slow.policy).chunk(2)
    return gradients(slow, ((chosen - rejected) * gate * (ahead - behind)).sum() / 2)


def assert_step(slow, expected):
    loss = slow.step()
    found = torch.cat([p.grad.flatten() for p in slow.parameters.values()])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    return loss


@pytest.mark.parametrize(("peft", "checkpointing"), [(False, "plain"), (True, "plain"), (True, "checkpointing")])
def test_what_would_raise_the_concept_is_taken_out(peft, checkpointing):
    """Of several concepts, only of those that the step would raise."""
    seeds = [1, 4, 3]
    slow = Slow(trainer_of(*map(way, seeds), peft=peft, **CHECKPOINTING[checkpointing]))
    loss = slow.loss(slow.logps(slow.policy), slow.logps(slow.reference))
    step = gradients(slow, loss)
    concepts = [concept_gradient(slow, seed) for seed in seeds]
    raised = [v for v in concepts if step @ v < 0]
    shares = [max(0.0, float(-(step @ v) / step.norm() / v.norm())) for v in concepts]
    assert 0 < len(raised) < len(concepts)
    span = torch.stack(raised, dim=1)
    expected = step - span @ torch.linalg.lstsq(span, step[:, None]).solution[:, 0]
    assert (span.T @ expected).abs().max() < 1e-9 * step.norm() * span.norm()
    assert float(assert_step(slow, expected)) == pytest.approx(float(loss), rel=1e-5)  # the loss stays DPO's
    logged = slow.trainer._metrics["train"]
    for seed, share in zip(seeds, shares, strict=True):
        assert logged[f"concepts/way{seed}/projected"] == [pytest.approx(share, abs=1e-5)]


def test_beside_a_projection_in_pair_space_within_a_gate():
    """Each sees the loss's gradient, and not the other's concept."""
    data = pairs(8, fruity=[index % 2 == 0 for index in range(8)])
    pair = Concept("pair", Direction(vector(7), layer=0), "suppress", "project")
    seeds = [1, 4, 3]
    slow = Slow(trainer_of(pair, *(way(seed, Gate(column="fruity")) for seed in seeds), data=data))
    logps = slow.logps(slow.policy)
    loss = slow.loss(logps, slow.logps(slow.reference))
    to_chosen, to_rejected = torch.autograd.grad(loss, logps, retain_graph=True)[0].chunk(2)
    coefficient = (to_rejected - to_chosen) / 2
    chosen, rejected = standardise([tokens.max() for tokens in slow.token_scores(vector(7), 0)]).chunk(2)
    delta = chosen - rejected
    excess = delta * (delta @ coefficient) / (delta @ delta)
    ahead, behind = logps.chunk(2)
    step = gradients(slow, loss + (excess * (ahead - behind)).sum())
    gate = torch.tensor([float(index % 2 == 0) for index in range(8)])
    concepts = [concept_gradient(slow, seed, gate) for seed in seeds]
    raised = [v for v in concepts if step @ v < 0]
    assert raised
    span = torch.stack(raised, dim=1)
    assert_step(slow, step - span @ torch.linalg.lstsq(span, step[:, None]).solution[:, 0])


def test_batches_of_a_step_count_together():
    """Accumulated, the step is that of one large batch."""
    runs = [
        train(shaped(way(1), way(4), per_device_train_batch_size=size, gradient_accumulation_steps=8 // size))
        for size in (8, 4)
    ]
    assert any(
        value > 0 for value in runs[0].metric("concepts/way1/projected") + runs[0].metric("concepts/way4/projected")
    )
    for name, value in runs[0].parameters.items():
        torch.testing.assert_close(runs[1].parameters[name], value, rtol=0, atol=1e-4, msg=name)


def test_nothing_is_left_of_a_batch_that_failed(monkeypatch):
    """As where `auto_find_batch_size` goes on with smaller ones."""
    slow = Slow(trainer_of(way(1)))

    def short_of_memory(loss, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(slow.trainer.accelerator, "backward", short_of_memory)
    with pytest.raises(RuntimeError, match="out of memory"):
        slow.step()
    assert slow.trainer._parameter_projection.apply(lambda tensor: tensor) == {}


def test_where_the_whole_gradient_is_not_there():
    args = SimpleNamespace(gradient_checkpointing=False, fp16=False)
    with pytest.raises(ValueError, match=r"Concept 'way1': method 'project' in parameter space needs each process"):
        check_parameter_projection([way(1)], args, sharded=True)
    with pytest.raises(ValueError, match="which reentrant gradient checkpointing does not allow"):
        shaped(way(1), **CHECKPOINTING["reentrant"])
    with pytest.raises(ValueError, match="fp16"):
        check_parameter_projection([way(1)], SimpleNamespace(gradient_checkpointing=False, fp16=True), sharded=False)
    with pytest.raises(ValueError, match="in parameter space there are none"):
        Project("parameters", layers=[1])
