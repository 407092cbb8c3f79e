"""What a run logs of its concepts, against values computed completion by completion, and where it ends up."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback
from trl import DPOTrainer

from shapedpo import Concept, Direction, Gate, Mask, Regex, SAEFeatures, ShapedDPOTrainer, TextFunction
from tests.helpers import (
    RUN_DEPENDENT,
    SAE_HOOK,
    Run,
    arguments,
    build,
    load_model,
    pairs,
    sae_path,
    shaped,
    sides,
    tokenizer,
    train,
    vector,
    watching,
)
from tests.wandb_files import wandb_run


ROWS, BETA = 24, 0.3
CREATIVE = {"creative": [index % 3 > 0 for index in range(ROWS)]}


def length(text: str) -> float:
    return float(len(text))


def readouts() -> dict[str, Any]:
    return {
        "goblin": Regex("goblin"),
        "length": TextFunction(length),
        "max": Direction(vector(1), layer=0),
        "mean": Direction(vector(2), hook_name="model.layers.1.output", pooling="mean"),
        "freq": Direction(vector(3), layer=1, pooling="freq"),
        "features": SAEFeatures(str(sae_path()), [3, 17, 40]),
        "feature mean": SAEFeatures(str(sae_path()), [5, 11], pooling="mean"),
    }


def reward_shaping() -> list[Concept]:
    """Each readout shapes: the logged numbers must be of the unshaped margin all the same."""
    gates = [None, Gate(column="creative"), Gate(concept="goblin")]
    return [
        Concept(name, readout, ("suppress", "amplify")[index % 2], strength=0.5 + index, gate=gates[index % 3])
        for index, (name, readout) in enumerate(readouts().items())
    ]


def pair_weighting() -> list[Concept]:
    methods = ["reweight", Mask(fraction=0.3), "project", Mask(threshold=0.5), "reweight", "watch", "project"]
    return [
        Concept(name, readout)
        if method == "watch"
        else Concept(name, readout, "suppress", method, 1.5 if method == "reweight" else None)
        for method, (name, readout) in zip(methods, readouts().items(), strict=True)
    ]


class Snapshots(TrainerCallback):
    """The policy before each step."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})


@functools.cache
def reference() -> Any:
    return load_model().double().eval()


@functools.cache
def sae() -> Any:
    import sae_lens

    return sae_lens.SAE.load_from_disk(sae_path(), dtype="float64")


class Naive:
    """One completion at a time, in float64, from the model's plain outputs: no batch, no padding, no hooks.

    Args:
        data: Rows as TRL prepares them.
        max_length: Where sequences are cut off.
    """

    def __init__(self, data: Any, max_length: int | None = None) -> None:
        self.sequences = [pair for row in data for pair in sides(row, max_length)]  # chosen, rejected, chosen, ...
        tokens = [len(completion) - (not prompt) for prompt, completion in self.sequences]  # the first is not predicted
        self.empty = torch.tensor(tokens).view(-1, 2).amin(dim=1) <= 0
        self._deltas: dict[str, Tensor] = {}

    @functools.cached_property
    def reference_logps(self) -> Tensor:
        return self.logps()

    @functools.cached_property
    def hidden(self) -> list[Any]:
        """The reference's hidden states of each sequence."""
        with torch.no_grad():
            run = [reference()(torch.tensor([p + c]), output_hidden_states=True) for p, c in self.sequences]
        return [output.hidden_states for output in run]

    def logps(self, state: dict[str, Tensor] | None = None) -> Tensor:
        """`(rows, 2)`: log-probabilities of the completions under the reference, or a policy of that state."""
        model = reference()
        if state is not None:
            model = load_model().double().eval()
            model.load_state_dict(state)
        sums = []
        for prompt, completion in self.sequences:
            with torch.no_grad():
                logps = F.log_softmax(model(torch.tensor([prompt + completion])).logits[0], dim=-1)
            start = len(prompt)
            sums.append(sum(float(logps[start + i - 1, token]) for i, token in enumerate(completion) if start + i > 0))
        return torch.tensor(sums, dtype=torch.float64).view(-1, 2)

    def deltas(self, concept: Concept) -> Tensor:
        """`(rows,)`: the concept's standardised deltas."""
        if concept.name not in self._deltas:
            self._deltas[concept.name] = self._computed(concept)
        return self._deltas[concept.name]

    def _computed(self, concept: Concept) -> Tensor:
        raw = torch.stack([self._raw(concept.readout, place) for place in range(len(self.sequences))])
        kept = raw[~self.empty.repeat_interleave(2)]
        scores = ((raw - kept.mean(dim=0)) / kept.std(dim=0)).mean(dim=1).view(-1, 2)
        return torch.where(self.empty, 0.0, scores[:, 0] - scores[:, 1])

    def _raw(self, readout: Any, place: int) -> Tensor:
        prompt, completion = self.sequences[place]
        if isinstance(readout, Regex | TextFunction):
            text = tokenizer().decode(completion, skip_special_tokens=True)
            score = readout.function(text) if isinstance(readout, TextFunction) else float(readout.pattern in text)
            return torch.tensor([score], dtype=torch.float64)
        with torch.no_grad():
            hidden = self.hidden[place]
            if isinstance(readout, Direction):
                layer = 1 if readout.layer is None else readout.layer
                values = hidden[layer + 1][0] @ readout.vector.double()[:, None]
            else:
                layer = int(SAE_HOOK.split(".")[1])
                values = sae().encode(hidden[layer + 1][0])[:, list(readout.features)]
        values = values[max(len(prompt), 1) :]  # the very first token is never read
        if not len(values):
            return torch.zeros(values.shape[1], dtype=torch.float64)
        if readout.pooling == "max":
            return values.amax(dim=0)
        return (values if readout.pooling == "mean" else (values > 0).double()).mean(dim=0)


def expected(naive: Naive, concepts: list[Concept], state: dict[str, Tensor]) -> dict[str, float]:
    """The metrics of a step over all rows, by their definitions."""
    logps = naive.logps(state)
    ratio = logps - naive.reference_logps
    apart = ratio[:, 0] - ratio[:, 1]
    push = torch.sigmoid(-BETA * apart)
    metrics = {
        "logps/chosen": logps[:, 0].mean(),
        "logps/rejected": logps[:, 1].mean(),
        "rewards/chosen": BETA * ratio[:, 0].mean(),
        "rewards/rejected": BETA * ratio[:, 1].mean(),
        "rewards/margins": BETA * apart.mean(),
        "rewards/accuracies": (apart > 0).double().mean(),
    }
    for concept in concepts:
        delta = naive.deltas(concept)
        metrics |= {
            f"concepts/{concept.name}/amplification": (apart * delta).mean() / 4,
            f"concepts/{concept.name}/pressure": (push * delta).mean(),
            f"concepts/{concept.name}/delta": delta.mean(),
        }
    return {name: float(value) for name, value in metrics.items()}


def with_empty_completions() -> Dataset:
    """A prompt without tokens leaves a completion of one token nothing that is predicted."""
    empty = {"prompt": "", "chosen": "apple goblin", "rejected": ""}
    rows = [empty if index in (3, 11) else row for index, row in enumerate(pairs(ROWS))]
    return Dataset.from_list(rows).add_column("creative", CREATIVE["creative"])


def assert_logged(run: Run, snapshots: Snapshots, concepts: list[Concept], max_length: int | None = None) -> None:
    naive = Naive(run.trainer.train_dataset, max_length)
    assert len(run.steps) == len(snapshots.states) == 3
    for index, (logged, state) in enumerate(zip(run.steps, snapshots.states, strict=True)):
        values = expected(naive, concepts, state)
        if index == 0:
            assert logged["rewards/chosen"] == logged["rewards/rejected"] == logged["rewards/margins"] == 0
            assert logged["rewards/accuracies"] == 0
            del values["rewards/accuracies"]  # in float32 and float64 the policy is the reference but for rounding
        for name, value in values.items():
            assert logged[name] == pytest.approx(value, abs=2e-5, rel=2e-4), f"{name} at step {index + 1}"
    # Nothing above is a comparison of zeros.
    assert all(abs(run.metric(f"concepts/{concept.name}/amplification")[2]) > 1e-4 for concept in concepts)


class TestNumbers:
    @pytest.mark.parametrize("concepts", [reward_shaping, pair_weighting])
    @pytest.mark.parametrize(
        ("data", "max_length"),
        [(lambda: pairs(ROWS, **CREATIVE), None), (lambda: pairs(ROWS, **CREATIVE), 9), (with_empty_completions, None)],
        ids=["whole", "truncated", "empty"],
    )
    def test_by_hand(self, concepts, data, max_length):
        snapshots = Snapshots()
        trainer = shaped(
            *concepts(),
            data=data(),
            trainer={"callbacks": [snapshots]},
            per_device_train_batch_size=ROWS,
            beta=BETA,
            max_length=max_length,
        )
        run = train(trainer)
        assert_logged(run, snapshots, concepts(), max_length)
        rows = trainer.train_dataset
        assert len(rows) == ROWS
        empties = int(Naive(rows, max_length).empty.sum())
        assert empties == (2 if data is with_empty_completions else 0)
        assert run.metric("concepts/empty_pairs") == [empties, 2 * empties, 3 * empties]

    def test_batches_and_accumulation(self):
        """Means over all rows of a step, however they are divided."""
        snapshots = Snapshots()
        trainer = shaped(
            *reward_shaping(),
            data=pairs(ROWS, **CREATIVE),
            trainer={"callbacks": [snapshots]},
            per_device_train_batch_size=ROWS // 4,
            gradient_accumulation_steps=4,
            beta=BETA,
        )
        assert_logged(train(trainer), snapshots, reward_shaping())

    def test_mean_over_logged_steps(self):
        run, whole = (
            train(shaped(*watching(), logging_steps=logging_steps, per_device_train_batch_size=6))
            for logging_steps in (1, 3)
        )
        (logged,) = whole.steps
        for name in (name for name in logged if name.startswith("concepts/") and name != "concepts/empty_pairs"):
            assert logged[name] == pytest.approx(sum(run.metric(name)) / 3), name

    def test_strength(self):
        run = train(shaped(*reward_shaping(), *[Concept("seen", Regex("fox"))], data=pairs(**CREATIVE)))
        for concept in reward_shaping():
            assert run.metric(f"concepts/{concept.name}/strength") == [concept.strength] * 3
        assert run.metric("concepts/seen/strength") == [0.0] * 3

    def test_pair_weight(self):
        """The mean weight in force; over the data that calibrated it, `reweight` has a mean of 1."""
        concept = Concept("length", TextFunction(length), "suppress", "reweight", strength=1.0)
        run = train(shaped(concept, per_device_train_batch_size=ROWS))
        assert run.metric("concepts/pair_weight") == pytest.approx([1.0] * 3, abs=1e-5)
        mask = Concept("length", TextFunction(length), "suppress", Mask(fraction=0.25))
        run = train(shaped(mask, per_device_train_batch_size=ROWS))
        assert run.metric("concepts/pair_weight") == pytest.approx([0.75] * 3, abs=0.05)
        assert "concepts/pair_weight" not in train(shaped(*watching())).steps[0]


class TestEvaluation:
    def test_is_plain_while_training_is_shaped(self):
        """On the same weights: the plain trainer evaluates what the shaped one has trained."""
        data = {"train_dataset": pairs(**CREATIVE), "eval_dataset": pairs(8, seed=1, creative=[True, False] * 4)}
        snapshots = Snapshots()
        args = arguments(concepts=reward_shaping(), eval_strategy="steps", eval_steps=2, beta=BETA)
        run = train(build(ShapedDPOTrainer, args, callbacks=[snapshots], **data))
        evaluated = next(entry for entry in run.history if "eval_loss" in entry)
        assert evaluated["step"] == 2

        plain = build(DPOTrainer, arguments(False, beta=BETA), **data)
        plain.model.load_state_dict(snapshots.states[2])
        for name, value in plain.evaluate().items():
            if not any(part in name for part in (*RUN_DEPENDENT, "preparation_time", "num_tokens", "epoch")):
                assert evaluated[name] == value, name
        naive = Naive(run.trainer.eval_dataset)
        ratio = naive.logps(snapshots.states[2]) - naive.logps()
        loss = -F.logsigmoid(BETA * (ratio[:, 0] - ratio[:, 1])).mean()
        assert evaluated["eval_loss"] == pytest.approx(float(loss), abs=1e-5)
        assert "eval_concepts/goblin/amplification" in evaluated
        assert "eval_concepts/pair_weight" not in evaluated

        unshaped = train(build(DPOTrainer, arguments(False, beta=BETA), **data))
        assert all(abs(run.metric("loss")[i] - unshaped.metric("loss")[i]) > 1e-3 for i in range(3))

    def test_a_weight_column_does_not_weight_evaluation(self):
        """Nor need the evaluation data have one, or the columns of gates."""
        data = {"train_dataset": pairs(weight=[0.25] * ROWS, **CREATIVE), "eval_dataset": pairs(8, seed=1)}
        trainer = build(ShapedDPOTrainer, arguments(concepts=reward_shaping()[:2]), **data)
        plain = build(DPOTrainer, arguments(False), **data)
        assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


class TestTrackers:
    def test_history_and_console(self, capsys):
        run = train(shaped(*watching()))
        names = {f"concepts/{name}/{what}" for name in ("goblin", "way", "features") for what in METRICS}
        assert all(names < entry.keys() for entry in run.steps)
        assert len(run.steps) == 3
        printed = capsys.readouterr().out
        assert all(name in printed for name in names)

    def test_wandb_offline(self, tmp_path, monkeypatch):
        """The real library writes a run folder without a network, and what it wrote is read back."""
        import wandb

        wandb.teardown()  # it reads its environment once in a process, unless told to forget it
        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.setenv("WANDB_DIR", str(tmp_path))
        monkeypatch.setenv("WANDB_SILENT", "true")
        concepts = [Concept("goblin", Regex("goblin"), "suppress", strength=2.0), *watching()[1:]]
        data = {"eval_dataset": pairs(4, seed=1)}
        try:
            run = train(shaped(*concepts, trainer=data, report_to="wandb", run_name="tiny", eval_strategy="epoch"))
            run.trainer.evaluate()
        finally:
            wandb.finish()
        (folder,) = (tmp_path / "wandb").glob("offline-run-*")
        records = wandb_run(next(folder.glob("run-*.wandb")))

        history = [
            {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for record in records
            if record.WhichOneof("record_type") == "history"
        ]
        steps = [row for row in history if "train/loss" in row]
        assert [row["train/global_step"] for row in steps] == [1, 2, 3]
        for row, entry in zip(steps, run.steps, strict=True):
            ours = {name: value for name, value in entry.items() if name.startswith("concepts/")}
            assert len(ours) == 3 * len(METRICS) + 1
            assert {f"train/{name}": value for name, value in ours.items()}.items() <= row.items()
            assert sum("amplification" in name for name in row) == 3  # once each
        assert any("eval/concepts/goblin/amplification" in row for row in history)

        config = {
            item.key: json.loads(item.value_json)
            for record in records
            for item in (*record.run.config.update, *record.config.update)
        }
        assert config["concepts"] == [concept.to_dict() for concept in concepts]
        assert config["beta"] == 0.1

    def test_tensorboard(self, tmp_path, monkeypatch):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path))
        run = train(shaped(*watching(), report_to="tensorboard"))
        events = EventAccumulator(str(tmp_path))
        events.Reload()
        for name in run.steps[0]:
            if name.startswith("concepts/"):
                written = events.Scalars(f"train/{name}")
                assert [event.step for event in written] == [1, 2, 3]
                assert [event.value for event in written] == pytest.approx(run.metric(name), rel=1e-6), name
        arguments_text = events.Tensors("args/text_summary")[0].tensor_proto.string_val[0].decode()
        assert '"concepts"' in arguments_text
        assert '"pattern": "goblin"' in arguments_text


METRICS = ("amplification", "pressure", "delta", "strength")
