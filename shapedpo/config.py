"""The trainer's configuration: TRL's, and the few fields of ours."""

from __future__ import annotations

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
    allow_concept_change: bool = field(
        default=False,
        metadata={"help": "Whether to resume from a checkpoint that was made with other concepts."},
    )

    def __post_init__(self) -> None:
        if isinstance(self.concepts, str) and self.concepts.lstrip().startswith("["):
            self.concepts = json.loads(self.concepts)
        if self.concepts is not None:
            self.concepts = resolve_concepts(self.concepts)
        if self.calibration_size < 2:
            raise ValueError(f"`calibration_size` must be at least 2, got {self.calibration_size}.")
        super().__post_init__()

    def to_dict(self) -> dict[str, Any]:
        """As `DPOConfig.to_dict`, with the concepts as plain data."""
        data = super().to_dict()
        data["concepts"] = _plain(self.concepts)
        return data

    def __getstate__(self) -> dict[str, Any]:
        # `training_args.bin` is a pickle of this: functions and tensors of readouts stay out of it.
        return {**self.__dict__, "concepts": _plain(self.concepts)}


def _plain(concepts: list[Any] | str | None) -> list[Any] | str | None:
    if not isinstance(concepts, list):
        return concepts
    return [concept.to_dict() if isinstance(concept, Concept) else concept for concept in concepts]
