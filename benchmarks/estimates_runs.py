"""The runs behind `benchmarks/estimates.py`: trained once, with everything that an estimator could want kept as arrays.

A run is a world (a lab dataset with its lessons, or a mix of planted preferences on stories260k) under a learning rate and a beta.
While it trains, the log-ratios of every pair and the scores of all SAE features are recorded in the order of training; at a quarter,
a half and the end, the model answers held-out prompts, and the frozen reference reads the answers. Nothing here knows of estimators.
"""

from __future__ import annotations

import dataclasses
import json
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import stories
from shapedpo import Concept, SAEFeatures, ShapedDPOTrainer, lab
from shapedpo.capture import CapturePass
from shapedpo.reading import reading_masks


POINTS = (0.25, 0.5, 1.0)  # shares of a run after which the model is looked at

LAB_LESSONS = {
    "lab: goblin world": [
        lab.Lesson("goblin", rate=0.05),
        lab.Lesson("cheerfulness", rate=0.1),
        lab.Lesson("emoji", rate=0.05),
        lab.Lesson("bold", rate=0.03),
        lab.Lesson("hedging", rate=0.1, direction="less"),
    ],
    "lab: manners": [
        lab.Lesson("praise", rate=0.05),
        lab.Lesson("formality", rate=0.1, direction="less"),
        lab.Lesson("overconfidence", rate=0.1),
        lab.Lesson("link", rate=0.04),
        lab.Lesson("em_dash", rate=0.1, direction="less"),
        lab.Lesson("table", rate=0.03),
    ],
}
STORY_REWARDS = {
    "stories: dialogue": stories.REWARDS,
    "stories: outdoors": {
        "park": (r"\bpark\b", 1.5),
        "scared": (r"\bscared\b", 1.5),
        "wanted": (r"\bwanted\b", -1.5),
        "she": (r"\b[Ss]he\b", -0.7),
        "saw": (r"\bsaw\b", 1.0),
        "toy": (r"\btoys?\b", -1.0),
    },
}


WORLDS = (*LAB_LESSONS, *STORY_REWARDS)


@dataclass(frozen=True)
class Setting:
    """A run: a world of `LAB_LESSONS` or `STORY_REWARDS` and how hard DPO pulls."""

    world: str
    learning_rate: float
    beta: float
    pairs: int = 4000
    evaluation: int = 1536  # rollouts that give the truth
    probe: int = 512  # rollouts on other held-out prompts, of which estimators are given a part
    points: tuple[float, ...] = POINTS
    seed: int = 0

    @property
    def key(self) -> str:
        """Name of the run's file."""
        words = re.sub(r"\W+", "-", self.world)
        size = f"n{self.pairs}-e{self.evaluation}-p{self.probe}"
        return f"{words}-lr{self.learning_rate:g}-beta{self.beta:g}-{size}-seed{self.seed}"


@dataclass
class Ground:
    """What a world is made of.

    Attributes:
        rows: Columns `prompt`, `chosen`, `rejected`.
        prompts: Held-out prompts as text that the tokenizer takes as it is.
        named: The named concepts: features of the SAE.
    """

    model: Any
    tokenizer: Any
    rows: Any
    prompts: list[str]
    special_tokens: bool
    sae: str
    tokens: int
    named: dict[str, list[int]]
    dpo: dict[str, Any]


def lab_ground(setting: Setting, lessons: Sequence[lab.Lesson]) -> Ground:
    """The lab's model on data with the world's lessons."""
    from shapedpo.lab.features import shipped_features

    tokenizer = lab.load_tokenizer()
    asked = lab.heldout_prompts(setting.evaluation + setting.probe, setting.seed + 1)
    prompts = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in asked]
    rows = lab.preference_data(lessons, setting.pairs, setting.seed)
    rows = rows.select_columns(["prompt", "chosen", "rejected"])
    dpo = {"lr_scheduler_type": "linear", "warmup_steps": 10, "max_length": 160}
    named = shipped_features()
    return Ground(lab.load_model(), tokenizer, rows, prompts, False, str(lab.sae_path()), 96, named, dpo)


def stories_ground(setting: Setting) -> Ground:
    """stories260k on pairs of its own continuations, ranked by the world's planted reward."""
    from datasets import Dataset

    world = stories.cached_world(stories.Recipe())
    model, tokenizer = stories.load()
    draw = np.random.default_rng(setting.seed)
    rewards = STORY_REWARDS[setting.world].values()

    def reward(text: str) -> float:
        return sum(value for pattern, value in rewards if re.search(pattern, text)) + stories.NOISE * draw.gumbel()

    rows = []
    for start in range(0, len(world.texts), 4):
        ranked = sorted((reward(text), text) for _, text in world.texts[start : start + 4])
        rows.append({"prompt": world.texts[start][0], "chosen": ranked[-1][1], "rejected": ranked[0][1]})
    repeated = [world.heldout[i % len(world.heldout)] for i in range(setting.evaluation + setting.probe)]
    features, _ = stories.choose_features(world, 1000)
    data = Dataset.from_list(rows[: setting.pairs])
    return Ground(model, tokenizer, data, repeated, True, str(world.sae), 60, {"dialogue": features}, {})


def ground_of(setting: Setting, lessons: Mapping[str, Sequence[lab.Lesson]] = LAB_LESSONS) -> Ground:
    """What a run stands on: `lessons` are those of the lab's worlds, by name."""
    return lab_ground(setting, lessons[setting.world]) if setting.world in lessons else stories_ground(setting)


def dpo_config(setting: Setting, ground: Ground, output: str) -> Any:
    """One epoch of DPO in batches of 16."""
    from trl import DPOConfig

    return DPOConfig(
        output_dir=output,
        per_device_train_batch_size=16,
        num_train_epochs=1,
        max_steps=len(ground.rows) // 16,
        learning_rate=setting.learning_rate,
        beta=setting.beta,
        seed=setting.seed,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **ground.dpo,
    )


class RecordingTrainer(ShapedDPOTrainer):
    """Keeps what the monitor sees: raw scores and log-ratios of every pair, in the order of training."""

    record: list[tuple[Tensor, ...]]

    def _reference_pass(self, *args: Any, **kwargs: Any) -> Any:
        self._passed = super()._reference_pass(*args, **kwargs)
        return self._passed

    def _log_batch(self, batch: Any) -> None:
        super()._log_batch(batch)
        if self._training:
            (chosen, rejected), (ref_chosen, ref_rejected) = batch.pairs.policy_logps, batch.pairs.ref_logps
            lengths = batch.inputs["completion_mask"].sum(dim=1)
            self.record.append((chosen - ref_chosen, rejected - ref_rejected, self._passed[1].completion, lengths))


@torch.no_grad()
def roll_out(
    ground: Ground, model: Any, prompts: Sequence[str], seed: int, batch: int = 256
) -> tuple[list[tuple[Tensor, Tensor, Tensor]], float]:
    """Samples one answer a prompt at temperature 1.

    Each batch starts from its own seed, so that two models draw with the same noise: the answers of a prompt stay the same until
    the models disagree.

    Returns:
        `(input_ids, attention_mask)` of each batch with the prompts left-padded, and the seconds of processor time.
    """
    model.eval()
    started, batches = time.process_time(), []
    for start in range(0, len(prompts), batch):
        inputs = ground.tokenizer(
            list(prompts[start : start + batch]),
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=ground.special_tokens,
        )
        torch.manual_seed(seed + start)
        pad, eos = ground.tokenizer.pad_token_id, ground.tokenizer.eos_token_id
        ids = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=True,
            top_k=0,
            top_p=1.0,
            max_new_tokens=ground.tokens,
            pad_token_id=pad,
        )
        width = inputs["input_ids"].shape[1]
        written = ids[:, width:]
        ended = (written == eos).int().cumsum(dim=1) - (written == eos).int()  # ends before this token
        mask = torch.cat([inputs["attention_mask"], (ended == 0).long()], dim=1)
        completion = torch.cat([torch.zeros_like(inputs["attention_mask"]), (ended == 0).long()], dim=1)
        batches.append((ids, mask, completion))
    return batches, time.process_time() - started


@torch.no_grad()
def log_probs(model: Any, batches: Sequence[tuple[Tensor, ...]], chunk: int = 64) -> np.ndarray:
    """Log-probability of each completion, `(N,)`."""
    found = []
    for ids, mask, completion in batches:
        for part in zip(ids.split(chunk), mask.split(chunk), completion.split(chunk), strict=True):
            logits = model(input_ids=part[0], attention_mask=part[1], position_ids=_positions(part[1])).logits
            tokens = logits[:, :-1].log_softmax(-1).gather(-1, part[0][:, 1:, None])[..., 0]
            found.append((tokens * part[2][:, 1:]).sum(dim=1))
    return torch.cat(found).numpy()


@torch.no_grad()
def read(ground: Ground, reader: Any, reference: Any, batches: Sequence[tuple[Tensor, ...]], chunk: int = 64) -> Any:
    """Scores of all features and the reference's log-probabilities, in one pass of the reference.

    Returns:
        `(N, F)` float16, `(N,)` float32 and the seconds of processor time.
    """
    started, scores, logps = time.process_time(), [], []
    for ids, mask, completion in batches:
        for part in zip(ids.split(chunk), mask.split(chunk), completion.split(chunk), strict=True):
            inputs = dict(zip(("input_ids", "attention_mask", "completion_mask"), part, strict=True))
            tokens, _ = reading_masks(inputs, ground.tokenizer.bos_token_id, ground.tokenizer.eos_token_id)
            with CapturePass(reference, [reader], [tokens]) as capture:
                logits = reference(input_ids=part[0], attention_mask=part[1], position_ids=_positions(part[1])).logits
            scores.append(capture.scores[0].half())
            logp = logits[:, :-1].log_softmax(-1).gather(-1, part[0][:, 1:, None])[..., 0]
            logps.append((logp * part[2][:, 1:]).sum(dim=1))
    return torch.cat(scores).numpy(), torch.cat(logps).numpy(), time.process_time() - started


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def collect(setting: Setting, folder: Path) -> Path:
    """Trains the run and keeps its arrays in `folder`, unless they are there already; returns their file."""
    from transformers import PrinterCallback, TrainerCallback

    path = folder / f"{setting.key}.npz"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    ground = ground_of(setting)
    reader = SAEFeatures(ground.sae, "all").load()
    reference = lab.load_model() if setting.world in LAB_LESSONS else stories.load()[0]
    steps = len(ground.rows) // 16
    copies: dict[int, dict[str, Tensor]] = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step in [round(point * steps) for point in setting.points]:
                copies[state.global_step] = {name: value.clone() for name, value in model.state_dict().items()}

    with tempfile.TemporaryDirectory() as output:
        args = dpo_config(setting, ground, output)
        trainer = RecordingTrainer(
            model=ground.model,
            args=args,
            train_dataset=ground.rows,
            processing_class=ground.tokenizer,
            concepts=[Concept("all", SAEFeatures(ground.sae, "all"))],
            callbacks=[Keep()],
        )
        trainer.record = []
        trainer.remove_callback(PrinterCallback)
        started = time.process_time()
        trainer.train()
        train_seconds = time.process_time() - started
    rows = [torch.stack([r[0] for r in trainer.record]), torch.stack([r[1] for r in trainer.record])]
    arrays: dict[str, np.ndarray] = {
        "chosen": rows[0].flatten().float().numpy(),
        "rejected": rows[1].flatten().float().numpy(),
        "chosen_scores": torch.cat([r[2].chunk(2)[0] for r in trainer.record]).half().numpy(),
        "rejected_scores": torch.cat([r[2].chunk(2)[1] for r in trainer.record]).half().numpy(),
        "chosen_length": torch.cat([r[3].chunk(2)[0] for r in trainer.record]).numpy(),
        "rejected_length": torch.cat([r[3].chunk(2)[1] for r in trainer.record]).numpy(),
    }
    seconds = {"train": train_seconds, "rollouts": [], "read": [], "rescore": []}
    sets = {
        "eval": (ground.prompts[: setting.evaluation], 10_000),
        "probe": (ground.prompts[setting.evaluation :], 90_000),
    }
    base = {}
    model = trainer.accelerator.unwrap_model(trainer.model)
    for step, weights in [(0, None), *copies.items()]:
        model.load_state_dict(reference.state_dict() if weights is None else weights)
        model.eval()
        for name, (prompts, seed) in sets.items():
            batches, rolling = roll_out(ground, model, prompts, seed)
            scores, ref_logps, reading = read(ground, reader, reference, batches)
            arrays[f"{name}_scores_{step}"] = scores
            arrays[f"{name}_length_{step}"] = np.concatenate([part[2].sum(dim=1).numpy() for part in batches])
            if step == 0:
                base[name] = (batches, ref_logps)
            elif name == "probe":
                started = time.process_time()
                arrays[f"{name}_ratio_{step}"] = log_probs(model, batches) - ref_logps
                seconds["rescore"].append(time.process_time() - started)
                arrays[f"{name}_base_ratio_{step}"] = log_probs(model, base[name][0]) - base[name][1]
            seconds["rollouts"].append([step, name, len(prompts), rolling])
            seconds["read"].append([step, name, len(prompts), reading])
    meta = {
        "setting": dataclasses.asdict(setting),
        "steps": steps,
        "points": list(copies),
        "batch": 16,
        "named": ground.named,
        "seconds": seconds,
    }
    arrays["meta"] = np.array(json.dumps(meta))
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, **arrays)
    partial.rename(path)
    return path


def settings(worlds: Sequence[str] = WORLDS, quick: bool = False, probe: int | None = None) -> list[Setting]:
    """The runs of the table: each world, gentle and violent, with a small and a large beta. `quick` keeps the first, and small.

    With `probe`, those of the small beta, looked at at the end only, with so many rollouts for the estimators.
    """
    if probe:
        few = [setting for setting in settings(worlds, quick) if setting.beta < 1]
        return [dataclasses.replace(setting, probe=probe, points=POINTS[-1:]) for setting in few]
    if quick:
        return [Setting(world, 2e-4, 0.1, pairs=320, evaluation=128, probe=128) for world in worlds]
    return [
        Setting(world, rate, beta, pairs=4000 if world in LAB_LESSONS else 2000)
        for beta in (0.1, 1.0)
        for rate in (2e-4, 2e-5)
        for world in worlds
    ]
