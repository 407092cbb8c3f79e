r"""How far DPO on a dataset will move each feature and cluster, before anything is trained.

The mean delta of the pairs is the first-order pressure on a score (the paper's global prediction). What is made of it:

- The reward that explains the features' mean deltas, and what it moves: a score changes by its covariance with that reward over answers to the same
  prompt ([`~shapedpo.audit.prediction.reward`]). The answers are the reference's own where they are at hand, or else the data's completions.
- A condition's own effect is the same over its answers, less what happens everywhere, shrunk as far as they are few
  ([`~shapedpo.audit.prediction.shrinkage`]).
- How a model generalises, displacement above all, is in no count of features. A pilot of some steps shows it: its changes in the reference's answers
  give a second reward, and the mean of both is what predicts. A pilot also sets the scale.

`benchmarks/prediction.py` measures how true the result is. Medians over violent runs of the 5 worlds held out, of R^2 with the change that 8,192 answers of either
model show, with as many pairs of the reference's answers (`--prompts 4096`); *ceiling* is what the truth itself would get, as the answers are noisy, *within reach* what a
prediction can get that does not know the order in which a run sees its pairs (of the 4 that were made twice), in brackets the share of it that is got there:

| | features | response clusters `R_m` | `R_m` under prompt clusters |
| --- | --- | --- | --- |
| plain mean delta | 0.52 | 0.63 | 0.20 |
| the data alone | 0.68 (75 %) | 0.73 (78 %) | 0.46 (52 %) |
| with a pilot of a quarter | 0.78 (93 %) | 0.89 (96 %) | 0.79 (84 %) |
| ceiling | 0.99 | 0.99 | 0.93 |
| within reach | 0.93 | 0.95 | 0.85 |

With a quarter of the answers the pilot's medians are 0.74, 0.91 and 0.67, in gentle runs 0.80, 0.90 and 0.56; with a sixteenth 0.54, 0.67 and 0.27 (24 runs of 8 worlds, gentle and
small ones too): noise on both sides, in what is seen and in what the pilot was read off. The mean of both rewards and the ridge were settled with the last; on the worlds of the
design with four times their answers (by hand) no other way was better in all: a pilot that counts 0.6 or 0.7, a ridge of 1, what the pilot shows of each thing itself mixed in,
answers of the pilot's own, its log-ratios on the answers carried on, an exponential tilt in place of the first order.

The reference's answers alone are little gain on the worlds held out, and a pilot of an eighth of the run is a larger one; both helped on the worlds of the
design. Worse there than a pilot of the same cost: fewer pairs at four or eight times the learning rate, and a single step along the preconditioned gradient of a quarter
of the pairs (R^2 over features 0.74, 0.39 and 0.71, not 0.77, 0.54 and 0.75).
Source: ours; the global prediction is that of Bergen et al. (arXiv 2606.12360).
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...files import replacing
from ..analysis.hypotheses import Analysis
from ..harvesting.store import Harvest
from .conditions import Conditions
from .effects import measure
from .estimation import estimate


if TYPE_CHECKING:
    from ..rollouts.observed import Observed
    from ..rollouts.run import Rollouts

FILE = "prediction.parquet"
KINDS = ("feature", "feature_cluster", "response_cluster")
Place = tuple[str, int, str, int]
"""Kind, number, view and condition of a thing."""


@dataclass(frozen=True)
class PredictionSettings:
    """How effects in the data become changes of the model.

    Args:
        scale: What the changes that the reward makes are multiplied by. How far a run goes depends on its learning rate, beta and
            steps, which are not in the data: it is the same for all, and does not matter for ranks. Where neither this nor a pilot's share
            is given, 1, and the prediction says that its scale is not known.
        pilot_share: The share of the run that a pilot has had: of its steps, or better, of the sum of its learning rates over steps. The scale
            then follows from the pilot, whose change is taken to grow with that share.
        ridge: Added to the features' covariance matrix, whose diagonal is 1, where the reward is solved for: what varies less along a direction
            is mostly taken for noise.
        error: Standard error of a prediction as a share of its own size.
        common_error: The error that all have, as a share of the usual prediction: what moves although the data does not ask for it.
        least_rate: Rates are taken as this at least, and at most as 1 less this, where log-odds are predicted.
        sample: Pairs whose differences say how features go together.
        min_condition_rows: Rows of a condition that predictions are made for.

    Raises:
        ValueError: If a number is not above 0.
    """

    scale: float | None = None
    pilot_share: float | None = None
    ridge: float = 3.0
    error: float = 0.35
    common_error: float = 0.35
    least_rate: float = 0.01
    sample: int = 10_000
    min_condition_rows: int = 10

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if value is not None and not value > 0:
                raise ValueError(f"`{f.name}` must be above 0, got {value!r}.")
        if self.pilot_share is not None and self.pilot_share > 1:
            raise ValueError(f"`pilot_share` must be a share of the run, at most 1, got {self.pilot_share!r}.")


@dataclass(frozen=True)
class Prediction:
    """What a run will change, one line a thing; all arrays are `(n,)`.

    Attributes:
        kind: `feature`, `feature_cluster` (`T_m`) or `response_cluster` (`R_m`).
        number: Of the feature or cluster.
        view: Where: `global`, or under a condition of the `prompt` or the `feature` view.
        condition: The prompt cluster `A_k` or the data cluster; -1 everywhere.
        score, score_low, score_high: Predicted change of its mean score, in sd of the score over the reference's completions, with its 90 %
            interval. A feature's score is its frequency, a cluster's what its view compares: the share of its features that are on, or
            their mean standardised frequency.
        log_odds, log_odds_low, log_odds_high: Predicted change of the log-odds that it appears in a rollout. A feature appears where it
            fires, a cluster where half of its features are on.
        base_rate: Share of the reference's completions (in the condition) in which it appears.
        sd: What a change of 1 is in the score's own units.
        scaled: Whether the scale of the changes is known; else only their signs and ranks mean something.
    """

    kind: NDArray[np.str_]
    number: NDArray[np.int32]
    view: NDArray[np.str_]
    condition: NDArray[np.int32]
    score: NDArray[np.float32]
    score_low: NDArray[np.float32]
    score_high: NDArray[np.float32]
    log_odds: NDArray[np.float32]
    log_odds_low: NDArray[np.float32]
    log_odds_high: NDArray[np.float32]
    base_rate: NDArray[np.float32]
    sd: NDArray[np.float32]
    scaled: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.number)

    def of(self, kind: str, view: str = "global", condition: int | None = None) -> Prediction:
        """The lines of a kind in a view, in the order of condition and number."""
        which = (self.kind == kind) & (self.view == view)
        if condition is not None:
            which &= self.condition == condition
        return self.where(which)

    def where(self, which: NDArray[Any]) -> Prediction:
        """Some lines."""
        return Prediction(**{f.name: getattr(self, f.name)[which] for f in fields(self)})

    def at(self, kind: str, number: int, view: str = "global", condition: int = -1) -> dict[str, float] | None:
        """One thing's numbers by name, or `None` where there is no prediction."""
        place = np.flatnonzero(
            (self.kind == kind) & (self.number == number) & (self.view == view) & (self.condition == condition)
        )
        if not len(place):
            return None
        return {f.name: float(getattr(self, f.name)[place[0]]) for f in fields(self)[4:]}

    def lines(self, places: Collection[Place]) -> dict[Place, int]:
        """The lines of some things, all of them looked for at once; without those of which there is no prediction."""
        wanted = set(places)
        every = zip(*(getattr(self, name).tolist() for name in ("kind", "number", "view", "condition")), strict=True)
        return {place: line for line, place in enumerate(every) if place in wanted}

    def line(self, place: int) -> dict[str, Any]:
        """A line as plain data."""
        return {f.name: getattr(self, f.name)[place].item() for f in fields(self)}

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write it as `prediction.parquet` into an analysis' folder."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.table({f.name: getattr(self, f.name) for f in fields(self)})
        with replacing(Path(folder) / FILE) as partial:
            pq.write_table(table, partial, compression="zstd")

    @classmethod
    def load_if_made(cls, folder: str | os.PathLike[str]) -> Prediction | None:
        """[`Prediction.load`], or `None` where an audit was made without."""
        return cls.load(folder) if (Path(folder) / FILE).is_file() else None

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Prediction:
        """Read what [`Prediction.save`] wrote.

        Raises:
            FileNotFoundError: If there is none.
        """
        import pyarrow.parquet as pq

        path = Path(folder) / FILE
        if not path.is_file():
            raise FileNotFoundError(f"'{folder}' holds no prediction: {FILE} is missing. Run `shapedpo audit` first.")
        table = pq.ParquetFile(path).read()
        texts = ("kind", "view")
        columns = {n: np.array(table[n].to_pylist()) if n in texts else table[n].to_numpy() for n in table.column_names}
        return cls(**{"scaled": np.zeros(len(table), bool), **columns})  # those of earlier versions do not say


def predict(
    harvest: Harvest,
    analysis: Analysis,
    settings: PredictionSettings | None = None,
    *,
    weights: ArrayLike | None = None,
    held: Collection[int] = (),
    held_on: ArrayLike | None = None,
    rollouts: Rollouts | None = None,
    progress: bool = True,
) -> Prediction:
    """Predict what DPO on a harvested dataset will amplify and suppress, everywhere and under each condition.

    Args:
        harvest: The harvest.
        analysis: Its analysis, which has the clusters and the data clusters.
        settings: How.
        weights: `(n_rows,)`, not negative, what each pair counts, in the order of `analysis.rows`: 0 for a row that is dropped, 1 as it is.
        held: Features that are held: they will not change, and what goes with them changes less.
        held_on: `(n_rows,)` bool, the pairs on which they are held, as behind a gate, in the order of `analysis.rows`; all by default. It does not go
            with `rollouts`, of which it is not known on which side of the gate they are.
        rollouts: Answers of the reference to some prompts, and if a pilot (a model trained on the data for a few steps) answered too, or weighs
            them, its log-ratios. The answers say what can move together, and how far, the pilot how the model generalises. The pilot is left out
            where features are held or pairs weighted: it was trained on the data as it is.
        progress: Whether to show progress bars.

    Raises:
        ValueError: If the analysis is of another harvest, `weights` or `held_on` do not fit, or a held feature is not there.
    """
    settings = settings or PredictionSettings()
    found = _checked(harvest, analysis, weights, held)
    gate = None if held_on is None else np.asarray(held_on, bool)
    if gate is not None and (rollouts is not None or gate.shape != found.shape):
        raise ValueError(f"`held_on` takes {len(found)} booleans, one a pair, and no rollouts; got shape {gate.shape}.")
    features = np.array(sorted(set(held)), np.int64)
    conditions = Conditions.of(analysis)
    effects = measure(
        harvest,
        conditions,
        found,
        analysis.settings,
        settings.sample,
        settings.min_condition_rows,
        progress,
    )
    pilot: Observed | None = None
    if rollouts is not None and rollouts.log_ratios.any() and weights is None and not len(features):
        from ..rollouts.observed import observe  # needs torch

        pilot = observe(rollouts, conditions, progress=progress)["feature", "global"]
    return Prediction(
        **estimate(harvest, conditions, effects, found, features, rollouts, pilot, settings, progress, gate)
    )


def _checked(
    harvest: Harvest, analysis: Analysis, weights: ArrayLike | None, held: Collection[int]
) -> NDArray[np.float64]:
    n = harvest.n_rows
    if n != analysis.n_rows or not np.array_equal(harvest.rows, analysis.rows):
        raise ValueError(
            f"The analysis is of other rows than the harvest in '{harvest.folder}': it has {analysis.n_rows}, the harvest {n}. Analyse it anew."
        )
    if outside := [feature for feature in held if not 0 <= feature < harvest.d_sae]:
        raise ValueError(f"Feature {outside[0]} cannot be held: the SAE has {harvest.d_sae} features.")
    if weights is None:
        return np.ones(n)
    found = np.asarray(weights, np.float64)
    if found.shape != (n,) or not np.isfinite(found).all() or (found < 0).any():
        raise ValueError(f"Expected weights as {n} numbers of 0 or more, one a pair, got shape {found.shape}.")
    return found
