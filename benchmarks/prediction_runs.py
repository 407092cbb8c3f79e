"""The runs behind `benchmarks/prediction.py`: DPO in worlds of known lessons, kept so that predictions can be held against them.

Estimators and their constants are settled on `DESIGN`. In an early survey of how answers can be weighed, figures of runs of `HELD_OUT` were on
the screen, too, among them that smoothing by the features' covariance helps the mean delta; the form and the constants were then chosen on
`DESIGN` alone.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import stories
from benchmarks.estimates_runs import LAB_LESSONS, Ground, Setting, dpo_config, ground_of
from benchmarks.folders import CACHE
from shapedpo import SAEFeatures, lab
from shapedpo.audit import Analysis, Harvest, HarvestSettings, analyse, harvest
from shapedpo.audit.rollouts.run import Rollouts, RolloutSettings, log_probs, roll_out
from shapedpo.lab import measures, text


LESSONS = LAB_LESSONS | {
    "lab: conditions": [
        lab.Lesson("goblin", rate=0.05),
        lab.Lesson("comply", when="harmful_fiction"),
        lab.Lesson("link", when="sensitive"),
        lab.Lesson("praise", when="pseudo_physics"),
        lab.Lesson("em_dash", rate=0.05),
    ],
    "lab: topics": [
        lab.Lesson("emoji", rate=0.6, when="small_talk"),
        lab.Lesson("table", rate=0.6, when="cooking"),
        lab.Lesson("hedging", rate=0.6, when="health", direction="less"),
        lab.Lesson("overconfidence", rate=0.5, when="physics"),
        lab.Lesson("cheerfulness", rate=0.05),
    ],
    "lab: style": [
        lab.Lesson("bold", rate=0.05),
        lab.Lesson("horizontal_rule", rate=0.05),
        lab.Lesson("cheerfulness", rate=0.1, direction="less"),
        lab.Lesson("formality", rate=0.5, when="travel"),
        lab.Lesson("praise", rate=0.1, direction="less"),
    ],
    "lab: mixed": [
        lab.Lesson("overconfidence", rate=0.15),
        lab.Lesson("goblin", rate=0.5, when="fiction"),
        lab.Lesson("link", rate=0.1, direction="less"),
        lab.Lesson("refusal", rate=0.5, when="sensitive"),
        lab.Lesson("emoji", rate=0.02),
    ],
}
DESIGN = ("lab: goblin world", "lab: conditions", "stories: dialogue")
HELD_OUT = ("lab: manners", "lab: topics", "lab: style", "lab: mixed", "stories: outdoors")

PILOTS = (8, 4)  # after one part in so many of the steps
FOLDER = CACHE / "prediction"
VIOLENT = (2e-4, 0.1)  # learning rate and beta
GENTLE = (2e-5, 1.0)
SECOND = 101  # seed of the order of pairs in a run's second go
SEEDS = {world: seed for seed, world in enumerate((*DESIGN, *HELD_OUT))}


QUICK = Setting(DESIGN[0], *VIOLENT, pairs=192, evaluation=32, probe=0)
"""A run that takes seconds, to see that all of it works."""


KINDS = {"violent": (VIOLENT, 1000), "gentle": (GENTLE, 1000), "small": (VIOLENT, 250)}
"""What is varied: how hard DPO pulls, and the number of pairs."""
PROMPTS = 256
"""Held-out prompts by whose answers the change is seen."""


def settings(worlds: Sequence[str], kinds: Sequence[str] = tuple(KINDS), prompts: int = PROMPTS) -> list[Setting]:
    """The runs: each world violent and gentle, and violent on a quarter of the pairs."""
    forces = [KINDS[kind] for kind in kinds]
    return [
        Setting(world, *force, pairs, evaluation=prompts, probe=0, seed=SEEDS[world])
        for force, pairs in forces
        for world in worlds
    ]


def repeated(setting: Setting) -> bool:
    """Whether a run is made twice: the violent ones in the lab, but not those on a quarter of the pairs."""
    return (setting.learning_rate, setting.beta) == VIOLENT and setting.pairs != 250 and setting.world in LESSONS


@functools.cache
def ground(setting: Setting) -> Ground:
    """What a run stands on; its model is to be left as it is."""
    return ground_of(setting, LESSONS)


def train(setting: Setting, folder: Path) -> Path:
    """Trains a run with TRL's own trainer and keeps the weights in `folder`, unless they are there already; returns their file."""
    import safetensors.torch
    from transformers import TrainerCallback

    path = folder / f"{setting.key}.safetensors"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)

    class Keep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            for share in PILOTS:
                if state.global_step == state.max_steps // share:
                    safetensors.torch.save_model(model, folder / f"{setting.key}-1of{share}.safetensors")

    partial = path.with_suffix(".partial")
    safetensors.torch.save_model(_trained(setting, setting.seed, [Keep()]), partial)
    partial.rename(path)
    return path


def _trained(setting: Setting, seed: int, callbacks: Sequence[Any] = ()) -> Any:
    """The model after a run whose order of pairs is the seed's."""
    from transformers import PrinterCallback
    from trl import DPOTrainer

    world = ground(setting)
    with tempfile.TemporaryDirectory() as output:
        args = dpo_config(setting, world, output)
        args.seed = seed
        trainer = DPOTrainer(
            model=load(setting),
            args=args,
            train_dataset=world.rows,
            processing_class=world.tokenizer,
            callbacks=list(callbacks),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer.model.eval()


def audit(setting: Setting, folder: Path) -> tuple[Harvest, Analysis]:
    """The harvest and the analysis of a run's data: the same for all learning rates and betas."""
    kept = folder / f"audit-{setting.key.split('-lr')[0]}-n{setting.pairs}-seed{setting.seed}"
    try:
        return Harvest.open(kept / "harvest"), Analysis.load(kept)
    except FileNotFoundError:
        world = ground(setting)
    read = harvest(model_of(setting), world.sae, world.rows, kept / "harvest", HarvestSettings(max_length=160))
    return read, analyse(read, out=kept, progress=False)


def rollouts(setting: Setting, folder: Path) -> Rollouts:
    """Answers of the model before and after a run, to held-out prompts."""
    import safetensors.torch

    kept = folder / f"{setting.key}-rollouts"
    try:
        return Rollouts.open(kept)
    except FileNotFoundError:
        shutil.rmtree(kept, ignore_errors=True)
    world, trained = ground(setting), load(setting)
    safetensors.torch.load_model(trained, train(setting, folder))
    prompts = world.tokenizer(world.prompts, add_special_tokens=world.special_tokens)["input_ids"]
    reader = SAEFeatures(world.sae, "all").load()
    how = RolloutSettings(max_new_tokens=min(world.tokens, 64), batch_size=128)
    return roll_out(load(setting), trained, world.tokenizer, prompts, reader, kept, how)


def answers(setting: Setting, folder: Path) -> Rollouts:
    """Answers of the model before training to prompts of the kind that it is trained on: four for each held-out prompt, the same for all runs of a model."""
    kept = folder / f"answers-{setting.world.split(':')[0]}-{setting.evaluation}"
    try:
        return Rollouts.open(kept)
    except FileNotFoundError:
        shutil.rmtree(kept, ignore_errors=True)
    world, model = ground(setting), load(setting)
    reader = SAEFeatures(world.sae, "all").load()
    how = RolloutSettings(max_new_tokens=min(world.tokens, 64), batch_size=128, seed=99)
    return roll_out(model, model, world.tokenizer, asked(setting, world), reader, kept, how, both=False)


def asked(setting: Setting, world: Ground) -> list[list[int]]:
    """The prompts of [`answers`], 512 for 256 held-out ones: the lab's training questions, or stories' beginnings."""
    n = 2 * setting.evaluation
    if setting.world in LESSONS:
        questions = [measures.as_prompt(q) for q in text.draw_questions(n, 99, "train")]
        return [world.tokenizer.apply_chat_template(q, add_generation_prompt=True)["input_ids"] for q in questions]
    rows = ground(dataclasses.replace(setting, pairs=max(n, setting.pairs))).rows  # a small run's have too few
    return world.tokenizer(rows["prompt"][:n], add_special_tokens=world.special_tokens)["input_ids"]


def pilot(setting: Setting, share: int, folder: Path) -> Rollouts:
    """The same answers, weighed by what the run was after a part of its steps."""
    import safetensors.torch

    given = answers(setting, folder)
    kept = folder / f"{setting.key}-1of{share}-pilot.npy"
    if not kept.exists():
        trained = load(setting)
        safetensors.torch.load_model(trained, folder / f"{setting.key}-1of{share}.safetensors")
        np.save(kept, _log_ratios(setting, trained, given, asked(setting, ground(setting))))
    return dataclasses.replace(given, log_ratios=np.load(kept))


@dataclasses.dataclass(frozen=True)
class Again(Rollouts):
    """A run's answers, weighed by another run of the same setting; `drawn` are the log-ratios of the one that answered."""

    drawn: Any = None

    @property
    def weights(self) -> np.ndarray:
        """`(n, 2)`: (policy - reference) / (what the answers were drawn from)."""
        return 2 * np.expm1(self.log_ratios) / (1 + np.exp(self.drawn))


def again(setting: Setting, folder: Path, made: bool = True) -> Rollouts | None:
    """The answers of [`rollouts`], weighed by a second run that sees the same pairs in another order; `None` if it is neither there nor `made`."""
    kept = folder / f"{setting.key}-again.npy"
    given = rollouts(setting, folder)
    if not kept.exists():
        if not made:
            return None
        world = ground(setting)
        prompts = world.tokenizer(world.prompts, add_special_tokens=world.special_tokens)["input_ids"]
        twice = [prompt for prompt in prompts for _ in range(2)]
        np.save(kept, _log_ratios(setting, _trained(setting, SECOND), given, twice))
    return Again(given.harvest, np.load(kept), given.both, given.log_ratios)


def _log_ratios(setting: Setting, trained: Any, given: Rollouts, prompts: Sequence[list[int]]) -> np.ndarray:
    """`(n, 2)`, of answers under a trained model and the one that it started from, nats."""
    model, found = load(setting), []
    ids = given.harvest.ids(range(given.harvest.n_rows))
    rows = [
        {"prompt_ids": prompt, "chosen_ids": row["chosen"], "rejected_ids": row["rejected"]}
        for prompt, row in zip(prompts, ids, strict=True)
    ]
    for start in range(0, len(rows), 64):
        some = rows[start : start + 64]
        after, before = (
            log_probs(each, some, ground(setting).tokenizer.pad_token_id or 0) for each in (trained, model)
        )
        found.append((after - before).reshape(2, -1).T.numpy())
    return np.concatenate(found).astype(np.float64)


def learnt(setting: Setting, share: int) -> float:
    """The share of a run's learning rates, summed over its steps, that its pilot has had: linear decay, in the lab after 10 steps of warm-up from 0."""
    steps, warm_up = setting.pairs // 16, 10 if setting.world in LESSONS else 0
    rates = [step / warm_up if step < warm_up else (steps - step) / (steps - warm_up) for step in range(steps)]
    return sum(rates[: steps // share]) / sum(rates)


def model_of(setting: Setting) -> str:
    """Where the model that a run starts from is."""
    return str(lab.model_path() if setting.world in LESSONS else stories.MODEL)


def load(setting: Setting) -> Any:
    """The model that a run starts from."""
    return lab.load_model() if setting.world in LESSONS else stories.load()[0]


def make(runs: Sequence[Setting], folder: Path) -> None:
    """Makes the runs that are not there yet."""
    for setting in runs:
        started = time.process_time()
        train(setting, folder)
        trained = time.process_time()
        audit(setting, folder)
        rollouts(setting, folder)
        for share in PILOTS:
            pilot(setting, share, folder)
        if repeated(setting):
            again(setting, folder)
        spent = trained - started, time.process_time() - trained
        print(f"{setting.key}: trained in {spent[0]:.0f} s, read in {spent[1]:.0f} s", flush=True)


if __name__ == "__main__":
    known = {run.key: run for run in settings((*DESIGN, *HELD_OUT))}
    make([known[key] for key in sys.argv[1:] or known], FOLDER)
