"""From finding to fix, as a user goes who knows nothing of the data: audit, fix what is found, train, and look.

    python -m benchmarks.remedies [--pairs 5000] [--seeds 0] [--finished]

The lab's data with the lessons of `benchmarks/planted.py`. `shapedpo audit` reads it; `shapedpo fix` writes, for each finding and for all of them
together, a recipe that holds it and a dataset without its rows; `shapedpo train` trains on each. What was planted is looked at only to
say, of held-out prompts, how often the models show what each lesson is about. Commands, recipes and readouts are the ones that the tool comes up
with. Finished runs are kept in `benchmarks/cache/remedies/`. Writes `benchmarks/results/remedies.md`.
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
RESULT = "remedies.md"
LESSONS = CASES[:4]
"""The odd fiction is too rare to be found at this size."""
DPO = {
    "model_name_or_path": "lab",
    "beta": 0.1,
    "learning_rate": 2e-4,
    "lr_scheduler_type": "linear",
    "warmup_steps": 10,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 16,
    "max_length": 160,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "report_to": "none",
}
"""That of the demo."""
EVERYWHERE = "everywhere"
ALL = "all findings"


@dataclass(frozen=True)
class Remedy:
    """One model: `how` it was trained, `before` being the one that is trained, and what was done about which finding."""

    how: str
    finding: str = ""


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
        (folder / "base.yaml").write_text(yaml.safe_dump({**DPO, "dataset_name": "pairs.parquet", "seed": seed}))
        shapedpo(
            "audit", "--model", "lab", "--sae", "lab", "--dataset", "pairs.parquet", "--out", "audit", folder=folder
        )
    planted = planted_rows(data)
    about = {}
    for number, lesson in enumerate(lessons(Analysis.load(folder / "audit" / ANALYSIS)), 1):
        rows = set(lesson.evidence.tolist())
        about[str(number)] = next((name for name, there in planted.items() if 2 * len(rows & there) > len(rows)), "")
    return about


def trained(folder: Path, remedy: Remedy, findings: Sequence[str]) -> Path | str:
    """The model of a remedy, by what `fix` writes for its findings."""
    if remedy.how == "before":
        return "lab"
    numbers = list(findings) if remedy.finding == ALL else [remedy.finding]
    name = f"{remedy.how} {remedy.finding}".strip().replace(" ", "-")
    config, extra = "base.yaml", []
    fix = ["fix", "audit", "--no-preview", "--finding", *numbers]
    if remedy.how == "held":
        config = f"{name}.yaml"
        if not (folder / config).exists():
            shapedpo(*fix, "--base", "base.yaml", "--recipe", config, folder=folder)
    elif remedy.how == "rows dropped":
        extra = ["--dataset_name", f"{name}.parquet"]
        if not (folder / extra[1]).exists():
            shapedpo(*fix, "--dataset-out", extra[1], folder=folder)
    shapedpo("train", "--config", config, *extra, "--output_dir", name, "--disable_tqdm", "true", folder=folder)
    return folder / name


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


def study(pairs: int, seed: int, n: int, finished: bool = False) -> dict[str, Any]:
    """All remedies of one dataset.

    Args:
        pairs: Of the dataset.
        seed: Of data, training and rollouts.
        n: Prompts of each topic.
        finished: Whether to leave out what was not run yet.

    Returns:
        `about`: see [`audited`]; `runs`: of each [`Remedy`], `rates` and `capability`.
    """
    folder = CACHE / f"{pairs}-{seed}"
    about = audited(folder, pairs, seed)
    findings = list(about)
    todo = [Remedy("before"), Remedy("plain DPO")]
    todo += [Remedy(how, which) for which in (ALL, *findings) for how in ("held", "rows dropped")]
    runs = []
    for remedy in todo:
        kept = folder / f"{remedy.how}-{remedy.finding}-{n}.json".replace(" ", "-")
        if not kept.exists():
            if finished:
                continue
            kept.write_text(json.dumps(measured(trained(folder, remedy, findings), n, seed), indent=1))
            print(remedy, "done", flush=True)
        runs.append({**asdict(remedy), **json.loads(kept.read_text())})
    return {"pairs": pairs, "seed": seed, "about": about, "runs": runs}


def rate(run: dict[str, Any], lesson: lab.Lesson) -> float:
    """How often a model shows what a lesson is about, where the lesson is taught: percent."""
    return 100 * float(run["rates"][lesson.when or EVERYWHERE][lesson.trait])


def table(found: dict[str, Any]) -> list[str]:
    """One row a model, one column a lesson."""
    head = ["", *(f"{lesson.trait}{f' ({lesson.when})' if lesson.when else ''}" for lesson in LESSONS), "capability"]
    lines = [f"| {' | '.join(head)} |", "| --- |" + " ---: |" * (len(head) - 1)]
    numbers = {name: number for number, name in found["about"].items()}
    for run in found["runs"]:
        own = run["finding"]
        label = f"{run['how']}{f': {own}' if own == ALL else f': finding {own}' if own else ''}"
        cells = []
        for lesson in LESSONS:
            name = f"{lesson.name}, {lesson.when}" if lesson.when else lesson.name
            fixed = own == ALL or (own and own == numbers.get(name))
            cells.append(f"**{rate(run, lesson):.1f}**" if fixed else f"{rate(run, lesson):.1f}")
        lines.append(f"| {label} | {' | '.join(cells)} | {100 * run['capability']:.1f} |")
    return lines


def report(studies: Sequence[dict[str, Any]], n: int) -> str:
    """What is written."""
    lines = [
        "From finding to fix (`python -m benchmarks.remedies`): what `shapedpo audit` finds in the lab's data, and what comes of training with what",
        "`shapedpo fix` writes for it: a recipe that holds the finding, or the data without its rows. Per cent of rollouts that show what was planted, on held-out",
        f"prompts of its topic ({n}; of everywhere {2 * n}); bold where the finding is about it, so that it should be as before DPO; elsewhere it should be as plain",
        "DPO has it. Commands, features, gates and rows are the tool's own; what was planted only says what to look at.",
    ]
    for found in studies:
        about = ", ".join(f"{number} {name or 'nothing that was planted'}" for number, name in found["about"].items())
        lines += ["", f"{found['pairs']:,} pairs, seed {found['seed']}. Findings: {about}.", "", *table(found)]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """The benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--prompts", type=int, default=200, help="of each topic (%(default)s)")
    parser.add_argument("--finished", action="store_true", help="only report the runs that are there")
    parser.add_argument("--out", type=Path, default=folders.RESULTS, help="folder of the table")
    options = parser.parse_args(arguments)
    studies = [study(options.pairs, seed, options.prompts, options.finished) for seed in options.seeds]
    text = report(studies, options.prompts)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / RESULT).write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
