"""What a run shows in Weights & Biases beside the scalars that transformers' own callback logs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .figures import heatmap_figure, prediction_figure, top_figure
from .guard import Guard
from .tables import PAIR_COLUMNS, RANKED_COLUMNS, Columns, Latest, Record, pair_rows, ranked_rows, rollouts


STEP = "train/global_step"
"""The step metric of transformers' `WandbCallback`: the x-axis of everything."""
GROUPS = ("concepts/*", "probe/*", "train/concepts/*", "train/probe/*", "eval/concepts/*")
"""Ours, and the trainer's scalars of the same things, whose names transformers begins with `train/` or `eval/`."""
GROWTH, PARTS = 0.5, 25
"""Tables are logged again when the step is half as large again as at the last time, and about 25 times in all."""
ATTEMPTS = 3
"""Failures in a row after which nothing more is tried."""
LONGEST = 64
"""Entries of a list in the run's config: a concept may have thousands of SAE features."""


class WandbSink:
    """Tables, charts and config of a run in Weights & Biases, from the monitor's records (a `Sink`; rank 0 only).

    transformers' `WandbCallback` owns the run and logs every scalar: nothing is logged here a second time, and the run is never
    finished here. `wandb` hands everything to a process of its own, which does the uploading, so a call takes milliseconds
    whatever the network does. Whatever fails is reported by one warning; training goes on.

    | key | what |
    | --- | --- |
    | config `shapedpo` | concepts with readout, action and threshold; the data's fingerprint; the model |
    | `concepts/amplified`, `concepts/suppressed` | tables: named concepts and SAE features together, ranked, with intervals and example rows |
    | `concepts/pairs` | table: the pairs responsible |
    | `concepts/top`, `concepts/heatmap` | charts: the largest with intervals; concept by step |
    | `probe/rollouts` | table: completions before training and now, with their scores |
    | `probe/predicted_vs_observed` | chart, once a probe after the first step knows both |

    A table in W&B never changes once logged. Each update is a new table under the same key: the run's summary, which
    workspaces and reports show, has the latest, and the history has all with their step. As each is stored as a version of an
    artifact, they are logged at thinning steps (about 25 times in a long run) and at the end.
    """

    def __init__(self) -> None:
        self._latest = Latest()
        self._changed: set[str] = set()
        self._shown: dict[str, Any] = {}
        self._last: int | None = None
        self._run_id: str | None = None
        self._guard = Guard(
            "The records are still in concepts.jsonl. W&B is tried again when the next tables are due, "
            f"and given up after {ATTEMPTS} failures."
        )

    def open(self, records: Sequence[Record]) -> None:
        """Take in what is on disk of a run that resumes. It has been logged before, so it is not logged again."""
        with self._guard("reading the records of the run so far"):
            for record in records:
                self._latest.update(record)

    def write(self, records: Sequence[Record]) -> None:
        """Take new records in, and log what they changed if it is time, and they are more than a step's figures."""
        with self._guard("reading the monitor's records"):
            for record in records:
                self._changed |= self._latest.update(record)
        # Else features and pairs of an earlier step would go by this one's number.
        ranked = any(record.get("type") != "step" for record in records)
        if self._guard.failures < ATTEMPTS and (
            "end" in self._changed or "run" in self._changed or (ranked and self._due())
        ):
            self._publish()

    def close(self) -> None:
        """Log what has changed since the last time."""
        if self._guard.failures < ATTEMPTS:
            self._publish(last=True)

    def _due(self) -> bool:
        if self._last is None or self._latest.step < self._last:  # a run that resumed is earlier than it was
            return True
        gap = GROWTH * self._last
        length = (self._latest.run.get("settings") or {}).get("max_steps")
        if isinstance(length, int) and length > 0:
            gap = min(gap, length / PARTS)
        return self._latest.step - self._last >= max(1.0, gap)

    def _publish(self, *, last: bool = False) -> None:
        with self._guard("looking for the run"):
            run = self._active_run()
            if run is None:
                return
            if run.id != self._run_id:
                self._shown.clear()
            if run.id != self._run_id or "run" in self._changed:
                with self._guard("writing the run's config and metrics"):
                    self._describe(run)
                    self._run_id = run.id
                    self._changed.discard("run")
            if not (self._due() or last or "end" in self._changed):
                return
            # The end of a run brings the estimates of its last step once more: what is shown already is not logged again.
            new = {group: told for group, told in self._told().items() if group in self._changed}
            new = {group: told for group, told in new.items() if told != self._shown.get(group)}
            self._last = self._latest.step  # also where logging fails: a broken W&B is tried as seldom as a working one
            with self._guard("logging the tables and charts"):
                if new:
                    run.log({**self._content(new), STEP: self._latest.step})
                self._changed.clear()
                self._shown |= new
                self._guard.failures = 0

    def _told(self) -> dict[str, Any]:
        """What the groups of tables and charts are made of."""
        latest = self._latest
        pairs = (latest.pairs, latest.features)
        return {"concepts": (latest.concepts, *pairs), "pairs": pairs, "probe": latest.probe}

    def _active_run(self) -> Any | None:
        """The process's run, unless there is none or W&B is disabled."""
        import wandb

        run = wandb.run
        if run is None and self._run_id is not None:
            self._run_id = None
            raise RuntimeError("the run was finished before the training was")
        return None if run is None or run.disabled else run

    def _describe(self, run: Any) -> None:
        run.define_metric(STEP)
        for group in GROUPS:
            run.define_metric(group, step_metric=STEP, step_sync=True)
        described = config(self._latest.run)
        if described:
            run.config.update({"shapedpo": described}, allow_val_change=True)

    def _content(self, groups: Iterable[str]) -> dict[str, Any]:
        latest, content = self._latest, {}
        makers: dict[str, Callable[[], dict[str, Any]]] = {
            "concepts": self._concepts,
            "pairs": lambda: {"concepts/pairs": _table(PAIR_COLUMNS, pair_rows(latest))},
            "probe": lambda: {
                "probe/rollouts": _table(*rollouts(latest)),
                "probe/predicted_vs_observed": _chart(prediction_figure(latest)),
            },
        }
        for group in groups:
            content.update(makers[group]())
        return {key: value for key, value in content.items() if value is not None}

    def _concepts(self) -> dict[str, Any]:
        amplified, suppressed = self._latest.ranked()
        step = self._latest.step
        return {
            "concepts/amplified": _table(RANKED_COLUMNS, ranked_rows(amplified, step), empty=True),
            "concepts/suppressed": _table(RANKED_COLUMNS, ranked_rows(suppressed, step), empty=True),
            "concepts/top": _chart(top_figure(amplified, suppressed, step)),
            "concepts/heatmap": _chart(heatmap_figure(self._latest)),
        }


def config(run: Record) -> dict[str, Any]:
    """What the run's config gets under `shapedpo`, from a `run` record. The trainer's arguments are there already.

    Concepts are keyed by their names, so that W&B can compare runs by, say, `shapedpo.concepts.goblin.strength`.
    """
    described = {
        "concepts": {
            entry["name"]: {k: v for k, v in entry.items() if k != "name"} for entry in run.get("concepts") or ()
        },
        "data": run.get("data"),
        "model": run.get("model"),
    }
    return {key: _shorten(value) for key, value in described.items() if value}


def _shorten(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _shorten(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple) and len(value) > LONGEST:
        return [*(_shorten(entry) for entry in value[:LONGEST]), f"... {len(value)} in all"]
    return value


def _table(columns: Columns, rows: list[list[Any]], *, empty: bool = False) -> Any | None:
    """A table with typed columns, or `None` without rows, unless `empty` ones are wanted, which replace an older one."""
    import wandb

    if not rows and not empty:
        return None
    # Types are given, not inferred: a column that happens to be all empty would otherwise have none.
    return wandb.Table(columns=list(columns), data=rows, dtype=list(columns.values()), optional=True)


def _chart(figure: Any | None) -> Any | None:
    import wandb

    return None if figure is None else wandb.Plotly(figure)
