"""From finding to fix, as a user goes who knows nothing of the data: audit, fix what is found, train, and look.

    python -m benchmarks.remedies [--pairs 5000] [--seeds 2] [--together] [--finished]

The lab's data with the lessons of `benchmarks/planted.py`. `shapedpo audit` reads it; `shapedpo fix` writes, for all findings together and for those about one thing, a recipe that holds them and a dataset without their
rows; `shapedpo train` trains on each. What was planted is looked at only to say which findings are about one thing, and how often the models
show it on held-out prompts. Commands, recipes, features, gates and rows are the ones that the tool comes up with. Finished runs are kept in
`benchmarks/cache/remedies/` (to be removed where audit, fix or training have changed). Writes `benchmarks/results/remedies.md` and a picture.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import folders
from benchmarks.planted import CASES, planted_rows
from shapedpo import lab
from shapedpo.lab.measures import Prompt


CACHE = folders.CACHE / "remedies"
RESULT = "remedies"
LESSONS = CASES[:4]
"""The odd fiction is too rare to be found at this size."""
SETTINGS = {
    "model_name_or_path": "lab",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "report_to": "none",
}
"""Of a run, beside how the demo trains."""
EVERYWHERE = "everywhere"
BEFORE, PLAIN, HELD, DROPPED = "before", "plain DPO", "held", "rows dropped"


@dataclass(frozen=True)
class Remedy:
    """One model.

    Attributes:
        how: It was trained; [`BEFORE`] is the model that is trained.
        findings: Numbers of those that something is done about.
    """

    how: str
    findings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return "-".join([self.how.replace(" ", "-"), *self.findings])


def shapedpo(*arguments: object, folder: Path) -> None:
    """Runs a command of the tool in a folder.

    Raises:
        RuntimeError: If it fails, with the end of what it said.
    """
    environment = {**os.environ, "PYTHONPATH": str(folders.REPOSITORY), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "shapedpo", *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"shapedpo {' '.join(map(str, arguments))} failed:\n{done.stderr[-2000:]}")


def audited(folder: Path, pairs: int, seed: int) -> dict[str, str]:
    """Audits the data, if that was not done before.

    Returns:
        The planted lesson that each of the audit's findings is about, by the finding's number; empty if it is about none.
    """
    import yaml

    from shapedpo.audit.analysis.hypotheses import Analysis
    from shapedpo.audit.analysis.lessons import lessons
    from shapedpo.audit.folder import ANALYSIS

    folder.mkdir(parents=True, exist_ok=True)
    data = lab.preference_data(CASES, pairs, seed)
    if not (folder / "audit" / "summary.txt").exists():
        data.remove_columns(["planted", "topic"]).to_parquet(folder / "pairs.parquet")
        recipe = {**SETTINGS, **lab.goblin_world().dpo, "dataset_name": "pairs.parquet", "seed": seed}
        (folder / "base.yaml").write_text(yaml.safe_dump(recipe))
        shapedpo(
            "audit", "--model", "lab", "--sae", "lab", "--dataset", "pairs.parquet", "--out", "audit", folder=folder
        )
    planted = planted_rows(data)
    about = {}
    for number, lesson in enumerate(lessons(Analysis.load(folder / "audit" / ANALYSIS)), 1):
        rows = set(lesson.evidence.tolist())
        about[str(number)] = next((name for name, there in planted.items() if 2 * len(rows & there) > len(rows)), "")
    return about


def trained(folder: Path, remedy: Remedy) -> Path | str:
    """The model of a remedy, by what `fix` writes for its findings."""
    if remedy.how == BEFORE:
        return "lab"
    config, extra, output = "base.yaml", [], f"{remedy.name}-model"
    fix = ["fix", "audit", "--no-preview", "--finding", *remedy.findings]
    if remedy.how == HELD:
        config = f"{remedy.name}.yaml"
        (folder / config).unlink(missing_ok=True)
        shapedpo(*fix, "--config", "base.yaml", "--recipe-out", config, folder=folder)
    elif remedy.how == DROPPED:
        extra = ["--dataset_name", f"{remedy.name}.parquet"]
        (folder / extra[1]).unlink(missing_ok=True)
        shapedpo(*fix, "--dataset-out", extra[1], folder=folder)
    shapedpo("train", "--config", config, *extra, "--output_dir", output, "--disable_tqdm", "true", folder=folder)
    return folder / output


def prompts(n: int, seed: int) -> dict[str, list[Prompt]]:
    """Held-out prompts of each lesson's topic, and of all topics."""
    topics = [lesson.when for lesson in LESSONS if lesson.when]
    return {
        EVERYWHERE: lab.heldout_prompts(2 * n, seed),
        **{topic: lab.heldout_prompts(n, seed, topic) for topic in topics},
    }


def measured(model: Path | str, n: int, seed: int) -> dict[str, Any]:
    """`rates` of traits by group of prompts, and `capability`."""
    from transformers import AutoModelForCausalLM

    tokenizer = lab.load_tokenizer()
    network = lab.load_model() if model == "lab" else AutoModelForCausalLM.from_pretrained(model)
    rates = {}
    for group, asked in prompts(n, seed + 1).items():
        texts = lab.rollouts(network, tokenizer, asked, seed=seed + 2)
        rates[group] = {name: rate.rate for name, rate in lab.trait_rates(texts).items()}
    return {"rates": rates, "capability": lab.capability(network, tokenizer).rate}


def remedies(about: dict[str, str], together: bool) -> list[Remedy]:
    """What is tried: nothing, all findings, and with `together` not set those about one lesson, lesson by lesson."""
    of_lesson = [
        tuple(number for number, name in about.items() if name == one) for one in dict.fromkeys(about.values())
    ]
    chosen = [tuple(about)] if together else [tuple(about), *of_lesson]
    return [Remedy(BEFORE), Remedy(PLAIN), *(Remedy(how, which) for which in chosen for how in (HELD, DROPPED))]


def study(pairs: int, seed: int, n: int, together: bool = False, finished: bool = False) -> dict[str, Any]:
    """All remedies of one dataset.

    Args:
        pairs: Of the dataset.
        seed: Of data, training and rollouts.
        n: Prompts of each topic.
        together: Whether only all findings together are fixed.
        finished: Whether to leave out what was not run yet.

    Returns:
        `about`: see [`audited`]; `runs`: of each [`Remedy`], `rates` and `capability`.
    """
    folder = CACHE / f"{pairs}-{seed}"
    about = audited(folder, pairs, seed)
    runs = []
    for remedy in remedies(about, together):
        kept = folder / f"{remedy.name}-{n}.json"
        if not kept.exists():
            if finished:
                continue
            kept.write_text(json.dumps(measured(trained(folder, remedy), n, seed), indent=1))
            print(remedy.name, "done", flush=True)
        runs.append({**asdict(remedy), **json.loads(kept.read_text())})
    return {"pairs": pairs, "seed": seed, "about": about, "runs": runs}


def name(lesson: lab.Lesson) -> str:
    """As [`planted_rows`] has it."""
    return f"{lesson.name}, {lesson.when}" if lesson.when else lesson.name


def rate(run: dict[str, Any], lesson: lab.Lesson) -> float:
    """How often a model shows what a lesson is about, where the lesson is taught: percent."""
    return 100 * float(run["rates"][lesson.when or EVERYWHERE][lesson.trait])


def whole(found: dict[str, Any], run: dict[str, Any]) -> bool:
    """Whether nothing was done, or something about all findings."""
    return len(run["findings"]) in (0, len(found["about"]))


def table(found: dict[str, Any]) -> list[str]:
    """One row a model, one column a lesson; what was to stay as before is bold."""
    head = ["", *(f"{one.trait}{f' ({one.when})' if one.when else ''}" for one in LESSONS), "capability"]
    lines = [f"| {' | '.join(head)} |", "| --- |" + " ---: |" * (len(head) - 1)]
    for run in found["runs"]:
        fixed = {found["about"][number] for number in run["findings"]}
        which = (
            "all findings"
            if len(run["findings"]) == len(found["about"])
            else f"finding {' and '.join(run['findings'])}"
        )
        marks = ["**" if name(lesson) in fixed else "" for lesson in LESSONS]
        cells = [f"{mark}{rate(run, one):.1f}{mark}" for mark, one in zip(marks, LESSONS, strict=True)]
        label = f"{run['how']}: {which}" if run["findings"] else run["how"]
        lines.append(f"| {label} | {' | '.join(cells)} | {100 * run['capability']:.1f} |")
    return lines


def report(studies: Sequence[dict[str, Any]], n: int) -> str:
    """What is written."""
    lines = [
        "From finding to fix (`python -m benchmarks.remedies`): what `shapedpo audit` finds in the lab's data, and what comes of training with what",
        "`shapedpo fix` writes for it: a recipe that holds the findings, or the data without their rows. Per cent of rollouts that show what was planted, on held-out",
        f"prompts of its topic ({n}; of everywhere {2 * n}); bold where something was done about it, so that it should be as before DPO; elsewhere it should be as plain",
        "DPO has it. Commands, features, gates and rows are the tool's own; what was planted only says what to look at.",
    ]
    for found in studies:
        about = ", ".join(
            f"{number} {lesson or 'nothing that was planted'}" for number, lesson in found["about"].items()
        )
        lines += ["", f"{found['pairs']:,} pairs, seed {found['seed']}. Findings: {about}.", "", *table(found)]
    return "\n".join(lines) + "\n"


def picture(studies: Sequence[dict[str, Any]], n: int) -> Any:
    """Bars of each lesson, before, after plain DPO and with all findings fixed either way: means over datasets, with Wilson's intervals."""
    from matplotlib.figure import Figure

    chart = Figure(figsize=(9, 3.6), layout="constrained")
    axes = chart.subplots()
    looks = {BEFORE: "0.75", PLAIN: "tab:orange", DROPPED: "tab:green", HELD: "tab:blue"}
    for place, (how, color) in enumerate(looks.items()):
        runs = [run for found in studies for run in found["runs"] if run["how"] == how and whole(found, run)]
        for position, lesson in enumerate(LESSONS):
            trials = len(runs) * (n if lesson.when else 2 * n)
            share = sum(rate(run, lesson) for run in runs) / len(runs)
            found = lab.Rate.of(round(share / 100 * trials), trials)
            x = position + (place - 1.5) * 0.21
            error = [[100 * (found.rate - found.low)], [100 * (found.high - found.rate)]]
            label = {HELD: "findings held", DROPPED: "their rows dropped"}.get(how, how) if not position else None
            axes.bar(x, share, width=0.2, color=color, yerr=error, capsize=2, label=label)
            axes.annotate(
                f"{share:.0f}", (x, 100 * found.high), (0, 2), textcoords="offset points", ha="center", fontsize=8
            )
    titles = [f"{one.trait}\n{'on ' + one.when.replace('_', ' ') if one.when else 'everywhere'}" for one in LESSONS]
    axes.set_xticks(range(len(LESSONS)), titles)
    axes.set_ylabel("% of held-out rollouts")
    axes.set_ylim(0, 100)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=4, loc="upper center")
    return chart


def main(arguments: Sequence[str] | None = None) -> None:
    """The benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5000)
    parser.add_argument("--seeds", type=int, default=1, help="how many, from 0")
    parser.add_argument("--prompts", type=int, default=200, help="of each topic (%(default)s)")
    parser.add_argument("--together", action="store_true", help="only all findings at once")
    parser.add_argument("--finished", action="store_true", help="only report the runs that are there")
    parser.add_argument("--out", type=Path, default=folders.RESULTS, help="folder of the table")
    options = parser.parse_args(arguments)
    studies = [
        study(options.pairs, seed, options.prompts, options.together, options.finished) for seed in range(options.seeds)
    ]
    text = report(studies, options.prompts)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{RESULT}.md").write_text(text, encoding="utf-8")
    picture(studies, options.prompts).savefig(options.out / f"{RESULT}.png", dpi=100)
    print(text)


if __name__ == "__main__":
    main()
