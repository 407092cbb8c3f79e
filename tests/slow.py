"""Objectives written out, one completion at a time, in float64: what the tests of the interventions compare a training step with.

No batch, no padding, no TRL: each sequence is run alone, its log-probabilities are read off the full logits, and its hidden states from
`output_hidden_states`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F

from tests.helpers import arguments, build, load_model, pairs


BETA = 0.3
CHECKPOINTING = {
    "plain": {},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
}

SOME_FORWARDS = [(False, "plain"), (True, "reentrant")]
"""Whether there is an adapter, and how activations are kept: the plainest, and the one where most can go wrong."""
EVERY_FORWARD = [
    *SOME_FORWARDS,
    (True, "plain"),
    (False, "checkpointing"),
    (True, "checkpointing"),
    (False, "reentrant"),
]


def moved(seed: int = 1) -> Any:
    """A policy that is not the reference any more, in float64."""
    model = load_model().double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def trainer_of(*concepts: Any, data: Any = None, peft: bool = False, **fields: Any) -> Any:
    """Our trainer in float64, whose batch is all of the data."""
    from peft import LoraConfig

    from shapedpo import ShapedDPOTrainer

    data = pairs(8) if data is None else data
    args = arguments(concepts=list(concepts), per_device_train_batch_size=len(data), beta=BETA, **fields)
    if peft:
        torch.manual_seed(3)
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
        options = {"model": load_model().double(), "peft_config": lora}
    else:
        options = {"model": moved(), "ref_model": load_model().double()}
    return build(ShapedDPOTrainer, args, train_dataset=data, **options)


class Slow:
    """The data of a trainer of `trainer_of`, its policy and its reference, one completion at a time.

    Sequences are numbered as in a batch: those of the chosen completions first.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        rows = [trainer.train_dataset[index] for index in range(len(trainer.train_dataset))]
        self.rows = rows
        self.prompts = [row["prompt_ids"] for row in rows] * 2
        self.completions = [row["chosen_ids"] for row in rows] + [row["rejected_ids"] for row in rows]
        trainer.model.eval()  # without gradient checkpointing
        self.layers = trainer.model.get_base_model().model.layers if self.peft else trainer.model.model.layers
        self.ref_layers = self.layers if self.peft else trainer.ref_model.model.layers

    @property
    def peft(self) -> bool:
        return self.trainer.ref_model is None

    @property
    def parameters(self) -> dict[str, torch.Tensor]:
        return {name: p for name, p in self.trainer.model.named_parameters() if p.requires_grad}

    def policy(self, ids: Sequence[int]) -> Any:
        return self.trainer.model(torch.tensor([list(ids)]), output_hidden_states=True)

    @torch.no_grad()
    def reference(self, ids: Sequence[int]) -> Any:
        with self.trainer.model.disable_adapter() if self.peft else nullcontext():
            model = self.trainer.model if self.peft else self.trainer.ref_model
            return model(torch.tensor([list(ids)]), output_hidden_states=True)

    def token_logps(
        self, run: Callable[[list[int]], Any], prompts: Sequence[list[int]] | None = None
    ) -> list[torch.Tensor]:
        """For each completion the log-probability of each of its tokens."""
        found = []
        for prompt, completion in zip(prompts or self.prompts, self.completions, strict=True):
            log_p = torch.log_softmax(run(prompt + completion).logits[0], dim=-1)
            found.append(torch.stack([log_p[len(prompt) + k - 1, token] for k, token in enumerate(completion)]))
        return found

    def logps(self, run: Callable[[list[int]], Any], prompts: Sequence[list[int]] | None = None) -> torch.Tensor:
        """`(2B,)`, of the completions."""
        return torch.stack([tokens.sum() for tokens in self.token_logps(run, prompts)])

    def token_scores(self, vector: torch.Tensor, layer: int) -> list[torch.Tensor]:
        """For each completion the projection of each token's hidden state, after a layer of the reference, on a unit vector."""
        unit = F.normalize(vector.double(), dim=0)
        return [
            self.reference(prompt + completion).hidden_states[layer + 1][0, len(prompt) :] @ unit
            for prompt, completion in zip(self.prompts, self.completions, strict=True)
        ]

    def loss(self, policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        """DPO's, of `(2B,)` log-probabilities each."""
        chosen, rejected = (policy - reference).chunk(2)
        return -F.logsigmoid(BETA * (chosen - rejected)).mean()

    def assert_step(self, objective: torch.Tensor, tolerance: float = 1e-5) -> float:
        """Make the trainer's step on all of the data: its gradient, and its loss, are the objective's.

        The scores of concepts are float32, and so is the tolerance.
        """
        names, parameters = zip(*self.parameters.items(), strict=True)
        expected = torch.autograd.grad(objective, parameters)
        scale = max(float(g.abs().max()) for g in expected)
        assert 1e-5 < scale < 1e4, f"the largest gradient is {scale}: the test says nothing"
        loss = self.step()
        for name, value in zip(names, expected, strict=True):
            found = self.parameters[name].grad
            torch.testing.assert_close(found, value, rtol=tolerance, atol=tolerance * scale, msg=name)
        torch.testing.assert_close(loss.double(), objective.detach(), rtol=tolerance, atol=tolerance)
        return scale

    def step(self) -> torch.Tensor:
        """Make the trainer's step, up to the optimiser's."""
        trainer = self.trainer
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        if trainer.args.gradient_checkpointing:
            trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
        return trainer.training_step(trainer.model, trainer.data_collator(self.rows))


def standardise(raw: Sequence[Any]) -> torch.Tensor:
    """Over the calibration sample, which is all of the data."""
    values = torch.tensor([float(value) for value in raw], dtype=torch.float64)
    return (values - values.mean()) / values.std()
