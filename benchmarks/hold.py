"""`action="hold"`: does a concept stay where it was while the rest is learned, with no strength given?

    python -m benchmarks.hold [--quick] [--only lab/goblin] [--finished] [--fresh]

Three worlds. In two of the lab, the goblin world (`shapedpo.lab.goblin_world`) and one of forms ([`FORMS`]), five lessons are taught and one of them
is held, each in turn; in the stories (`benchmarks.stories`) dialogue is. Each run is laid beside a plain one of the same seed and learning rate, at the
world's own learning rate and half a decade below and above. `sparing` is the same run with all other lessons in the concept's `spare`; `rollouts` with `probe_steps` set,
so that rollouts correct the controller; `by probe` with an attention probe (`benchmarks/case_studies/probes.py`) in place of the lab's features. For
comparison, `its rows out` is plain DPO without the rows that teach the trait, which only who wrote the data can leave out.

Finished runs are kept in `benchmarks/results/runs/hold.jsonl`, by settings, by what the controller does and by the lab's features, so that a study that was
cut off goes on.
The stories need `SHAPEDPO_STORIES`, as for `benchmarks.stories`; without the model they are left out.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import controller, folders, stories
from benchmarks.folders import add_out, out_folder
from benchmarks.record import Record, key_of, record_of
from benchmarks.training import train


PACKAGE = Path(__file__).parents[1] / "shapedpo"
FORMS = ("table", "em_dash", "link", "praise", "horizontal_rule")
"""Of the second world of the lab, each in 5 % of the pairs."""
TRAITS = {"lab": ("goblin", "cheerfulness", "emoji", "bold", "hedging"), "forms": FORMS}
"""What the worlds of the lab teach."""
MEASURED = 3000
"""Held-out rollouts by which a run in the lab is measured."""
EARLIER = folders.RESULTS / "runs" / "hold-earlier.csv"
"""Lines of runs that were made before single runs were kept, in the lab with 1,000 rollouts, with the controller that is [`EARLIER_CONTROLLER`]."""
EARLIER_CONTROLLER = ("3f0ca075", "e9f7bfa3")
WANTED = ("mom", "friend")
ROWS_OUT = "its rows out"
ROLLOUTS = {"probe_steps": 50, "probe_prompts": 200, "probe_max_new_tokens": 64}


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        world: `lab`, `forms` or `stories`.
        held: The trait that is held; none in a plain run.
        rate: Factor of the world's learning rate; 0 for the model before training.
        seed: Of data and training.
        how: In what the run differs from the defaults: `sparing`, `rollouts`, `by probe`, or several of them; or [`ROWS_OUT`].
        quick: Whether at the small size.
    """

    world: str
    held: str | None = None
    rate: float = 1.0
    seed: int = 0
    how: str = ""
    quick: bool = False

    @property
    def name(self) -> str:
        what = "before" if self.rate == 0 else "plain" if self.held is None else self.held
        return f"{self.world}/{what}{self.how and f' {self.how}'} lr x {self.rate:g} seed {self.seed}"

    @property
    def holds(self) -> bool:
        return self.held is not None and self.how != ROWS_OUT

    @property
    def rollouts(self) -> bool:
        return "rollouts" in self.how


class Lab:
    """A world of the lab."""

    def __init__(self, job: Job) -> None:
        from shapedpo import lab

        self.world, self.job = lab.goblin_world(job.seed, 1500 if job.quick else 5000), job
        if job.world == "forms":
            lessons = tuple(lab.Lesson(trait, rate=0.05) for trait in FORMS)
            self.world = replace(self.world, lessons=lessons, unwanted=FORMS[0])
        self.model, self.tokenizer, self.data = lab.load_model(), lab.load_tokenizer(), self.world.dataset()
        if job.how == ROWS_OUT:
            self.data = self.data.filter(lambda row: job.held not in row["planted"])
        self.settings = {**self.world.dpo, "learning_rate": self.world.dpo["learning_rate"] * job.rate}

    def concepts(self, held: str) -> list[Any]:
        from benchmarks.case_studies.probes import probe
        from shapedpo import Concept, lab

        others = [trait for trait in TRAITS[self.job.world] if trait != held] if "sparing" in self.job.how else []
        readout = probe(held) if "by probe" in self.job.how else lab.concept(held).readout
        return [Concept(held, readout, "hold", spare=others), *map(lab.concept, others)]

    def heldout(self) -> Any:
        from shapedpo import lab

        return lab.preference_data(self.world.lessons, 400, self.job.seed + 7)

    def rates(self, model: Any) -> dict[str, float]:
        from shapedpo import lab

        prompts = lab.heldout_prompts(400 if self.job.quick else MEASURED, self.job.seed + 1)
        texts = lab.rollouts(model, self.tokenizer, prompts, seed=self.job.seed + 2)
        return {name: rate.rate for name, rate in lab.trait_rates(texts, TRAITS[self.job.world]).items()}


class Stories:
    """The stories with a planted preference for dialogue."""

    def __init__(self, job: Job) -> None:
        from datasets import Dataset

        self.job = job
        base = stories.QUICK if job.quick else stories.Recipe()
        self.recipe = stories.Recipe(**{**asdict(base), "seed": job.seed})
        self.world = stories.cached_world(self.recipe)
        self.model, self.tokenizer = stories.load()
        self.data = Dataset.from_list(self.world.pairs)
        self.settings = {
            "num_train_epochs": self.recipe.epochs,
            "per_device_train_batch_size": self.recipe.batch,
            "learning_rate": self.recipe.learning_rate * job.rate,
            "beta": self.recipe.beta,
        }

    def concepts(self, held: str) -> list[Any]:
        from shapedpo import Concept, Regex

        others = [trait for trait in stories.REWARDS if trait != held] if "sparing" in self.job.how else []
        features = stories.choose_features(self.world)[0]
        return [
            *stories.concept(self.world, features, action="hold", spare=others),
            *(Concept(trait, Regex(stories.REWARDS[trait][0])) for trait in others),
        ]

    def heldout(self) -> Any:
        from datasets import Dataset

        return Dataset.from_list(
            [{"prompt": prompt, "chosen": " a", "rejected": " b"} for prompt in self.world.heldout]
        )

    def rates(self, model: Any) -> dict[str, float]:
        return stories.heldout_rates(self.world, model)


def run(job: Job) -> dict[str, Any]:
    """Trains and measures; returns rates, strengths and time."""
    world = Stories(job) if job.world == "stories" else Lab(job)
    result: dict[str, Any] = {"strengths": [], "seconds": 0.0}
    if job.rate:
        started = time.perf_counter()
        trainer = train(
            world.model,
            world.tokenizer,
            world.data,
            world.settings,
            world.concepts(str(job.held)) if job.holds else None,
            job.seed,
            heldout=world.heldout() if job.rollouts else None,
            **(ROLLOUTS if job.rollouts else {}),
        )
        result["seconds"] = time.perf_counter() - started
        strength = f"concepts/{job.held}/strength"
        result["strengths"] = [entry[strength] for entry in trainer.state.log_history if strength in entry]
    result["rates"] = world.rates(world.model)
    return result


def key(job: Job) -> str:
    """What a run's result is kept under."""
    depends: list[Any] = [asdict(job)]
    if job.world in TRAITS:
        depends.append(MEASURED)
    if job.holds:
        features = json.loads((PACKAGE / "lab" / "assets" / "features.json").read_text())["traits"]
        depends += [
            controller.fingerprint(job.rollouts),
            {trait: entry["features"] for trait, entry in features.items()},
        ]
    if job.rollouts:
        depends.append(ROLLOUTS)
    return key_of(depends)


@functools.cache
def record(quick: bool) -> Record:
    """Where results are kept."""
    return record_of("hold", quick)


def result(job: Job, fresh: bool = False) -> dict[str, Any]:
    """[`run`], or what an earlier call found."""
    return record(job.quick).made(key(job), lambda: {"job": asdict(job), **run(job)}, fresh)


def jobs(quick: bool) -> Iterator[Job]:
    """The held runs of the table; each is compared with its plain run."""
    if quick:
        yield Job("lab", "goblin", quick=True)
        yield Job("stories", "dialogue", quick=True)
        return
    rates = (1.0, 10**0.5, 10**-0.5)
    for rate in rates:
        yield Job("stories", "dialogue", rate)
    yield Job("stories", "dialogue", seed=1)
    for seed in (0, 1):
        for world, traits in TRAITS.items():
            for trait in traits:
                yield Job(world, trait, seed=seed)
    for world, traits in TRAITS.items():
        for trait in traits:
            yield Job(world, trait, how=ROWS_OUT)
    yield Job("forms", "praise", how="by probe")
    for trait in TRAITS["lab"]:
        yield Job("lab", trait, how="sparing")
    for rate in rates[1:]:
        yield Job("lab", "goblin", rate)
    for rate in rates:
        yield Job("stories", "dialogue", rate, how="sparing")
    for rate in rates:
        yield Job("stories", "dialogue", rate, how="rollouts")
    for trait in TRAITS["lab"]:
        yield Job("lab", trait, how="rollouts")


@dataclass(frozen=True)
class Kept:
    """The share of plain DPO's change that a held run brings too, with the spread (sd) that sampling gives it."""

    share: float
    sd: float

    @classmethod
    def of(cls, before: float, plain: float, held: float, n: int) -> Kept:
        """From the three rates, each of `n` rollouts."""
        share = (held - before) / (plain - before)
        spread = zip((1 - share, share, 1.0), (before, plain, held), strict=True)
        variance = sum(factor**2 * rate * (1 - rate) / n for factor, rate in spread)
        return cls(share, math.sqrt(variance) / abs(plain - before))

    @classmethod
    def mean(cls, parts: Sequence[Kept]) -> Kept:
        sd = math.sqrt(sum(part.sd**2 for part in parts)) / len(parts)
        return cls(statistics.fmean(part.share for part in parts), sd)

    def __str__(self) -> str:
        low, high = (100 * (self.share + side * 1.96 * self.sd) for side in (-1, 1))
        return f"{100 * self.share:.0f} ({low:.0f} to {high:.0f})"


def row(job: Job, find: Callable[[Job], dict[str, Any]]) -> dict[str, Any]:
    """A line of the table: the held run beside the model before and the plain run."""
    assert job.held is not None
    same = {"world": job.world, "seed": job.seed, "quick": job.quick}
    before, plain = find(Job(rate=0.0, **same))["rates"], find(Job(rate=job.rate, **same))["rates"]  # type: ignore[arg-type]
    found = find(job)
    rates: dict[str, float] = found["rates"]
    strengths: list[float] = found["strengths"] or [0.0]
    largest = max(strengths, key=abs)
    if job.world in TRAITS:
        n = 400 if job.quick else MEASURED
        parts = {
            trait: Kept.of(before[trait], plain[trait], rates[trait], n)
            for trait in TRAITS[job.world]
            if trait != job.held
        }
        least = min(parts, key=lambda trait: parts[trait].share)
        others = {"others kept, %": str(Kept.mean([*parts.values()])), "least kept, %": f"{least} {parts[least]}"}
    else:
        points = {name: 100 * (rates[name] - plain[name]) for name in WANTED}
        others = {
            "others kept, %": ", ".join(f"{name} {less:+.1f} points" for name, less in points.items()),
            "least kept, %": "",
        }
    return {
        "world": job.world,
        "held": job.held + (job.how and f", {job.how}"),
        "learning rate": f"x {job.rate:.2g}",
        "seed": job.seed,
        "before": round(100 * before[job.held], 1),
        "plain": round(100 * plain[job.held], 1),
        "hold": round(100 * rates[job.held], 1),
        "off by": round(100 * (rates[job.held] - before[job.held]), 1),
        **others,
        "strength (median)": round(statistics.median(strengths), 1),
        "strength (largest)": round(largest, 1),
        "seconds": round(found["seconds"]),
    }  # fmt: skip


def earlier(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of [`EARLIER`] that no run has replaced, while the controller does what it did."""
    if (controller.fingerprint(), controller.fingerprint(corrected=True)) != EARLIER_CONTROLLER:
        return []
    of = ("world", "held", "learning rate", "seed")
    there = {tuple(str(row[name]) for name in of) for row in rows}
    with EARLIER.open(newline="") as file:
        return [row for row in csv.DictReader(file) if tuple(row[name] for name in of) not in there]


def write(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """The table, as CSV and Markdown."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "hold.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    lines = [
        f"`before`, `plain` and `hold`: % of held-out rollouts ({MEASURED:,} in the lab, 1,600 stories) that show the held trait; `off by`: hold "
        "less before, in points. `others kept`: in the lab, how much of plain DPO's change the other four lessons keep, in the mean, and the one that keeps "
        "least, with 95 % intervals of the sampling of rollouts (the least of four is low by chance, too), or, of lines that were made earlier and by 1,000 "
        "rollouts, the range of the four; in the stories, the wanted traits less plain DPO's. Defaults throughout.",
        "",
        "| " + " | ".join(rows[0]) + " |",
        "| " + " | ".join("---" for _ in rows[0]) + " |",
    ]
    lines += ["| " + " | ".join(str(value) for value in line.values()) + " |" for line in rows]
    (out / "hold.md").write_text("\n".join(lines) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hold", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one small run of each world")
    parser.add_argument("--only", nargs="+", help="runs whose name begins so, such as lab/goblin")
    parser.add_argument("--finished", action="store_true", help="no new runs: the table of what is in the cache")
    parser.add_argument("--fresh", action="store_true", help="do not take finished runs from the cache")
    add_out(parser)
    options = parser.parse_args(arguments)
    out = out_folder(options, folders.CACHE / "quick")
    found: dict[Job, dict[str, Any]] = {}

    def find(job: Job) -> dict[str, Any]:
        if job not in found:
            found[job] = result(job, options.fresh)
        return found[job]

    rows = []
    for job in jobs(options.quick):
        if options.only and not any(job.name.startswith(start) for start in options.only):
            continue
        needed = job, replace(job, held=None, how=""), replace(job, held=None, how="", rate=0.0)
        if options.finished and not all(record(one.quick).find(key(one)) for one in needed):
            continue
        if job.world == "stories" and not stories.MODEL.is_dir():
            print(f"left out, as there is no model at {stories.MODEL}: {job.name}")
            continue
        rows.append(row(job, find))
        print(rows[-1], flush=True)
        write([*rows, *([] if options.quick else earlier(rows))], out)


if __name__ == "__main__":
    main()
