"""What the views find: hypotheses that say where in the data what is rewarded, ranked, with the rows that are responsible."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from ...files import replacing
from .files import joined, numbered, parts, write_json, write_table
from .leading import Leading
from .settings import AuditSettings
from .statistics import Comparison, corrected


View = Literal["global", "single", "feature", "prompt"]
VIEWS: tuple[View, ...] = get_args(View)
CONDITIONAL: tuple[View, ...] = ("feature", "prompt")

FILES = (
    "clusters.json",
    "settings.json",
    "lessons.json",
    "rows.parquet",
    "lessons.parquet",
    "data.parquet",
    "conditions.safetensors",
    "hypotheses.json",
)
"""What [`Analysis.save`] writes, in this order: with the last, the analysis is whole."""


@dataclass(frozen=True)
class Hypothesis:
    """Among the rows of a condition, chosen and rejected completions differ in a response cluster as they do not elsewhere.

    Attributes:
        view: `feature` (the condition is a data cluster), `prompt` (it is a cluster of prompt features), `global` (all rows, against 0), or
            `single` (the same of one feature, which its cluster may drown).
        condition: Number of the data cluster or of `A_k`; -1 for `global` and `single`.
        response: Number of the response cluster: `T_m`, in the prompt view `R_m`, in the single view a feature alone.
        delta: Mean of the response score in the condition minus that elsewhere; above 0 where chosen has more.
        mean_in, mean_out: These means.
        d, z, p: Cohen's d, Welch's statistic and its p value.
        q: `p` after Benjamini and Hochberg, over all hypotheses of the view that were tested, also those that were then dropped.
        halves: `delta` among rows of even and of odd number.
        n_in: Rows in the condition.
        rows: `(n,)` int64, numbers in the source dataset of the condition's rows whose response goes this way, the most responsible first.
        contributions: `(n,)` float32, their response scores.
        n_named: How many of these rows are more than chance: see [`beyond_chance`].
    """

    view: View
    condition: int
    response: int
    delta: float
    mean_in: float
    mean_out: float
    d: float
    z: float
    p: float
    q: float
    halves: tuple[float, float]
    n_in: int
    n_named: int = 0
    rows: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64), repr=False, compare=False)
    contributions: NDArray[np.float32] = field(
        default_factory=lambda: np.zeros(0, np.float32), repr=False, compare=False
    )

    @property
    def response_cluster(self) -> tuple[str, int]:
        """Kind and number of its response cluster, as in [`Analysis.clusters`]."""
        return {"prompt": "response", "single": "single"}.get(self.view, "feature"), self.response

    @property
    def condition_cluster(self) -> tuple[str, int] | None:
        """Kind (`prompt` or `data`) and number of the cluster that is its condition; none in the global view."""
        kind = {"prompt": "prompt", "feature": "data"}.get(self.view)
        return (kind, self.condition) if kind else None

    @property
    def conditional(self) -> bool:
        """Whether it speaks of a part of the rows."""
        return self.view in CONDITIONAL

    @property
    def named(self) -> NDArray[np.int64]:
        """The rows that are held responsible, the most responsible first."""
        return self.rows[: self.n_named]

    @property
    def evidence(self) -> NDArray[np.int64]:
        """The named rows, or where no row stands out from chance, all whose response goes this way."""
        return self.named if self.n_named else self.rows

    @property
    def strength(self) -> float:
        """What the view is ranked by: the smaller of the two halves' effects."""
        return min(map(abs, self.halves))


@dataclass(frozen=True)
class Attribution:
    """Hypotheses that one lesson explains, and the rows that teach it: see [`~shapedpo.audit.analysis.lessons.Lesson`].

    Attributes:
        hypotheses: Their numbers; the first stands for the lesson.
        told_by_prompt: How well the prompt alone tells its rows from others, 0.5 to 1.
        rows, log_odds: `(n,)` int64 and float32, its rows, the surest first.
    """

    hypotheses: list[int]
    told_by_prompt: float
    rows: NDArray[np.int64] = field(repr=False, compare=False)
    log_odds: NDArray[np.float32] = field(repr=False, compare=False)


def ranked(
    view: View,
    found: Comparison,
    settings: AuditSettings,
    responses: NDArray[np.bool_] | bool = True,
) -> tuple[list[Hypothesis], int]:
    """The hypotheses of a view, the strongest first, and how many were tested.

    All pairs of a condition with `min_rows` rows and an allowed response are tested. Kept are those whose halves agree in sign
    and whose effect is `min_effect` or more, at most `max_hypotheses`.

    Args:
        view: Which.
        found: Its comparisons, `(conditions, responses)`.
        settings: Of it `min_rows`, `min_effect`, `max_hypotheses`.
        responses: `(responses,)`, which are allowed.
    """
    p = found.tested(settings.min_rows, responses)
    q = corrected(p)
    strength = found.strength
    kept = np.argwhere(np.isfinite(p) & (strength > 0) & (np.abs(found.d) >= settings.min_effect))
    a, b = kept.T
    order = np.lexsort((b, a, -np.abs(found.z[a, b]), -strength[a, b]))[: settings.max_hypotheses]
    statistics: dict[str, Any] = {
        name: getattr(found, name) for name in ("delta", "mean_in", "mean_out", "d", "z", "p")
    }
    hypotheses = [
        Hypothesis(
            view=view,
            condition=int(i) if view in CONDITIONAL else -1,
            response=int(j),
            q=float(q[i, j]),
            halves=(float(found.halves[0, i, j]), float(found.halves[1, i, j])),
            n_in=int(found.n_in[i, 0]),
            **{name: values[i, j].item() for name, values in statistics.items()},
        )
        for i, j in kept[order]
    ]
    return hypotheses, int(np.isfinite(p).sum())


@dataclass(frozen=True)
class Analysis:
    """What the analysis of a harvest found.

    Attributes:
        settings: The constants it was made with.
        n_rows: Number of pairs.
        hypotheses: Those of each view together, `global`, `single`, `feature`, `prompt`, the strongest of each view first.
        clusters: Features of each cluster: `feature` (`T_m`), `prompt` (`A_k`), `response` (`R_m`) and `single`, the features of that view.
        rows: `(n_rows,)` int64, row numbers in the source dataset.
        data_clusters: `(n_rows,)` int32, the data cluster of each row, -1 where it is silent.
        typicality: `(n_rows,)` float32, cosine of each row's activity to the centroid that is nearest.
        leading: The rows that express each prompt cluster `A_k` most.
        delta_sd: `(d_sae,)`, standard deviation of each feature's delta of frequency, in which `R_m` are scored.
        tested: How many hypotheses each view tested, over which its q values are.
        attributions: What the hypotheses come to, as [`~shapedpo.audit.analysis.lessons.lessons`] has it.
    """

    settings: AuditSettings
    n_rows: int
    hypotheses: list[Hypothesis]
    clusters: dict[str, list[list[int]]]
    rows: NDArray[np.int64] = field(repr=False)
    data_clusters: NDArray[np.int32] = field(repr=False)
    typicality: NDArray[np.float32] = field(repr=False)
    leading: Leading = field(repr=False)
    delta_sd: NDArray[np.float64] = field(repr=False)
    tested: dict[str, int] = field(default_factory=dict)
    attributions: list[Attribution] = field(default_factory=list)

    def of(self, view: View) -> list[Hypothesis]:
        """The hypotheses of one view, the strongest first."""
        return [hypothesis for hypothesis in self.hypotheses if hypothesis.view == view]

    def response_features(self, hypothesis: Hypothesis) -> list[int]:
        """Features of a hypothesis' response cluster."""
        kind, number = hypothesis.response_cluster
        return self.clusters[kind][number]

    def predicted_as(self, hypothesis: Hypothesis) -> tuple[str, int, str, int]:
        """Kind, number, view and condition of a hypothesis' line in a [`~shapedpo.audit.prediction.run.Prediction`]."""
        kind, number = hypothesis.response_cluster
        if kind == "single":
            return "feature", self.clusters[kind][number][0], "global", -1
        return f"{kind}_cluster", number, hypothesis.view, hypothesis.condition

    def condition_features(self, hypothesis: Hypothesis) -> list[int]:
        """Features of a hypothesis' prompt cluster; none in the other views."""
        return self.clusters["prompt"][hypothesis.condition] if hypothesis.view == "prompt" else []

    def exemplars(self, data_cluster: int, n: int = 10) -> NDArray[np.int64]:
        """The rows nearest a data cluster's centroid."""
        members = np.flatnonzero(self.data_clusters == data_cluster)
        return self.rows[members[np.argsort(-self.typicality[members], kind="stable")[:n]]]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write it as plain files, [`FILES`]: JSON, Parquet for what has a line a row, arrays as safetensors.

        What an earlier analysis left in the folder goes first, also what was predicted from it: a kill half-way leaves no analysis rather than
        parts of two.
        """
        from safetensors.numpy import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for stale in (folder / FILES[-1], *folder.glob("*.parquet")):
            stale.unlink(missing_ok=True)
        plain = [
            {key: value for key, value in vars(h).items() if key not in ("rows", "contributions")}
            for h in self.hypotheses
        ]
        write_json(folder / "clusters.json", self.clusters)
        write_json(folder / "settings.json", asdict(self.settings))
        write_json(
            folder / "lessons.json",
            [{"hypotheses": one.hypotheses, "told_by_prompt": one.told_by_prompt} for one in self.attributions],
        )
        responsible = {
            "hypothesis": numbered([h.rows for h in self.hypotheses]),
            "row": joined([h.rows for h in self.hypotheses], np.int64),
            "contribution": joined([h.contributions for h in self.hypotheses], np.float32),
        }
        write_table(folder / "rows.parquet", responsible)
        taught = {
            "lesson": numbered([lesson.rows for lesson in self.attributions]),
            "row": joined([lesson.rows for lesson in self.attributions], np.int64),
            "log_odds": joined([lesson.log_odds for lesson in self.attributions], np.float32),
        }
        write_table(folder / "lessons.parquet", taught)
        data = {"row": self.rows, "data_cluster": self.data_clusters, "typicality": self.typicality}
        write_table(folder / "data.parquet", data)
        leading = {"scores": self.leading.scores, "rows": self.leading.rows}
        with replacing(folder / "conditions.safetensors") as partial:
            save_file({**leading, "delta_sd": self.delta_sd}, partial)
        write_json(folder / "hypotheses.json", {"n_rows": self.n_rows, "tested": self.tested, "hypotheses": plain})

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Analysis:
        """Read what [`Analysis.save`] wrote.

        Raises:
            FileNotFoundError: If a file is missing; the text names it.
            ValueError: If one is damaged.
        """
        folder = Path(folder)
        if missing := [name for name in FILES if not (folder / name).is_file()]:
            what = "" if len(missing) == len(FILES) else f": {', '.join(missing)} missing"
            raise FileNotFoundError(
                f"'{folder}' holds no analysis{what}. Run the same `shapedpo audit` (again): what it has read is kept."
            )
        try:
            return cls._read(folder)
        except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
            raise ValueError(
                f"The analysis in '{folder}' is damaged ({type(error).__name__}: {error}). Run the same `shapedpo audit` again: what it has read "
                "is kept."
            ) from error

    @classmethod
    def _read(cls, folder: Path) -> Analysis:
        import pyarrow.parquet as pq
        from safetensors.numpy import load_file

        found = json.loads((folder / "hypotheses.json").read_text(encoding="utf-8"))
        responsible = parts(folder / "rows.parquet", len(found["hypotheses"]))
        hypotheses = [
            Hypothesis(**{**plain, "halves": tuple(plain["halves"])}, rows=rows, contributions=contributions)
            for plain, (rows, contributions) in zip(found["hypotheses"], responsible, strict=True)
        ]
        lessons = json.loads((folder / "lessons.json").read_text(encoding="utf-8"))
        taught = parts(folder / "lessons.parquet", len(lessons))
        settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        data = pq.ParquetFile(folder / "data.parquet").read()
        known = {f.name for f in fields(AuditSettings)}
        settings = AuditSettings(**{key: value for key, value in settings.items() if key in known})
        where = load_file(folder / "conditions.safetensors")
        return cls(
            settings=settings,
            n_rows=found["n_rows"],
            hypotheses=hypotheses,
            clusters=json.loads((folder / "clusters.json").read_text(encoding="utf-8")),
            rows=data["row"].to_numpy(),
            data_clusters=data["data_cluster"].to_numpy(),
            typicality=data["typicality"].to_numpy(),
            leading=Leading(where["rows"].shape[1], settings.prompt_rows, where["scores"], where["rows"]),
            delta_sd=where["delta_sd"],
            tested=found["tested"],
            attributions=[
                Attribution(**plain, rows=part[0], log_odds=part[1])
                for plain, part in zip(lessons, taught, strict=True)
            ],
        )
