"""The runs that must come out the same on any number of processes: what they train, and what is kept of them to compare."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from torch import Tensor

from tests import helpers


GLOBAL_BATCH = 8
MONITOR = {"monitor": "30", "probe_steps": 2, "probe_prompts": 20, "probe_max_new_tokens": 8}
"""Features and rollouts too; more prompts than one process samples at once."""
LORA = {"lora": True}
RUNS: dict[str, dict[str, Any]] = {
    "monitor": MONITOR,
    "lora-accumulation-precompute": LORA | {"gradient_accumulation_steps": 2, "precompute_ref_log_probs": True},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "lora-reentrant": LORA
    | {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
        "ddp_find_unused_parameters": False,  # else DDP refuses, as under TRL's own trainer
    },
    "bf16": {"bf16": True, "optim": "sgd", "learning_rate": 0.1},
    "uneven": {"rows": 45, "max_steps": 6},
    "stream": {"rows": 45, "max_steps": 6, "stream": True, "calibration_size": 32},
    "evaluation": {"evaluation": True, "reference": True, "eval_strategy": "steps", "eval_steps": 1},
    "accumulation": {"gradient_accumulation_steps": 2},
}
"""By name the settings, and what is not a setting of the trainer but of [`build`]."""


def word_length(text: str) -> float:
    """A function of text for a concept: mean length of its words."""
    return len(text.replace(" ", "")) / max(len(text.split()), 1)


def concepts() -> list[Any]:
    """Every method on every kind of readout, each that can be: 26 concepts."""
    from shapedpo import Concept, Direction, Gate, Mask, Project, Regex, SAEFeatures, TextFunction

    sae = str(helpers.sae_path())
    readouts = {
        "sae": lambda i: SAEFeatures(sae, [i, 17 + i], pooling=("max", "mean", "freq")[i % 3]),
        "direction": lambda i: Direction(helpers.vector(i), layer=i % helpers.LAYERS),
        "regex": lambda i: Regex(rf"\b{helpers.WORDS[i]}\b"),
        "function": lambda i: TextFunction("tests.distributed.runs:word_length"),
    }
    methods: dict[str, dict[str, Any]] = {
        "reward": {"action": "suppress", "strength": 0.3, "gate": Gate(column="fruity")},
        "amplified": {"action": "amplify", "strength": 0.2, "gate": Gate(concept="direction-reward")},
        "reweight": {"action": "suppress", "method": "reweight", "strength": 0.2},
        "mask": {"action": "suppress", "method": Mask(fraction=0.1)},
        "project": {"action": "suppress", "method": "project", "gate": Gate(column="fruity")},
        "residual": {"action": "suppress", "method": Project(space="residual")},
        "hold": {"action": "hold", "spare": ["direction-reward"]},
    }
    return [
        Concept(f"{kind}-{method}", readout(index), **fields)
        for kind, readout in readouts.items()
        for index, (method, fields) in enumerate(methods.items())
        if method != "residual" or kind in ("sae", "direction")
    ]


def data(rows: int = 64, seed: int = 0) -> Any:
    """Pairs with a column of weights and one that gates."""
    columns = {"weight": [0.5 + (i % 3) / 2 for i in range(rows)], "fruity": [i % 2 == 0 for i in range(rows)]}
    return helpers.pairs(rows, seed=seed, **columns)


def build(name: str, output: Path, model: Path, dataset: Any, **fields: Any) -> Any:
    """The trainer of a run.

    Args:
        name: Of the run.
        output: Its folder.
        model: The folder of the tiny model.
        dataset: The training data.
        **fields: Further settings.
    """
    from peft import LoraConfig

    settings = {**RUNS[name], **fields}
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    options: dict[str, Any] = {"train_dataset": dataset}
    rows = settings.pop("rows", len(dataset))
    if rows < len(dataset):
        # The last batch is filled up with the first rows again, as accelerate does it on several processes.
        sample = dataset.select(range(rows))
        last = list(range(rows)) + list(range(-rows % GLOBAL_BATCH)) if processes == 1 else list(range(rows))
        options["train_dataset"] = dataset.select(last)
        settings["train_sampling_strategy"] = "sequential"
    if settings.pop("stream", False):
        options["train_dataset"] = options["train_dataset"].to_iterable_dataset()
    if settings.pop("evaluation", False):
        options["eval_dataset"] = data(16, seed=5)
    if settings.pop("reference", False):
        options["ref_model"] = helpers.load_model(model)
    if settings.pop("lora", False):
        options["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    if "monitor" in settings:
        settings["monitor_sae"] = str(helpers.sae_path())
    settings = {"concepts": concepts(), "learning_rate": 1e-3, **settings}
    args = helpers.arguments(
        output_dir=str(output),
        per_device_train_batch_size=GLOBAL_BATCH // processes,
        per_device_eval_batch_size=GLOBAL_BATCH // processes,
        use_cpu=not os.environ.get("RANKS_ON_GPUS"),
        **settings,
    )
    if os.environ.get("ACCELERATE_USE_FSDP") and args.use_cpu:
        # Without a GPU accelerate would fall back to DDP; told that the processes have one each, it shards on their CPUs.
        args.distributed_state.distributed_type = DistributedType.MULTI_GPU
    trainer = helpers.build(recording_trainer(), args, helpers.load_model(model), rows=rows, **options)
    if rows < len(dataset) and "calibration_size" not in settings:
        columns = trainer._calibration_examples(len(dataset))  # prepared; the repeated rows do not count
        trainer._calibration_examples = lambda size: columns[: len(sample)]
    return trainer


def recording_trainer() -> type[Any]:
    """Our trainer, which keeps what went through the shaping of each batch."""
    from shapedpo import ShapedDPOTrainer
    from shapedpo.collator import ROW
    from shapedpo.openings import REF_COLUMNS

    class RecordingTrainer(ShapedDPOTrainer):
        def __init__(self, *args: Any, rows: int, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.rows = rows  # the data's; more than that are repeats
            self.recorded: list[dict[str, Any]] = []

        def _shape(self, outputs: Any, batch: Any) -> None:
            mask = batch.inputs["completion_mask"][:, 1:]
            found: dict[str, Any] = {"step": self.state.global_step, "rows": batch.extras[ROW] % self.rows}
            before = torch.stack([batch.inputs[name] for name in REF_COLUMNS], dim=1)
            outputs.log_probs.register_hook(lambda grad: found.update(a=coefficients(grad, mask)))
            super()._shape(outputs, batch)
            outputs.log_probs.register_hook(lambda grad: found.update(projected=coefficients(grad, mask)))
            signals = batch.pairs.signals
            found["scores"] = torch.stack([s.scores.unflatten(0, (2, -1)).T for s in signals], dim=2)  # (B, 2, C)
            found["gates"] = torch.stack([s.gate for s in signals], dim=1)
            found["offsets"] = before - torch.stack([batch.inputs[name] for name in REF_COLUMNS], dim=1)
            found["weights"] = batch.pairs.weights
            self.recorded.append(found)

    return RecordingTrainer


def coefficients(grad: Tensor, mask: Tensor) -> Tensor:
    """What the loss pushes each pair apart with: `(B,)`, read off the gradient of token log-probabilities."""
    first = mask.float().argmax(dim=1, keepdim=True)
    chosen, rejected = grad[:, -mask.shape[1] :].gather(1, first)[:, 0].double().chunk(2)
    return (rejected - chosen) / 2


def result(trainer: Any) -> dict[str, Any]:
    """What a run came to, plain; all processes together, and the same on all."""
    from accelerate.utils import gather_object

    mine = [{**{k: v.tolist() if isinstance(v, Tensor) else v for k, v in batch.items()}} for batch in trainer.recorded]
    return {
        "history": trainer.state.log_history,
        "states": gather_object([digest(state(trainer))]),
        "held": gather_object([held_once(trainer)]),
        "batches": merged(gather_object([mine])),
        "launched": f"{trainer.accelerator.distributed_type.value} {trainer.accelerator.num_processes}",
    }


def merged(ranks: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Each forward batch of all processes as one, in the rows' order."""
    batches = []
    for parts in zip(*ranks, strict=True):
        rows = [(row, rank, i) for rank, part in enumerate(parts) for i, row in enumerate(part["rows"])]
        batch: dict[str, Any] = {"step": parts[0]["step"]}
        for name in parts[0].keys() - {"step"}:
            batch[name] = [parts[rank][name][i] for _, rank, i in sorted(rows)]
        batches.append(batch)
    return batches


def state(trainer: Any) -> dict[str, Tensor]:
    """All that processes must agree on: standardisation, calibration, and the controller of held concepts."""
    calibration, monitor = trainer._calibration, trainer._monitor
    tensors = {**calibration.statistics._asdict(), "deltas": calibration.deltas, "gates": calibration.gates}
    tensors |= {"thresholds": calibration.thresholds, **trainer._shaping.hold.state()}
    if monitor.features is not None:
        names = ("ids", "mean", "std", "delta")
        tensors |= {f"features.{name}": getattr(monitor.features.statistics, name) for name in names}
    return tensors


def digest(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Hash of each tensor's bytes."""
    return {
        name: hashlib.sha256(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()
        for name, tensor in tensors.items()
    }


def held_once(trainer: Any) -> dict[str, Any]:
    """What this process holds of SAEs and directions: their source's numbers, out of reach of engines and optimisers."""
    readers = [*trainer._reader.readers, trainer._reader.monitored]
    weights = [tensor for reader in readers if reader is not None for tensor in reader_weights(reader)]
    optimiser = trainer.optimizer
    groups = getattr(optimiser, "optimizer", optimiser).param_groups
    optimised = {id(p) for group in groups for p in group["params"]}
    modules = [module for root in (trainer.model, trainer.model_wrapped) for module in root.modules()]
    return {
        "plain": all(type(w) in (Tensor, torch.nn.Parameter) and not hasattr(w, "ds_id") for w in weights),
        "frozen": not any(w.requires_grad or id(w) in optimised for w in weights),
        "outside": not any("sae" in type(module).__name__.lower() for module in modules),
        "elements": sum(w.numel() for w in {id(w): w for w in weights}.values()),
    }


def reader_weights(reader: Any) -> Iterable[Tensor]:
    """The tensors of a reader."""
    sae = getattr(reader, "_sae", None)
    vector = getattr(reader, "_vector", None)
    return list(sae.parameters()) if sae is not None else [vector] if vector is not None else []
