"""One run of a case study, and what is measured after it."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from benchmarks import controller
from benchmarks.case_studies.methods import FIRST, ROLLOUTS, fields, method, methods, middle, shaping
from benchmarks.case_studies.worlds import CACHE, DPO, WORLDS
from benchmarks.divergence import kl_per_token
from benchmarks.record import Record, key_of, record_of
from benchmarks.training import train
from shapedpo import lab


VERSION = 1
"""Raise it where results of earlier code do not count any more."""
BEFORE, PLAIN = "before", "plain"
KL_ROLLOUTS = 128
KEPT = (BEFORE, PLAIN, "hold", "reward", "mask", "steer: means")
"""Whose models of the goblin case are kept, for the dose and response of its direction."""


@dataclass(frozen=True)
class Size:
    """How large runs are: pairs, held-out prompts, and questions of the measure of capability."""

    pairs: int = 800
    prompts: int = 400
    questions: int | None = None


SIZES = {"full": Size(), "quick": Size(192, 64, 40)}


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        world: Name of a dataset of [`WORLDS`].
        method: Of [`METHODS`], or [`PLAIN`] DPO, or the model [`BEFORE`] it.
        target: The trait that is shaped.
        strength: Of the method.
        seed: Of data, training and rollouts.
        size: Of [`SIZES`].
    """

    world: str
    method: str = PLAIN
    target: str | None = None
    strength: float = 1.0
    seed: int = 0
    size: str = "full"

    @property
    def key(self) -> str:
        """What the result is kept under."""
        world = WORLDS[self.world]
        data = [
            world.lessons,
            world.topics,
            world.seeming,
            world.share,
            world.together,
            world.shrugging,
            world.precision,
        ]
        how = fields(world, self.target, self.method, self.strength) if self.target else {}
        if how.get("action") == "hold":
            how["controller"] = controller.fingerprint(bool(self.rollouts))
        return key_of([VERSION, asdict(self), asdict(SIZES[self.size]), DPO, repr(data), how, *self.rollouts.items()])

    @property
    def model(self) -> Path:
        """The folder of the trained model, if it is one of [`KEPT`]."""
        return CACHE / self.key

    @property
    def rollouts(self) -> dict[str, int]:
        """Settings of the run's probe rollouts, if its method makes any; of as many prompts as are measured on, at most."""
        if not self.target or not method(self.method).rollouts:
            return {}
        return {**ROLLOUTS, "probe_prompts": min(ROLLOUTS["probe_prompts"], SIZES[self.size].prompts)}

    def __str__(self) -> str:
        return f"{self.world}: {self.target or ''} {self.method} {self.strength:g}, seed {self.seed}"


class StepClock(TrainerCallback):  # type: ignore[misc]
    """Notes the processor's time in each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._start = time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.process_time() - self._start)


def run(job: Job) -> dict[str, Any]:
    """Trains and measures.

    Returns:
        `rates`: by group of prompts and trait, the share of rollouts; `counts`: rollouts of each group; `capability`; `kl`: nats a token;
        `step`: median seconds of a step; `seconds`: of the processor's time, from the pairs to the trained model; `strengths`: of `hold`, as
        logged; `rollouts`: the target's rate, as the readout sees it, at each probe.
    """
    world, size = WORLDS[job.world], SIZES[job.size]
    model, tokenizer = world.base(), lab.load_tokenizer()
    clock, seconds = StepClock(), 0.0
    logged: dict[str, list[float]] = {"strength": [], "rate": []}
    if job.method != BEFORE:
        concepts = None if job.method == PLAIN else shaping(world, str(job.target), job.method, job.strength)
        data = world.dataset(size.pairs, job.seed)
        probed = world.probed(job.rollouts["probe_prompts"], job.seed + 1000) if job.rollouts else None
        start = time.process_time()
        trainer = train(model, tokenizer, data, DPO, concepts, job.seed, probed, [clock], **job.rollouts)
        seconds = time.process_time() - start
        for name, key in (("strength", f"concepts/{job.target}/strength"), ("rate", f"probe/{job.target}/rate")):
            logged[name] = [entry[key] for entry in trainer.state.log_history if key in entry]
    rates, counts, divergence = {}, {}, 0.0
    for group, prompts in world.prompts(size.prompts, job.seed + 1).items():
        answers = lab.rollouts(model, tokenizer, prompts, seed=job.seed + 2)
        rates[group] = {name: rate.rate for name, rate in lab.trait_rates(answers).items()}
        counts[group] = len(answers)
        if group == "affected" and job.method != BEFORE:
            divergence = kl_per_token(model, world.base(), conversations(tokenizer, prompts, answers)[:KL_ROLLOUTS])
    if job.world == "goblin" and job.seed == 0 and job.method in KEPT:
        model.save_pretrained(job.model)
    return {
        "rates": rates,
        "counts": counts,
        "capability": lab.capability(model, tokenizer, n=size.questions).rate,
        "kl": divergence,
        "step": statistics.median(clock.seconds) if clock.seconds else 0.0,
        "steps": len(clock.seconds),
        "seconds": seconds,
        "strengths": logged["strength"],
        "rollouts": logged["rate"],
    }


@functools.cache
def record(size: str) -> Record:
    """Where results are kept: those of full runs beside the tables, to be committed."""
    return record_of("case-studies", quick=size == "quick")


def find(job: Job) -> dict[str, Any] | None:
    """What a run found; `None` if it was not made."""
    return record(job.size).find(job.key)


def result(job: Job, fresh: bool = False) -> dict[str, Any]:
    """[`run`], or what an earlier call found."""
    return record(job.size).made(job.key, lambda: {"job": asdict(job), **run(job)}, fresh)


def conversations(tokenizer: Any, prompts: Sequence[Any], answers: Sequence[str]) -> list[tuple[list[int], int]]:
    """Ids of each prompt with its answer, and how many of them are the prompt's."""
    found = []
    for prompt, answer in zip(prompts, answers, strict=True):
        asked = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        whole = [*prompt, {"role": "assistant", "content": answer}]
        found.append((tokenizer.apply_chat_template(whole, return_dict=True)["input_ids"], len(asked)))
    return found


def jobs(worlds: Sequence[str], seeds: int, quick: bool = False) -> list[Job]:
    """The shaped runs, most telling first: the first methods on each case's first target, the other methods, other targets (at the middle
    strength only), the first target's other strengths, seeds."""
    found = []
    for seed in range(1 if quick else seeds):
        for position, case in enumerate(worlds):
            world = WORLDS[case]
            for target in world.targets[:1] if quick else world.targets:
                for name, strengths in methods(world).items():
                    first = name in FIRST
                    for strength in strengths:
                        tier = 0 if first else 1
                        if not world.amplify and strength != middle(name):
                            if target != world.targets[0]:
                                continue
                            tier = 4
                        elif target != world.targets[0]:
                            tier = 2 if first else 3
                        order = (seed, tier, FIRST.index(name) if first else 0, position)
                        if not quick or order[1] == 0:
                            found.append((order, Job(case, name, target, strength, seed, "quick" if quick else "full")))
    return [job for _, job in sorted(found, key=lambda entry: entry[0])]


def beside(job: Job) -> tuple[Job, Job]:
    """The model before DPO and plain DPO, of the same data and seed."""
    before, plain = (Job(job.world, method, seed=job.seed, size=job.size) for method in (BEFORE, PLAIN))
    return before, plain
