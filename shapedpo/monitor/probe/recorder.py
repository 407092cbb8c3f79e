"""What a probe comes to: rates, changes, the best estimates of them, and what had been predicted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor

from ...errors import UserError
from ...readouts.base import fingerprint
from ..estimates import Estimates
from ..estimators import Estimate, Past, best_estimate, probe_change, unprobed
from ..posterior import Spectrum
from ..records import TEXT_LENGTH, Record, plain
from ..sae import FeatureMonitor
from .intervals import paired_change, wilson
from .rollouts import DRAWS_BEFORE, Probe, Reading, Readings, Rows
from .tokens import token_activations


if TYPE_CHECKING:
    from ..access import TrainerAccess

SAMPLES = 8
"""Prompts whose rollouts are shown."""
SHOWN = 30
"""Features that a record holds: those that changed most, and those that were predicted to."""


class ProbeRecorder:
    """Probes the model, and makes records of it.

    Args:
        run: The trainer.
        probe: Samples and reads.
        loaded: What [`state`] gave, from a checkpoint; or nothing.
        texts: Whether records quote rollouts.
    """

    def __init__(self, run: TrainerAccess, probe: Probe, loaded: Mapping[str, Tensor], texts: bool) -> None:
        self.run_ = run
        self.probe = probe
        self.texts = texts
        self._before: Readings | None = None
        self._past: np.ndarray | None = None  # (3, F + C): the last estimates, their errors, and amplification then
        if loaded:
            part = {name.removeprefix("probe."): tensor for name, tensor in loaded.items()}
            device = run.accelerator.device
            self._before = Readings(
                part["ids"].to(device),
                part["scores"].to(device),
                part.get("features") if run.accelerator.is_main_process else None,
                part["reference"].to(device),
                part["policy"].to(device),
                part["gates"].to(device) if "gates" in part else None,
            )
            self._past = part["past"].numpy() if "past" in part else None
        self.reads_features = not loaded or "probe.features" in loaded
        """Whether it is known, or still to be found out, what the monitored features were before training."""

    @property
    def told(self) -> dict[str, Any]:
        """What decides the rollouts, with which those of an earlier part of the run can be compared only if it is the same."""
        probe = self.probe
        return {
            "probe_prompts": len(probe.prompts),
            "probe_max_new_tokens": probe.max_new_tokens,
            "prompts": fingerprint(*probe.prompts),
        }

    @property
    def begun(self) -> bool:
        """Whether it is known what the model said before training."""
        return self._before is not None

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps; all of it is on the main process."""
        if self._before is None:
            return {}
        tensors = {f"probe.{name}": tensor for name, tensor in self._before._asdict().items() if tensor is not None}
        return tensors | ({} if self._past is None else {"probe.past": torch.from_numpy(self._past)})

    def run(
        self, step: int, concepts: Estimates, features: Estimates | None, monitor: FeatureMonitor | None
    ) -> tuple[Record, list[int]]:
        """Probe the model; all processes together.

        Args:
            step: The step.
            concepts: The concepts' running estimates.
            features: The monitored features'.
            monitor: Standardises their scores.

        Returns:
            The record, on the main process, and which features are in it, the same on all.
        """

        def read(policy: Any, rows: Rows) -> Reading:
            reading = self.run_.read(policy, rows)
            if monitor is None or reading.features is None:
                return reading._replace(features=None)
            return reading._replace(features=monitor.standardised(reading.features))

        first = self._before is None
        with self.run_.policy() as model:
            now = self.probe.run(model, read, DRAWS_BEFORE if first else 1)
            if not torch.isfinite(now.policy).all():
                raise FloatingPointError(
                    f"At step {step} the policy gives no finite probabilities to its own rollouts: training has diverged. Lower the learning "
                    "rate, and start anew or from a checkpoint before that."
                )
            before = self._before or now
            policy_before = before.policy if first else self.probe.logps(model, before, self.run_.logps)
        if not first:
            self.run_.correct(now, before)
        self._before = before
        samples = self._samples(now) if self.texts else []
        record: Record = {}
        shown: list[int] = []
        if self.run_.accelerator.is_main_process:
            record, shown = self._record(step, now, before, policy_before, concepts, features)
            record["samples"] = samples
        box = [shown]
        broadcast_object_list(box)  # does nothing where there is one process
        return record, box[0]

    def _record(
        self,
        step: int,
        now: Readings,
        before: Readings,
        policy_before: Tensor,
        concepts: Estimates,
        features: Estimates | None,
    ) -> tuple[Record, list[int]]:
        n_features = 0 if now.features is None else now.features.shape[-1]
        alone, alone_se = _changes(now, before)
        parts = [estimates.amplification() for estimates in (features, concepts) if estimates is not None]
        amplification, se = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        best = predicted = None
        if before is not now:
            # Named concepts apart from the features: they are chosen because they move.
            groups = [slice(0, n_features), slice(n_features, None)]
            columns = _Columns(now, before, policy_before)
            predicted = self._predicted(amplification, se, n_features)
            found = [columns.best(amplification[g], se[g], g) for g in groups]
            best, probed = _joined([estimate for estimate, _ in found]), np.concatenate([probe for _, probe in found])
            if np.isfinite(amplification).all():  # else there is nothing to carry it forward by
                self._past = np.stack([best.value, best.se, amplification])
        thresholds = self.run_.calibration.thresholds
        prompts, rollouts = (
            now.scores.shape[1],
            now.scores[..., 0].numel() if now.scores.shape[-1] else now.policy.numel(),
        )
        record: Record = {"type": "probe", "step": step, "prompts": prompts, "rollouts": rollouts, "concepts": {}}
        record["estimator"] = best.name if best is not None else None
        record["predictor"] = predicted.name if predicted is not None else None
        for index, concept in enumerate(self.run_.concepts):
            scores, column = now.scores[..., index], n_features + index
            means = scores.mean(dim=(0, 2))
            record["concepts"][concept.name] = {
                "rate": [plain(x) for x in wilson(int((scores > thresholds[index]).sum()), scores.numel())],
                "score": [plain(means.mean()), plain(means.std() / len(means) ** 0.5)],
                "change": _pair(alone, alone_se, column) if best is None else _pair(best.value, best.se, column),
                "rollouts": _pair(alone, alone_se, column),
                "predicted": None if predicted is None else _pair(predicted.value, predicted.se, column),
                "amplification": None if best is None else _pair(amplification, se, column),
            }
        if best is None or predicted is None or not n_features:
            return record, []
        size = np.maximum(np.abs(best.value), np.abs(predicted.value))[:n_features]
        shown = [int(i) for i in np.argsort(-size, kind="stable")[:SHOWN]]
        record["features"] = [
            {
                "change": _pair(best.value, best.se, i),
                "rollouts": _pair(alone, alone_se, i),
                "predicted": _pair(predicted.value, predicted.se, i),
            }
            for i in shown
        ]
        # Not with the best estimate, which has amplification in it.
        both = probed[:n_features], amplification[:n_features]
        correlation = float(np.corrcoef(*both)[0, 1]) if both[0].any() and both[1].any() else float("nan")
        record["r2"] = plain(correlation**2)
        return record, shown

    def _predicted(self, amplification: np.ndarray, se: np.ndarray, n_features: int) -> Estimate:
        """What amplification alone says; the last probe lends it its scale, and no more, so that it can be held against this one."""
        se = np.where(np.isfinite(se), se, 0.0)
        if self._past is None:
            return unprobed(amplification, se)
        value, _, then = self._past[:, :n_features] if n_features else self._past
        slope = float(value @ then / (then @ then)) if then.any() else 1.0
        error = float(np.sqrt(np.mean((value - slope * then) ** 2)))
        return Estimate(slope * amplification, np.hypot(slope * se, error), "amplification, scaled by the last probe")

    def between(self, amplification: np.ndarray, se: np.ndarray) -> Estimate:
        """The best estimate of the concepts' changes at any step, `(C,)`: the last probe's, carried forward.

        Args:
            amplification: `(C,)` at that step, with its standard error:
            se: `(C,)`.
        """
        past = None
        if self._past is not None and len(se):
            value, error, then = self._past[:, self._past.shape[1] - len(se) :]
            past = Past(Estimate(value, error, ""), then)
        return unprobed(amplification, np.where(np.isfinite(se), se, 0.0), past)

    def _samples(self, now: Readings) -> list[Record]:
        """The first prompts' rollouts with the concepts' activations; all processes together."""
        tokenizer = self.run_.tokenizer
        rows = []
        for prompt, ids in zip(self.probe.prompts[:SAMPLES], now.ids[0, :SAMPLES, 0], strict=True):
            text = ids[ids >= 0].tolist()
            rows.append({"prompt_ids": prompt, "chosen_ids": text, "rejected_ids": text})
        return [
            {"prompt": tokenizer.decode(row["prompt_ids"], skip_special_tokens=True)[:TEXT_LENGTH], **sample}
            for row, sample in zip(rows, token_activations(self.run_, rows), strict=True)
        ]


def check_same_probe(was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Check that a resumed run's probes can be compared with what the model said before training.

    Args:
        was: What `told` was in the checkpoint.
        now: What it is.

    Raises:
        ValueError: If they differ; the text says in what.
    """
    changes = [
        f"`{name}` was {was[name]} and is {now[name]}" for name in was if name != "prompts" and was[name] != now[name]
    ]
    if was != now:
        raise UserError(
            f"Probe rollouts are not those of the checkpoint: {'; '.join(changes) or 'the prompts are others (of other data, or another `seed`)'}. "
            "What the model said before training is known for the checkpoint's alone. Leave them as they were, or set `probe_steps=0`."
        )


class _Columns:
    """The rollouts of a probe as the estimators take them: monitored features' scores, and the concepts' behind them.

    Draw 0 before training has the random numbers of this probe's draw: it is left out, as the two are not independent.
    """

    def __init__(self, now: Readings, before: Readings, policy_before: Tensor) -> None:
        self.base, self.now = (self._scores(readings) for readings in (before, now))
        self.base = self.base[self.base.shape[0] // DRAWS_BEFORE :]
        ratios = (policy_before - before.reference)[1:], now.policy - now.reference
        self.base_ratios, self.ratios = (ratio.double().cpu().numpy().ravel() for ratio in ratios)

    @staticmethod
    def _scores(readings: Readings) -> np.ndarray:
        parts = [readings.features] if readings.features is not None else []
        return torch.cat([*parts, readings.scores.cpu()], dim=-1).double().flatten(0, 2).numpy()

    def best(self, amplification: np.ndarray, se: np.ndarray, group: slice) -> tuple[Estimate, np.ndarray]:
        """The best estimate of a group of columns, and what the probe alone says; what never varies has not changed."""
        base, now = self.base[:, group], self.now[:, group]
        varies = np.concatenate([base, now]).std(axis=0) > 0
        value, error, alone = np.zeros((3, len(se)))
        if not varies.any():
            return Estimate(value, error, "probe rollouts"), alone
        change = probe_change(base[:, varies], now[:, varies], self.base_ratios, self.ratios)
        if np.isfinite([amplification, se]).all():
            spectrum = Spectrum.of(base[:, varies]) if base[:, varies].std(axis=0).any() else None
            best = best_estimate(amplification[varies], se[varies], change, spectrum)
        else:  # of fewer than two pairs, or of a window most of which is left out
            best = Estimate(change.value, change.se, "probe rollouts")
        value[varies], error[varies], alone[varies] = best.value, best.se, change.value
        return Estimate(value, error, best.name), alone


def _joined(parts: list[Estimate]) -> Estimate:
    """Of features and concepts; called as the features' is, where there are any."""
    value, se = (np.concatenate([part[i] for part in parts]) for i in range(2))
    return Estimate(value, se, next(part.name for part in parts if len(part.value)))


def _changes(now: Readings, before: Readings) -> tuple[np.ndarray, np.ndarray]:
    """What the rollouts alone say: draw 0, which has the same random numbers at each probe; `(F + C,)` each."""
    pairs = [paired_change(now.scores[:1].cpu(), before.scores[:1].cpu())] if now.scores.shape[-1] else []
    if now.features is not None and before.features is not None:
        pairs.insert(0, paired_change(now.features[:1], before.features[:1]))
    value, se = (torch.cat(parts).numpy() for parts in zip(*pairs, strict=True))
    return value, se


def _pair(value: np.ndarray, se: np.ndarray, column: int) -> list[Any]:
    return [plain(value[column]), plain(se[column])]
