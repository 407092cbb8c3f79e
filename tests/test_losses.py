"""What is said of TRL's loss types, against the gradient of TRL's own loss, in float64."""

from __future__ import annotations

import pytest
import torch
from trl import DPOTrainer

from shapedpo.losses import DPO_LIKE_LOSSES, NORMALISED_LOSSES, SORTING_LOSSES, pull_at_start
from tests.helpers import arguments, build


BETA, SMOOTHING = 0.3, 0.1
START = torch.zeros(48, dtype=torch.float64)
LOSSES = [
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sigmoid_norm"),
]


@pytest.fixture(scope="module")
def trainer():
    return build(DPOTrainer, arguments(False, beta=BETA, label_smoothing=SMOOTHING, per_device_train_batch_size=24))


def pulls(trainer, loss: str, ratios: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each pair's margin and pull on one batch, `(B,)` each, given the completions' log-ratios, `(2B,)` nats."""
    trainer.loss_types, trainer.precompute_ref_logps = [loss], True
    inputs = next(iter(trainer.get_train_dataloader()))
    mask, seen = inputs["completion_mask"][:, 1:], []

    def policy(**kwargs):
        """The model's output, in float64, with the reference's log-probabilities as far away as is asked for."""
        outputs = trainer.model(**kwargs)
        outputs.log_probs = outputs.log_probs.detach().double().requires_grad_()
        reference = outputs.log_probs.detach().sum(dim=1) - ratios
        inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = reference.chunk(2)
        seen.append(outputs.log_probs)
        return outputs

    value = trainer._compute_loss(policy, inputs, return_outputs=False)
    (gradient,) = torch.autograd.grad(value, seen[0])  # (2B, T - 1): the same for all tokens of a completion
    by_ratio = (gradient * mask).sum(dim=1) / mask.sum(dim=1)
    if loss in NORMALISED_LOSSES:
        ratios, by_ratio = ratios / mask.sum(dim=1), by_ratio * mask.sum(dim=1)
    (chosen, rejected), (by_chosen, by_rejected) = ratios.chunk(2), by_ratio.chunk(2)
    return BETA * (chosen - rejected), -(by_chosen - by_rejected) / 2 * len(chosen) / BETA


@pytest.mark.parametrize("loss", LOSSES)
def test_pull_at_start(trainer, loss):
    _, found = pulls(trainer, loss, START)
    if (expected := pull_at_start(loss, SMOOTHING)) is not None:
        torch.testing.assert_close(
            found, torch.full_like(found, expected / 2), rtol=1e-7, atol=0
        )  # smoothing is float32
    else:  # it depends on lengths or on beta, or pushes the other way
        assert found.std() > 0.1 or found.min() > 5 or found.max() < 0


@pytest.mark.parametrize("loss", LOSSES)
def test_which_pull_as_dpo_at_every_margin(trainer, loss):
    margins, found = pulls(
        trainer, loss, 5 * torch.randn(48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    )
    assert margins.std() > 0.2
    assert torch.allclose(found, torch.sigmoid(-margins), rtol=1e-9, atol=0) == (loss in DPO_LIKE_LOSSES)


@pytest.mark.parametrize("loss", ["hinge", "nca_pair", "apo_down"])
def test_how_others_fade(trainer, loss):
    """As `pull_at_start` says of them, where the rejected answer has gone as far as the chosen one the other way."""
    half = torch.linspace(-1, 12, 24, dtype=torch.float64) / 2 / BETA
    margins, found = pulls(trainer, loss, torch.cat([half, -half]))
    if loss == "hinge":
        assert torch.equal(found.bool(), margins < 1)
        assert found.max().item() == pytest.approx(1.0)
    else:
        back = margins[found < 0]
        assert 1.5 < back.min() < 2.5
        assert (found[margins > 3] < 0).all()


def test_all_of_trls_loss_types_are_here(trainer):
    with pytest.raises(ValueError, match="Unknown loss type") as error:
        pulls(trainer, "nonsense", START)
    named = {name for name in (*LOSSES, "sft") if f"'{name}'" in str(error.value)}
    assert named == {*LOSSES, "sft"}
    assert str(error.value).count("'") == 2 * len(named)
    assert set(SORTING_LOSSES) | set(DPO_LIKE_LOSSES) <= named
