"""What a run is asked to watch, from its arguments."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from trl.trainer.utils import get_config_model_id

from ..concept import Concept
from ..readouts import ActivationReader, LabTrait, SAEFeatures
from .records import Record, plain


if TYPE_CHECKING:
    from .access import TrainerAccess


class MonitorSettings(NamedTuple):
    """What to watch: see the fields of [`ShapedDPOConfig`].

    Attributes:
        window: Pairs that the running estimates reach back.
        n_features: How many features of the SAE are watched, `None` for all.
        sae: What to call the SAE.
        labels: File of feature labels.
        texts: Whether records quote pairs, prompts and rollouts.
        probe_steps: Steps between probes, 0 for none.
        probe_prompts: Prompts of a probe.
        probe_tokens: Where a rollout is cut.
    """

    window: int = 1024
    n_features: int | None = None
    sae: str | None = None
    labels: str | None = None
    texts: bool = True
    probe_steps: int = 0
    probe_prompts: int = 64
    probe_tokens: int = 128


def monitor_settings(
    args: Any, concepts: Sequence[Concept], keeps_reference: bool
) -> tuple[MonitorSettings, SAEFeatures | None]:
    """What the trainer's arguments ask for, and the SAE whose features are to be watched, if any are.

    Args:
        args: `ShapedDPOConfig`, or a plain `DPOConfig`, which asks for nothing.
        concepts: The concepts, whose SAE is watched if the arguments name none.
        keeps_reference: Whether there is a reference during training even with precomputed log-probabilities.

    Raises:
        ValueError: If features are asked for and no SAE is named, or several are, or there is no reference to read with.
    """
    fields = MonitorSettings(
        window=getattr(args, "monitor_window", 1024),
        labels=getattr(args, "feature_labels", None),
        texts=getattr(args, "monitor_texts", True),
        probe_steps=getattr(args, "probe_steps", 0),
        probe_prompts=getattr(args, "probe_prompts", 64),
        probe_tokens=getattr(args, "probe_max_new_tokens", 128),
    )
    if fields.probe_steps and args.precompute_ref_log_probs and not keeps_reference:
        raise ValueError(
            f"`probe_steps={fields.probe_steps}` reads rollouts with the reference, and with `precompute_ref_log_probs=True` it is not "
            "kept. Pass a `ref_model`, train a PEFT adapter, or set one of the two to 0 or false."
        )
    monitor = getattr(args, "monitor", None)
    if monitor is None:
        return fields, None
    if args.precompute_ref_log_probs:
        raise ValueError(
            f"`monitor={monitor!r}` reads an SAE's features in the reference pass of each step, and with "
            "`precompute_ref_log_probs=True` there is none. Set one of the two to false or leave `monitor` out; named "
            "concepts are read either way."
        )
    readout = _monitored(args, concepts)
    sae = readout.sae if readout.sae_id is None else f"{readout.sae} {readout.sae_id}"
    return fields._replace(n_features=None if monitor == "all" else int(monitor), sae=sae), readout


def _monitored(args: Any, concepts: Sequence[Concept]) -> SAEFeatures:
    found: list[SAEFeatures] = []  # the concepts'
    for concept in concepts:
        readout = concept.readout.features() if isinstance(concept.readout, LabTrait) else concept.readout
        if isinstance(readout, SAEFeatures):
            readout = dataclasses.replace(readout, features="all", pooling="max")
            found += [readout] if readout not in found else []
    if args.monitor_sae is not None:
        named = args.monitor_sae, args.monitor_sae_id
        dtypes = {readout.dtype for readout in found if (readout.sae, readout.sae_id) == named}
        dtype = args.monitor_sae_dtype or (dtypes.pop() if len(dtypes) == 1 else "float32")
        return SAEFeatures(named[0], "all", sae_id=named[1], dtype=dtype)
    if len(found) != 1:
        why = (
            "no concept names an SAE"
            if not found
            else f"the concepts name {len(found)} ({', '.join(r.sae for r in found)})"
        )
        raise ValueError(
            f"`monitor={args.monitor!r}` asks for the features of an SAE, but {why}. Name it in `monitor_sae` (and `monitor_sae_id`)."
        )
    return found[0]


def run_record(
    run: TrainerAccess, settings: MonitorSettings, reader: ActivationReader | None, state: Any, batch: int
) -> Record:
    """The record of what was asked.

    Args:
        run: The trainer, calibrated.
        settings: What is watched.
        reader: Of the monitored features.
        state: The trainer's state.
        batch: Pairs of an optimiser step.
    """
    thresholds = run.calibration.thresholds.tolist()
    concepts = []
    for concept, threshold in zip(run.concepts, thresholds, strict=True):
        data = {"method": None, "strength": None, "gate": None, **concept.to_dict()}
        concepts.append({**data, "label": concept.name, "threshold": plain(threshold)})
    return {
        "type": "run",
        "version": 1,
        "step": state.global_step,
        "run_name": run.args.run_name,
        "model": get_config_model_id(run.accelerator.unwrap_model(run.reference).config),
        "concepts": concepts,
        "settings": {
            "beta": run.args.beta,
            "learning_rate": run.args.learning_rate,
            "loss_type": list(run.args.loss_type),
            "batch": batch,
            "max_steps": state.max_steps,
            "seed": run.args.seed,
            "window": settings.window,
            "monitor": reader.n_features if reader is not None else None,
            "probe_steps": settings.probe_steps or None,
            **({} if settings.texts else {"texts": False}),
        },
        "data": run.source._asdict(),
    }
