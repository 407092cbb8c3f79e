"""The monitor of a run: a callback that gathers the estimates, probes the model, and hands records to those who show them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerCallback

from ..files import replacing
from ..readouts.sae_reader import SAEReader
from .estimates import Window
from .estimators import unprobed
from .names import FeatureNames
from .pairs import TopPairs
from .probe.recorder import ProbeRecorder, check_same_probe
from .probe.rollouts import Probe, choose_rows
from .recorder import StepRecorder
from .records import FILE_NAME, Record, RecordFile, Sink
from .sae import FeatureMonitor, FeatureStatistics
from .settings import MonitorSettings, run_record
from .watch import FeatureWatch


if TYPE_CHECKING:
    from ..metrics import Pairs
    from .access import TrainerAccess

logger = get_logger(__name__)

STATE_NAME = "monitor.safetensors"
"""Name of the monitor's state in a checkpoint."""
DASHBOARDS = 50
"""How often, at most, features and pairs are ranked anew for the dashboards of a run."""
TOP_PAIRS = 8


class RunMonitor(TrainerCallback):
    """Watches a run of [`ShapedDPOTrainer`]: see the package's other files for what is watched and how.

    On every process the estimates are gathered and the probes sampled; the main process writes the records and calls the sinks.

    Args:
        run: The trainer, its reading prepared.
        settings: What to watch.
        reader: Reads the monitored features, or `None`.
        sinks: Who shows the records.

    Raises:
        FileNotFoundError, ValueError: If the file of feature labels cannot be read, or rollouts are asked for of a vision data set.
    """

    def __init__(
        self, run: TrainerAccess, settings: MonitorSettings, reader: SAEReader | None, sinks: Sequence[Sink]
    ) -> None:
        if settings.probe_steps and run.has_images:
            raise ValueError(
                f"`probe_steps={settings.probe_steps}` samples answers to the prompts of prepared data, and the tokens of a vision data set are made "
                "in the collator only. Set `probe_steps=0`."
            )
        self.run = run
        self.settings = settings
        self.concepts = run.concepts
        self.accelerator = run.accelerator
        self._forget()
        self.watch = FeatureWatch(reader, settings.n_features, settings.window, self.accelerator)
        self._names = FeatureNames(run, settings.labels, reader.n_features if reader is not None else 0)
        self._recorder = StepRecorder(run, self._names, settings.sae, settings.texts)
        self._asked_features = repr((settings.sae, settings.n_features))
        self._strengths: dict[str, float] = {}
        self._probe: ProbeRecorder | None = None
        self._loaded: dict[str, Tensor] = {}
        self._told: dict[str, str] = {}
        self._saved: dict[str, Tensor] | None = None
        self._file = RecordFile(Path(str(run.args.output_dir)) / FILE_NAME)
        self._sinks = list(sinks)
        self._pending: list[Record] = []
        self._logged = self._drawn = -1  # the last step whose estimates were written, and were drawn
        self._probed = -1  # and that was probed
        self._records: int | None = None  # how many there were at the checkpoint that is resumed from

    def _forget(self) -> None:
        """Begin with no pair seen."""
        n, size, device = len(self.concepts), self.settings.window, self.accelerator.device
        self.window, self.pairs = Window(n, size, device), TopPairs(n, TOP_PAIRS, size, device)

    @property
    def features(self) -> FeatureMonitor | None:
        """The monitored features, once they are calibrated."""
        return self.watch.monitor

    # ------------------------------------------------------------------ the step

    def update(
        self, pairs: Pairs, features: Tensor | None, rows: Tensor | None, beta: float, metrics: Mapping[str, float]
    ) -> None:
        """Add a training batch. Nothing here waits for the device."""
        (chosen, rejected), (ref_chosen, ref_rejected) = pairs.policy_logps, pairs.ref_logps
        apart = ((chosen - ref_chosen) - (rejected - ref_rejected)).float()
        world = self.accelerator.num_processes
        delta = (
            torch.stack([signal.delta for signal in pairs.signals], dim=1)
            if self.concepts
            else apart.new_zeros(len(apart), 0)
        )
        self.window.update(apart, beta, delta, world)
        if self.concepts and rows is not None:
            self.pairs.update(rows, apart, beta, delta, world)
        if self.features is not None and features is not None:
            self.features.update(features, rows, apart, ~pairs.empty, beta, world)
        for concept in self.concepts:
            self._strengths[concept.name] = metrics[f"concepts/{concept.name}/strength"]

    # ------------------------------------------------------------------ the trainer's events

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.run.calibrate()
        self.load_probe()
        self._probed = -1
        if state.global_step == 0:  # of a run that this trainer made before
            self._logged = self._drawn = -1
        if self.accelerator.is_main_process:
            kept = self._file.start(state.global_step, self._records)
            for sink in self._sinks:
                sink.open(kept)
            if not any(record["type"] == "run" for record in kept):
                self._write([run_record(self.run, self.settings, self.watch.reader, state, self.run.step_pairs)])
        if self._probe is not None and (state.global_step == 0 or not self._probe.begun):
            if state.global_step > 0:
                logger.warning(
                    f"No probe was made before training: rollouts are compared with those of step {state.global_step}."
                )
            self._run_probe(state.global_step)
        self._show()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        every = self.settings.probe_steps
        if self._probe is not None and state.global_step % every == 0 and state.global_step < state.max_steps:
            self._run_probe(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs:  # of an evaluation, a probe, or the end
            return
        draws = self._draws(state)
        records = self._estimates(state, draws)
        if self.accelerator.is_main_process:
            self._write(records)
            self._show()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A run that is stopped may have been probed at this step; but not the best model, where that was loaded since.
        if self._probe is not None and (self._probed < state.global_step or args.load_best_model_at_end):
            self._run_probe(state.global_step)
        logged = self._logged == state.global_step  # a run often ends with a step that is logged
        records = self._estimates(state, self._drawn < state.global_step)[int(logged) :]
        if self.accelerator.is_main_process:
            self._write([*records, {"type": "end", "step": state.global_step}])
            self._show()
            for sink in self._sinks:
                sink.close()

    def _draws(self, state: Any) -> bool:
        """Whether features and pairs are ranked at this step: the first time, and then at most `DASHBOARDS` times in a run."""
        every = max(state.max_steps // DASHBOARDS, 1)
        steps = max(int(state.logging_steps or 1), 1)
        return state.global_step <= steps or state.global_step // every != (state.global_step - steps) // every

    def _write(self, records: list[Record]) -> None:
        self._file.append(records)
        self._pending += records

    def _show(self) -> None:
        if not self.accelerator.is_main_process:
            return
        for sink in self._sinks:
            sink.write(self._pending)
        self._pending = []

    def _estimates(self, state: Any, draws: bool) -> list[Record]:
        """The records of a logging step; all processes must ask for them together."""
        step = self._logged = state.global_step
        estimates = self._recorder.estimates(self.window)
        amplification, se = estimates.amplification()
        best = self._probe.between(amplification, se) if self._probe is not None else unprobed(amplification, se)
        records = [self._recorder.step(state, step * self.run.step_pairs, estimates, best, self._strengths)]
        if not draws:
            return records
        self._drawn = step
        if self.features is not None:
            records.append(self._recorder.features(step, self.features))
        if self.concepts:
            records.append(self._recorder.pairs(step, self.pairs))
        return records

    # ------------------------------------------------------------------ probe rollouts

    def load_probe(self) -> None:
        """Draw the prompts, once, and take over what an earlier part of the run read on them."""
        if self.settings.probe_steps == 0 or self._probe is not None:
            return
        run, settings, tokenizer = self.run, self.settings, self.run.tokenizer
        longest = run.context_length - settings.probe_tokens
        columns, seed = run.reader.gate_columns, run.args.seed
        rows = choose_rows(run.prompts, settings.probe_prompts, longest, seed, "probe_max_new_tokens", columns)
        rows = [dict(rows[i % len(rows)]) for i in range(settings.probe_prompts)]  # of few prompts, each more often
        prompts = [row.pop("prompt_ids") for row in rows]
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        probe = Probe(prompts, self.accelerator, settings.probe_tokens, pad, seed, columns=rows)
        self._probe = ProbeRecorder(run, probe, self._loaded, settings.texts)
        if self._loaded:
            check_same_probe(json.loads(self._told["probe"]), self._probe.told)
            if self.watch.reader is not None and not self._probe.reads_features:
                logger.warning(
                    "Probes leave out the SAE's features: what they were before training is known for those of the checkpoint only."
                )
        self._loaded = {}

    def _run_probe(self, step: int) -> None:
        assert self._probe is not None
        self._probed = step
        watched = self.features if self._probe.reads_features else None
        concepts = self._recorder.estimates(self.window)
        features = self._recorder.estimates(watched.window) if watched is not None else None
        record, shown = self._probe.run(step, concepts, features, watched)
        names = self._names.of(shown, watched) if watched is not None else {}
        if not self.accelerator.is_main_process:
            return
        for column, entry in zip(shown, record.get("features", ()), strict=True):
            entry |= {name: names[column][name] for name in ("feature", "label")}
        self._write([record])
        self._show()
        scalars = {
            f"probe/{name}/{what}": concept[what][0]
            for name, concept in record["concepts"].items()
            for what in ("rate", "score", "change")
        }
        if scalars:
            self.run.log(scalars)

    # ------------------------------------------------------------------ checkpoints

    def gather_state(self) -> None:
        """Bring the state of all processes together, for [`save_state`]; all must call this."""
        together = self._recorder
        tensors = {"window": together.summed(self.window.state()), "pairs": together.merged(self.pairs)}
        tensors["written"] = torch.tensor([self._logged, self._drawn, self._file.count])
        if self.features is not None:
            tensors |= {
                "features.window": together.summed(self.features.window.state()),
                "features.pairs": together.merged(self.features.pairs),
                **{f"features.{name}": tensor for name, tensor in self.features.statistics.tensors().items()},
            }
        if self._probe is not None:
            tensors |= self._probe.state()
        self._saved = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def save_state(self, folder: Path) -> None:
        """Write what [`gather_state`] brought together, whole or not at all."""
        if self._saved is not None:
            told = {"features": self._asked_features}
            if self._probe is not None:
                told["probe"] = json.dumps(self._probe.told)
            with replacing(folder / STATE_NAME) as partial:
                save_file(self._saved, partial, metadata=told)

    def load_state(self, folder: Path) -> SAEReader | None:
        """Take over the state of a checkpoint, if it has one that fits.

        Returns:
            What reads the monitored features from now on, if they were in the state.
        """
        path = folder / STATE_NAME
        if not path.is_file():
            return None
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            self._told = file.metadata() or {}
        device = self.accelerator.device
        self._forget()  # a run that was stopped in this process may have come further
        main = self.accelerator.is_main_process  # the others start from nothing: their sums are added up
        if tensors["window"].shape[1] == len(self.concepts) + 1 and main:
            self.window.load_state(tensors["window"])
            self.pairs.table = tensors["pairs"].to(device)
        if "written" in tensors:
            self._logged, self._drawn, self._records = tensors["written"].tolist()
        self._loaded = {name: tensor for name, tensor in tensors.items() if name.startswith("probe.")}
        if self._loaded:
            self._probe = None  # built anew, on what is loaded
        if self._told.get("features") != self._asked_features:  # nothing that is known of features is of these
            self._loaded.pop("probe.features", None)
            past = self._loaded.pop("probe.past", None)
            if past is not None and self.concepts:
                self._loaded["probe.past"] = past[:, -len(self.concepts) :]  # the concepts come last
            return None
        if self.watch.reader is None or "features.ids" not in tensors:
            return None
        part = {name.removeprefix("features."): tensor.to(device) for name, tensor in tensors.items()}
        if self.features is not None and not torch.equal(self.features.statistics.ids, part["ids"]):
            return None  # calibrated in this process already, on other data
        features = self.watch.watch(FeatureStatistics.of(part))
        if main:
            features.window.load_state(tensors["features.window"])
            features.pairs.table = tensors["features.pairs"].to(device)
        return features.reader
