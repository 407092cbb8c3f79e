"""Local stand-ins for the models and data sets that TRL's tests load from the Hugging Face hub.

TRL's tests name repositories such as `trl-internal-testing/tiny-Qwen2ForCausalLM-2.5` and
`trl-internal-testing/zen`. [`build_hub`] writes a Hugging Face cache that holds a repository under each of those
names: random weights of the same architecture in a few thousand parameters, a byte-level tokenizer with a chat
template, and a handful of preference pairs of our own. With `HF_HOME` on that folder and `HF_HUB_OFFLINE=1`,
`from_pretrained` and `load_dataset` find them as they would find a download: no library is patched.

The rows are ours and the weights random, so a figure that a test compares with a constant of TRL's would differ;
what TRL's DPO tests assert (a run ends, parameters move, an error is raised) holds for any of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


ORGANIZATION = "trl-internal-testing"
REVISION = hashlib.sha1(b"shapedpo stand-in").hexdigest()  # the hub's commit ids are sha1 sums too

# Roles, tool calls and the `thinking` field of the harmony data set: everything that TRL's conversational rows hold.
CHAT_TEMPLATE = (
    "{%- if tools %}{{ '<|im_start|>system\\n# Tools\\n' }}"
    "{%- for tool in tools %}{{ tool | tojson + '\\n' }}{%- endfor %}{{ '<|im_end|>\\n' }}{%- endif %}"
    "{%- if model_identity is defined %}{{ '<|im_start|>system\\n' + model_identity + '<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['thinking'] is defined and message['thinking'] %}{{ message['thinking'] + '\\n' }}{%- endif %}"
    "{%- if message['content'] %}{{ message['content'] }}{%- endif %}"
    "{%- if message['tool_calls'] is defined and message['tool_calls'] %}"
    "{%- for call in message['tool_calls'] %}{{ call['function'] | tojson }}{%- endfor %}{%- endif %}"
    "{{ '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)

_TINY = {
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 2048,
}
_MAMBA_HYBRID = {
    **_TINY,
    "hidden_size": 16,
    "layers_block_type": ["mamba", "attention", "moe"],
    "mamba_num_heads": 8,
    "mamba_head_dim": 4,
    "n_groups": 1,
    "ssm_state_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
}
_MAMBA_HYBRID.pop("num_hidden_layers")

# Hub name (without the organisation) -> transformers' configuration class, and what differs from its defaults.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny-Qwen2ForCausalLM-2.5": ("Qwen2Config", _TINY),
    "tiny-Cohere2ForCausalLM": ("Cohere2Config", {**_TINY, "logit_scale": 1.0}),
    "tiny-Glm4MoeForCausalLM": (
        "Glm4MoeConfig",
        {**_TINY, "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "head_dim": 2},
    ),
    "tiny-GptOssForCausalLM": ("GptOssConfig", {**_TINY, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "tiny-Qwen3MoeForCausalLM": (
        "Qwen3MoeConfig",
        {**_TINY, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 8},
    ),
    "tiny-NemotronHForCausalLM-nano": ("NemotronHConfig", _MAMBA_HYBRID),
    "tiny-Olmo3ForCausalLM": ("Olmo3Config", _TINY),
    "tiny-Lfm2ForCausalLM": ("Lfm2Config", {**_TINY, "full_attn_idxs": [1], "block_multiple_of": 8}),
    "tiny-Lfm2ForCausalLM-2.5": (
        "Lfm2Config",
        {**_TINY, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    ),
    "tiny-LlamaForCausalLM-3.2": ("LlamaConfig", _TINY),
    "tiny-GPTNeoXForCausalLM": ("GPTNeoXConfig", {k: v for k, v in _TINY.items() if k != "num_key_value_heads"}),
}
REMOTE_MODEL = "tiny-RemoteForCausalLM"

# A configuration and a model that only the remote-code path of transformers can load.
_REMOTE_CODE = {
    "configuration_remote.py": """
from transformers import LlamaConfig


class RemoteConfig(LlamaConfig):
    model_type = "remote"
""",
    "modeling_remote.py": """
from transformers import LlamaForCausalLM

from .configuration_remote import RemoteConfig


class RemoteForCausalLM(LlamaForCausalLM):
    config_class = RemoteConfig
""",
}

_FACTS = [
    ("The sky at noon is", " blue on a clear day.", " made of cheese."),
    ("Bread is baked in", " a hot oven.", " the deep sea."),
    ("A week has", " seven days.", " forty days."),
    ("Rain falls from", " the clouds.", " the floor."),
    ("A triangle has", " three sides.", " nine sides."),
    ("Bees make", " honey.", " gravel and sand."),
    ("Ships sail on", " the sea.", " the moon."),
    ("Snow is", " cold and white.", " a kind of soup."),
    ("Owls hunt", " at night.", " on the telephone."),
    ("A library lends", " books to its readers.", " thunder."),
    ("The sun rises in", " the east.", " the kitchen."),
    ("Ice melts into", " water.", " wood."),
    ("Carrots grow", " under the ground.", " on the roof of the bus."),
    ("A clock shows", " the time.", " the weather of last year, if asked."),
    ("Two and two make", " four.", " eleven."),
    ("Wool comes from", " sheep.", " stones."),
    ("Cats like to", " sleep in the sun.", " file tax returns."),
    ("Maps help to", " find the way.", " boil an egg."),
    ("A violin has", " four strings.", " no sound."),
]
_HELD_OUT = 2  # rows of the `test` split


def _rows(build: Callable[[str, str, str], dict[str, Any]]) -> list[dict[str, Any]]:
    return [build(prompt, chosen, rejected) for prompt, chosen, rejected in _FACTS]


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _assistant(text: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text.strip(), **fields}


def _tool_row(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "look_up", "arguments": {"subject": prompt}}}
    answer = {"role": "tool", "name": "look_up", "content": chosen.strip()}
    # `None` stands for the missing keys: Arrow gives every message of a column the same fields.
    asked = {"role": "assistant", "content": "", "tool_calls": [call]}
    tool = {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Looks a subject up.",
            "parameters": {"type": "object", "properties": {"subject": {"type": "string"}}, "required": ["subject"]},
        },
    }
    return {
        "prompt": [_user(prompt)],
        "chosen": [asked, answer, _assistant(chosen)],
        "rejected": [asked, answer, _assistant(rejected)],
        "tools": json.dumps([tool]),
    }


def _data_sets() -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Rows of every stand-in data set, by hub name and configuration."""
    return {
        ("zen", "standard_preference"): _rows(lambda p, c, r: {"prompt": p, "chosen": c, "rejected": r}),
        ("zen", "standard_implicit_prompt_preference"): _rows(lambda p, c, r: {"chosen": p + c, "rejected": p + r}),
        ("zen", "standard_unpaired_preference"): _rows(lambda p, c, r: {"prompt": p, "completion": c, "label": True}),
        ("zen", "conversational_preference"): _rows(
            lambda p, c, r: {"prompt": [_user(p)], "chosen": [_assistant(c)], "rejected": [_assistant(r)]}
        ),
        ("zen", "conversational_implicit_prompt_preference"): _rows(
            lambda p, c, r: {"chosen": [_user(p), _assistant(c)], "rejected": [_user(p), _assistant(r)]}
        ),
        ("harmony", "preference"): _rows(
            lambda p, c, r: {
                "prompt": [_user(p)],
                "chosen": [_assistant(c, thinking="What is true of it?")],
                "rejected": [_assistant(r, thinking="Anything will do.")],
                "chat_template_kwargs": {"reasoning_effort": "low", "model_identity": "You are a tiny model."},
            }
        ),
        ("toolcall", "preference"): _rows(_tool_row),
    }


def stand_ins() -> set[str]:
    """Hub names that [`build_hub`] provides, organisation included."""
    names = {*MODELS, REMOTE_MODEL, *(name for name, _ in _data_sets())}
    return {f"{ORGANIZATION}/{name}" for name in names}


def _tokenizer(texts: Iterable[str]) -> Any:
    """A byte-level BPE of a few hundred tokens that can write any text, with ChatML marks and [`CHAT_TEMPLATE`]."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=marks, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    raw.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _write_models(hub: Path, tokenizer: Any) -> None:
    import torch
    import transformers

    def snapshot(name: str) -> Path:
        repository = hub / f"models--{ORGANIZATION}--{name}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(REVISION)
        return repository / "snapshots" / REVISION

    def save(config: Any, folder: Path) -> None:
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            # transformers' initialisation (sd 0.02) leaves gradients of order 1e-9 at width 8, which a half-precision
            # run rounds to zero.
            if parameter.dim() > 1:
                torch.nn.init.xavier_uniform_(parameter)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    tokens = {
        "vocab_size": len(tokenizer),
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    for name, (config_class, fields) in MODELS.items():
        if hasattr(transformers, config_class):  # an older transformers lacks some architectures
            save(getattr(transformers, config_class)(**{**fields, **tokens}), snapshot(name))

    folder = snapshot(REMOTE_MODEL)
    save(transformers.LlamaConfig(**_TINY, **tokens), folder)
    for file_name, source in _REMOTE_CODE.items():
        (folder / file_name).write_text(source.lstrip())
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "remote"
    config["architectures"] = ["RemoteForCausalLM"]
    config["auto_map"] = {
        "AutoConfig": "configuration_remote.RemoteConfig",
        "AutoModelForCausalLM": "modeling_remote.RemoteForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _write_data_sets(cache: Path) -> None:
    """Writes the folders that `datasets` leaves after a download, which it reads again when the hub is out of reach."""
    from datasets import Dataset, SplitDict, SplitInfo
    from datasets.arrow_writer import ArrowWriter

    for (name, config), rows in _data_sets().items():
        folder = cache / f"{ORGANIZATION}___{name}" / config / "0.0.0" / REVISION
        folder.mkdir(parents=True)
        splits = SplitDict(dataset_name=name)
        for split, part in (("train", rows[:-_HELD_OUT]), ("test", rows[-_HELD_OUT:])):
            # Dataset.from_list drops nothing: a message without `tool_calls` gets `None`, as in the parquet on the hub.
            dataset = Dataset.from_list(part)
            with ArrowWriter(features=dataset.features, path=str(folder / f"{name}-{split}.arrow")) as writer:
                writer.write_table(dataset.data.table)
                writer.finalize()
            splits.add(SplitInfo(name=split, num_examples=len(part), dataset_name=name))
        info = dataset.info.copy()
        info.builder_name, info.dataset_name, info.config_name, info.version = "parquet", name, config, "0.0.0"
        info.splits = splits
        info.write_to_directory(str(folder))


def build_hub(home: Path) -> dict[str, str]:
    """Builds the stand-ins under `home`, a folder to be used as `HF_HOME`.

    Args:
        home: A folder; created when absent, reused as it is when an earlier call completed it.

    Returns:
        The environment variables under which a new process reads the stand-ins.
    """
    done = home / "stand-ins-complete"
    if not done.exists():
        home.mkdir(parents=True, exist_ok=True)
        texts = [text for fact in _FACTS for text in fact] + [CHAT_TEMPLATE, "system user assistant tool"]
        _write_models(home / "hub", _tokenizer(texts))
        _write_data_sets(home / "datasets")
        done.touch()
    return {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
