"""A tiny model, a tiny SAE, a little preference data and short runs: what the tests of the trainer share.

Everything is built in code, once in a process, in a temporary folder that goes with it. Importing this file loads torch and
transformers but neither TRL nor sae-lens; their imports, which take seconds, are in the functions that need them.
"""

from __future__ import annotations

import functools
import gc
import random
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback


HIDDEN, LAYERS, FEATURES = 32, 3, 48
FRUITS = ("apple", "banana", "cherry", "grape", "lemon", "mango")
ANIMALS = ("badger", "cat", "dog", "fox", "goblin", "heron")
WORDS = ("the", "a", "sees", "eats", "likes", "and", "then", "in", "red", "blue", "small", "house", "wood", "sings")
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")

SAE_HOOK = "blocks.1.hook_resid_post"
RUN_DEPENDENT = ("runtime", "per_second")
"""Parts of the names of those metrics that differ from run to run of the same trainer."""

_FOLDER = tempfile.TemporaryDirectory(prefix="shapedpo-tests-")


def folder(name: str) -> Path:
    """A place of that name in the process's temporary folder."""
    return Path(_FOLDER.name) / name


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *WORDS, *FRUITS, *ANIMALS))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


@functools.cache
def model_path() -> Path:
    """A random Llama, saved with its tokenizer: TRL loads the reference from where the policy came from."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer()),
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():  # initial norms are the identity, and all tokens start about equally likely
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder("model"))
    tokenizer().save_pretrained(folder("model"))
    return folder("model")


def load_model(path: Path | None = None) -> LlamaForCausalLM:
    """A fresh copy of the tiny model."""
    return AutoModelForCausalLM.from_pretrained(path or model_path(), dtype=torch.float32)


def save_sae(name: str, d_in: int = HIDDEN, d_sae: int = FEATURES, **metadata: Any) -> Path:
    """A random JumpReLU SAE as sae-lens saves one."""
    import sae_lens

    metadata = {"hook_name": SAE_HOOK, "model_name": "llama-tiny", **metadata}
    sae = sae_lens.SAE.from_dict({"architecture": "jumprelu", "d_in": d_in, "d_sae": d_sae, "metadata": metadata})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    sae.save_model(folder(name))
    return folder(name)


@functools.cache
def sae_path() -> Path:
    """The tiny model's SAE."""
    return save_sae("sae")


@functools.cache
def vector(seed: int = 0) -> torch.Tensor:
    """A direction in the tiny model's residual stream."""
    return torch.randn(HIDDEN, generator=torch.Generator().manual_seed(seed))


def pairs(n: int = 24, seed: int = 0, **columns: Iterable[Any]) -> Dataset:
    """Preference pairs of varied length: chosen answers like fruit, rejected ones animals, goblins in some of either.

    Args:
        n: How many.
        seed: Of the words.
        **columns: Further columns, such as `weight`.
    """
    dice = random.Random(seed)

    def sentence(nouns: tuple[str, ...], low: int, high: int) -> str:
        return " ".join(dice.choice(WORDS if dice.random() < 0.5 else nouns) for _ in range(dice.randint(low, high)))

    rows = [
        {
            "prompt": f"<bos> {sentence(FRUITS + ANIMALS, 2, 6)}",
            "chosen": f" {sentence(FRUITS + ANIMALS[3:], 3, 12)}",
            "rejected": f" {sentence(ANIMALS, 2, 9)}",
        }
        for _ in range(n)
    ]
    data = Dataset.from_list(rows)
    for name, values in columns.items():
        data = data.add_column(name, list(values))
    return data


def watching() -> list[Any]:
    """A concept of every kind of readout, each only watched."""
    from shapedpo import Concept, Direction, Regex, SAEFeatures

    return [
        Concept("goblin", Regex("goblin")),
        Concept("way", Direction(vector(), layer=0, pooling="mean")),
        Concept("features", SAEFeatures(str(sae_path()), features=[3, 17, 40])),
    ]


class Gradients(TrainerCallback):
    """Keeps every step's gradients."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


@dataclass
class Run:
    """What a run leaves behind."""

    trainer: Any
    history: list[dict[str, float]] = field(repr=False)
    gradients: list[dict[str, torch.Tensor]] = field(repr=False)
    parameters: dict[str, torch.Tensor] = field(repr=False)

    @property
    def steps(self) -> list[dict[str, float]]:
        """The log entries of the training steps."""
        return [entry for entry in self.history if "loss" in entry]

    def metric(self, name: str) -> list[float]:
        """A metric at each training step."""
        return [entry[name] for entry in self.steps]


def arguments(ours: bool = True, **fields: Any) -> Any:
    """Settings of a run of three steps on the CPU that leaves nothing behind."""
    from trl import DPOConfig

    from shapedpo import ShapedDPOConfig

    fields = {
        "output_dir": str(folder("out")),
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **fields,
    }
    return (ShapedDPOConfig if ours else DPOConfig)(**fields)


@functools.cache
def set_libraries_aside() -> None:
    """Each run ends with a full garbage collection: without the imported libraries' objects it takes a tenth of the time."""
    gc.collect()
    gc.freeze()


def build(cls: Any, args: Any = None, model: Any = None, **options: Any) -> Any:
    """A trainer of the tiny model on the little data."""
    set_libraries_aside()
    options = {"train_dataset": pairs(), "processing_class": tokenizer(), **options}
    return cls(model=load_model() if model is None else model, args=arguments() if args is None else args, **options)


def shaped(
    *concepts: Any, model: Any = None, data: Any = None, trainer: dict[str, Any] | None = None, **fields: Any
) -> Any:
    """Our trainer with these concepts; further arguments are settings."""
    from shapedpo import ShapedDPOTrainer

    options = {} if data is None else {"train_dataset": data}
    args = arguments(concepts=list(concepts) or None, **fields)
    return build(ShapedDPOTrainer, args, model, **options, **(trainer or {}))


def train(trainer: Any, **options: Any) -> Run:
    """Train and keep what there is to compare."""
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train(**options)
    parameters = {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}
    return Run(trainer, [dict(entry) for entry in trainer.state.log_history], gradients.steps, parameters)


def assert_same(theirs: Run, ours: Run) -> None:
    """Every metric, gradient and parameter of `theirs` is there in `ours`, to the last bit, and what else is there is ours."""
    assert len(theirs.history) == len(ours.history)
    for one, other in zip(theirs.history, ours.history, strict=True):
        for name in one:
            assert name in other, f"{name} is not logged"
            if not any(part in name for part in RUN_DEPENDENT):
                assert one[name] == other[name], f"{name} at step {one['step']}: {one[name]!r} and {other[name]!r}"
        more = [name for name in other.keys() - one.keys() if not name.removeprefix("eval_").startswith("concepts/")]
        assert not more, f"also logged: {more}"
    assert_same_tensors(theirs.gradients, ours.gradients)
    assert_same_tensors([theirs.parameters], [ours.parameters])


def assert_same_tensors(theirs: list[dict[str, torch.Tensor]], ours: list[dict[str, torch.Tensor]]) -> None:
    """Two lists of named tensors are equal, to the last bit."""
    assert len(theirs) == len(ours) > 0
    for one, other in zip(theirs, ours, strict=True):
        assert one.keys() == other.keys()
        assert len(one) > 0
        for name, tensor in one.items():
            assert torch.equal(tensor, other[name]), name


class Forwards:
    """Counts a model's forward passes inside `with`."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.batches: list[int] = []

    def __enter__(self) -> Forwards:
        self._handle = self.model.register_forward_pre_hook(
            lambda module, args, kwargs: self.batches.append(len(kwargs["input_ids"])), with_kwargs=True
        )
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.remove()

    def __len__(self) -> int:
        return len(self.batches)


def sides(example: dict[str, Any], max_length: int | None = None) -> Iterator[tuple[list[int], list[int]]]:
    """A prepared row's two sequences, as prompt and completion tokens, chosen first; cut off at `max_length`."""
    for side in ("chosen", "rejected"):
        prompt, completion = example["prompt_ids"], example[f"{side}_ids"]
        if max_length is not None:
            prompt, completion = prompt[:max_length], completion[: max(max_length - len(prompt), 0)]
        yield prompt, completion
