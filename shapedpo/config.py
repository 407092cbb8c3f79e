"""The trainer's configuration: TRL's, and the few fields of ours."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from typing import Any

from trl import DPOConfig

from .concept import Concept, resolve_concepts


@dataclass
class ShapedDPOConfig(DPOConfig):
    r"""Configuration of [`ShapedDPOTrainer`]: every field of [`~trl.DPOConfig`], and these.

    Args:
        concepts (`list[Concept | dict]` or `str`, *optional*):
            What to read and shape: concepts, mappings as YAML has them, or the path of a YAML file (on the command line, a JSON list
            will do too).
        weight_column (`str`, *optional*, defaults to `"weight"`):
            Column of the dataset that scales each pair's loss, if the dataset has it. `None` to use none.
        calibration_size (`int`, *optional*, defaults to `512`):
            Number of pairs on which the reference is read before the first step, to standardise scores. With
            `precompute_ref_log_probs` all pairs are used and nothing is read twice.
        monitor (`"all"` or `int`, *optional*):
            Watch every feature of an SAE beside the concepts, or that many: those that the data pushes most.
        monitor_sae (`str`, *optional*), monitor_sae_id (`str`, *optional*):
            The SAE to watch, as in [`SAEFeatures`], or `"lab"` for the one that ships. By default that of the concepts.
        monitor_sae_dtype (`str`, *optional*):
            Type in which `monitor_sae` is held and computes: `"float32"`, `"bfloat16"` or `"float16"`. By default that of the concepts
            that read the same SAE, which is then held once, or float32.
        monitor_window (`int`, *optional*, defaults to `1024`):
            How many pairs, over all processes, the running estimates reach back: a pair that long ago counts 1/e as much.
        feature_labels (`str`, *optional*):
            File with labels of the SAE's features, JSON or JSON Lines, or an export of Neuronpedia, a file or a folder of them.
        monitor_texts (`bool`, *optional*, defaults to `True`):
            Whether what the run shows (`concepts.jsonl`, `report.html`, W&B) quotes the data: pairs, prompts and rollouts. Without, pairs
            go by their row numbers, and rollouts by their scores. With `push_to_hub`, files of the output folder are uploaded.
        probe_steps (`int`, *optional*, defaults to `0`):
            Sample rollouts every so many steps, and at the start and end, and read them with the reference. 0 for none. The
            prompts are the evaluation data's, or the training data's if there is none. Where a concept is held behind a gate, they correct it
            by the gate's prompts alone: give evaluation data that has enough of them, and the gate's column.
        probe_prompts (`int`, *optional*, defaults to `64`):
            Number of prompts of a probe; each is sampled twice. Where the data has fewer, they are taken again from the first one on.
        probe_max_new_tokens (`int`, *optional*, defaults to `128`):
            Where a rollout is cut.
        allow_concept_change (`bool`, *optional*, defaults to `False`):
            Whether a run may resume from a checkpoint that was made with other concepts.
    """

    # `str` comes second on purpose: the command line's parser takes the second of a union.
    concepts: list[Any] | str | None = field(
        default=None,
        metadata={"help": "Concepts to read and shape: a YAML file, or in a recipe the list itself."},
    )
    weight_column: str | None = field(
        default="weight",
        metadata={"help": "Column of the dataset that scales each pair's loss, used if the dataset has it."},
    )
    calibration_size: int = field(
        default=512,
        metadata={"help": "Number of training pairs on which scores are standardised before the first step."},
    )
    monitor: str | None = field(
        default=None,
        metadata={"help": "Watch the features of an SAE: `all`, or a number, for those that the data pushes most."},
    )
    monitor_sae: str | None = field(
        default=None, metadata={"help": "Folder or release of the SAE to watch; by default that of the concepts."}
    )
    monitor_sae_id: str | None = field(default=None, metadata={"help": "Which SAE of the release `monitor_sae`."})
    monitor_sae_dtype: str | None = field(
        default=None, metadata={"help": "Type of the SAE to watch: float32, bfloat16 or float16."}
    )
    monitor_window: int = field(
        default=1024, metadata={"help": "Number of pairs, over all processes, that running estimates reach back."}
    )
    feature_labels: str | None = field(
        default=None, metadata={"help": "File with labels of features: JSON, JSON Lines or a Neuronpedia export."}
    )
    monitor_texts: bool = field(
        default=True, metadata={"help": "Whether the report, concepts.jsonl and W&B quote pairs, prompts and rollouts."}
    )
    probe_steps: int = field(
        default=0, metadata={"help": "Sample rollouts every so many steps and at start and end; 0 for none."}
    )
    probe_prompts: int = field(default=64, metadata={"help": "Number of prompts of a probe; each is sampled twice."})
    probe_max_new_tokens: int = field(default=128, metadata={"help": "Where a probe's rollout is cut, in tokens."})
    allow_concept_change: bool = field(
        default=False,
        metadata={"help": "Whether to resume from a checkpoint that was made with other concepts."},
    )

    def __post_init__(self) -> None:
        if isinstance(self.concepts, str) and self.concepts.lstrip().startswith("["):
            try:
                self.concepts = json.loads(self.concepts)
            except ValueError as error:
                raise ValueError(
                    f"`concepts` begins as a list does and is no JSON ({error}): {self.concepts[:80]!r}."
                ) from error
        if self.concepts is not None:
            self.concepts = resolve_concepts(self.concepts)
        if self.monitor is not None:
            self.monitor = str(self.monitor)
            if self.monitor != "all" and not (self.monitor.isdecimal() and int(self.monitor) > 0):
                raise ValueError(f"`monitor` must be 'all' or a number of features above 0, got {self.monitor!r}.")
        else:
            for name in ("monitor_sae", "feature_labels"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"`{name}` is given, but `monitor` is not: say 'all', or how many features to watch."
                    )
        for name, least in (
            ("calibration_size", 2),
            ("monitor_window", 2),
            ("probe_steps", 0),
            ("probe_prompts", 2),
            ("probe_max_new_tokens", 1),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"`{name}` must be a whole number of at least {least}, got {value!r}.")
        super().__post_init__()

    def to_dict(self) -> dict[str, Any]:
        """As `DPOConfig.to_dict`, with the concepts as plain data."""
        data = super().to_dict()
        data["concepts"] = _plain(self.concepts)
        return data

    def __copy__(self) -> ShapedDPOConfig:
        new = object.__new__(type(self))  # by `__getstate__` functions would be lost
        new.__dict__.update(self.__dict__)
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> ShapedDPOConfig:
        new = memo[id(self)] = object.__new__(type(self))
        new.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return new

    def __getstate__(self) -> dict[str, Any]:
        # `training_args.bin` is a pickle of this: functions and tensors of readouts stay out of it.
        return {**self.__dict__, "concepts": _plain(self.concepts)}


def _plain(concepts: list[Any] | str | None) -> list[Any] | str | None:
    if not isinstance(concepts, list):
        return concepts
    return [concept.to_dict() if isinstance(concept, Concept) else concept for concept in concepts]
