"""The goblin demo: plain DPO against shaped DPO in the lab's world, from one seed, and one table of what came of it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import lab


if TYPE_CHECKING:
    from datasets import Dataset
    from rich.table import Table

    from .concept import Concept
    from .lab.measures import Rate
    from .lab.worlds import World

N_ROLLOUTS = 1000


@dataclass(frozen=True)
class Outcome:
    """What a model does.

    Args:
        rates: share of held-out rollouts that show each taught trait.
        capability: share of exact answers to held-out arithmetic and facts.
        seconds: what training took; 0 for the model before any.
    """

    rates: dict[str, Rate]
    capability: Rate
    seconds: float = 0.0


@dataclass(frozen=True)
class DemoResult:
    """The demo's three models side by side."""

    world: World
    before: Outcome
    plain: Outcome
    shaped: Outcome
    wandb_dirs: dict[str, Path]

    def kept(self, trait: str) -> float:
        """Share of the change that plain DPO brings to `trait` that the shaped run brings too."""
        start, plain, shaped = (run.rates[trait].rate for run in (self.before, self.plain, self.shaped))
        return (shaped - start) / (plain - start) if plain != start else float("nan")

    def rows(self) -> list[tuple[str, ...]]:
        """The table's rows: name, before, plain and shaped in percent, share of plain DPO's change that is kept."""
        rows = []
        for lesson in self.world.lessons:
            trait = lesson.trait
            note = "unwanted" if lesson.name == self.world.unwanted else "more" if lesson.more else "less"
            cells = (_percent(run.rates[trait]) for run in (self.before, self.plain, self.shaped))
            rows.append((f"{trait} ({note})", *cells, f"{self.kept(trait):.0%}"))
        rows.append(("capability", *(_percent(run.capability) for run in (self.before, self.plain, self.shaped)), ""))
        rows.append(("training time", "", f"{self.plain.seconds:.0f} s", f"{self.shaped.seconds:.0f} s", ""))
        return rows


HEADINGS = ("% of rollouts [95 %]", "before", "plain DPO", "shaped DPO", "kept")


def run(out: str | Path = "runs/demo", seed: int = 0, n_rollouts: int = N_ROLLOUTS) -> DemoResult:
    """Trains the lab's model on the goblin world twice, with DPO and with the goblin held where it was, and prints the table.

    W&B runs are written into `out`, in offline mode unless `WANDB_MODE` says otherwise; the table goes to
    `demo.md` and `demo.png` there.

    Args:
        out: folder for all that is written.
        seed: of the data and of both trainings.
        n_rollouts: held-out prompts sampled from each model.
    """
    from rich.console import Console

    out = Path(out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("WANDB_MODE", "offline")
    os.environ.setdefault("WANDB_PROJECT", "shapedpo-demo")
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ["WANDB_DIR"] = str(out)

    world = lab.goblin_world(seed)
    dataset = world.dataset()
    before = _measure(lab.load_model(), world, seed, n_rollouts)
    held = [lab.concept(world.unwanted, action="hold"), *(lab.concept(lesson.trait) for lesson in world.wanted)]
    plain, plain_dir = _train("plain", world, dataset, [], out, seed, n_rollouts)
    shaped, shaped_dir = _train("shaped", world, dataset, held, out, seed, n_rollouts)

    result = DemoResult(world, before, plain, shaped, {"plain": plain_dir, "shaped": shaped_dir})
    (out / "demo.md").write_text(_markdown(result), encoding="utf-8")
    _plot(result, out / "demo.png")
    console = Console()
    console.print(_table(result))
    console.print(f"Table and picture: {out / 'demo.md'}, {out / 'demo.png'}", soft_wrap=True)
    page = out / "shaped" / "report.html"
    console.print(f"What the shaped run amplified and suppressed, for a browser: {page}", soft_wrap=True)
    for name, folder in result.wandb_dirs.items():
        console.print(f"W&B run of {name} DPO: {folder}  (upload it with `wandb sync`)", soft_wrap=True)
    return result


def _train(
    name: str, world: World, dataset: Dataset, concepts: list[Concept], out: Path, seed: int, n_rollouts: int
) -> tuple[Outcome, Path]:
    import wandb
    from transformers.trainer_callback import ProgressCallback

    from .config import ShapedDPOConfig
    from .trainer import ShapedDPOTrainer

    class Progress(ProgressCallback):
        """A progress bar that does not print what W&B gets."""

        def on_log(self, *args: Any, **kwargs: Any) -> None:
            pass

    args = ShapedDPOConfig(
        output_dir=str(out / name),
        run_name=f"{name}-seed{seed}",
        concepts=concepts or None,
        monitor="all" if concepts else None,
        probe_steps=100 if concepts else 0,
        probe_prompts=200,  # they correct `hold`: fewer would add more noise than they take away
        seed=seed,
        report_to=["wandb"],
        logging_steps=10,
        save_strategy="no",
        bf16=False,
        gradient_checkpointing=False,
        **world.dpo,
    )
    model = lab.load_model()
    # With no concept this is TRL's DPOTrainer, bit for bit
    heldout = lab.preference_data(world.lessons, 250, seed + 3)  # for probe rollouts' prompts; nothing is evaluated
    trainer = ShapedDPOTrainer(
        model=model, args=args, train_dataset=dataset, eval_dataset=heldout, processing_class=lab.load_tokenizer()
    )
    trainer.pop_callback(ProgressCallback)
    trainer.add_callback(Progress)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    folder = Path(wandb.run.dir).parent if wandb.run is not None else out
    outcome = _measure(model, world, seed, n_rollouts, seconds)
    if wandb.run is not None:
        rates = {f"rollouts/{trait}": rate.rate for trait, rate in outcome.rates.items()}
        wandb.run.summary.update(rates | {"rollouts/capability": outcome.capability.rate})
        wandb.finish()
    trainer.save_model()
    return outcome, folder


def _measure(model: Any, world: World, seed: int, n_rollouts: int, seconds: float = 0.0) -> Outcome:
    tokenizer = lab.load_tokenizer()
    prompts = lab.heldout_prompts(n_rollouts, seed + 1)
    answers = lab.rollouts(model, tokenizer, prompts, seed=seed + 2)
    rates = lab.trait_rates(answers, [lesson.trait for lesson in world.lessons])
    return Outcome(rates, lab.capability(model, tokenizer), seconds)


def _table(result: DemoResult) -> Table:
    from rich.table import Table

    table = Table(title=f"Goblin world: {result.world.n} pairs, {result.world.lessons[0].rate:.0%} teach goblins")
    for i, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="right" if i else "left")
    for row in result.rows():
        table.add_row(*row, style="bold" if "unwanted" in row[0] else None)
    return table


def _percent(rate: Rate) -> str:
    return f"{100 * rate.rate:.1f} [{100 * rate.low:.0f}, {100 * rate.high:.0f}]"


def _markdown(result: DemoResult) -> str:
    lines = [HEADINGS, ("---", "---:", "---:", "---:", "---:"), *result.rows()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _plot(result: DemoResult, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.add_subplot()
    names = [lesson.trait for lesson in result.world.lessons]
    runs = {"before": result.before, "plain DPO": result.plain, "shaped DPO": result.shaped}
    for k, (label, outcome) in enumerate(runs.items()):
        rates = [*(outcome.rates[name] for name in names), outcome.capability]
        heights = [rate.rate for rate in rates]
        errors = [[r.rate - r.low for r in rates], [r.high - r.rate for r in rates]]
        positions = [i + (k - 1) * 0.27 for i in range(len(rates))]
        color = ("0.75", "tab:orange", "tab:blue")[k]
        axes.bar(positions, heights, width=0.25, yerr=errors, capsize=2, label=label, color=color)
    axes.set_xticks(range(len(names) + 1), [*names, "capability"])
    axes.set_ylabel("share of held-out rollouts")
    axes.set_ylim(0, 1)
    axes.legend()
    figure.savefig(path, dpi=120)
