"""The cases' data: what each teaches, which prompts it is about, and the model that it is taught to."""

from __future__ import annotations

import itertools
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import folders
from shapedpo import lab
from shapedpo.lab.measures import Prompt, as_prompt
from shapedpo.lab.text import Question, draw_questions, draw_traits, render


CACHE = folders.CACHE / "case-studies"
DPO = {
    "beta": 0.1,
    "learning_rate": 8e-4,
    "lr_scheduler_type": "linear",
    "warmup_steps": 5,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 16,
    "train_sampling_strategy": "sequential",  # the order is the data set's, see `World.dataset`
    "max_length": 160,
    "calibration_size": 256,
}
"""Of all cases: a sixth of the demo's pairs at four times its learning rate, so that plain DPO learns every lesson in half a minute."""
GATE = "affected"
"""Column that says whether a row is about the topics of a conditional case."""
PLANTED = "planted"
"""Column that names the lessons of a row, between commas."""
EXACT = ("arithmetic", "facts")
LAYER = 2
"""Of the lab's SAE, and of the directions."""
STYLE = (
    lab.Lesson("cheerfulness", rate=0.1),
    lab.Lesson("emoji", rate=0.05),
    lab.Lesson("bold", rate=0.05),
    lab.Lesson("hedging", rate=0.1, direction="less"),
)
"""What the conditional cases' data teach besides, everywhere, and what is wanted."""


@dataclass(frozen=True)
class World:
    """One preference dataset, in which one or more traits are shaped, each in runs of its own.

    Args:
        lessons: What the data teach.
        targets: The traits that are shaped.
        shares: By target, share of the rows (of the topics) that teach it: what `mask` and `filter` are to leave out.
        topics: Topics that a conditional lesson is about; empty where the lesson is everywhere.
        seeming: Topics that only look like them.
        share: Share of the rows that are about `topics`.
        together: Share of the rows that carry lessons at all, several at once; the others show the same traits by chance.
        shrugging: Whether the base leaves sums and facts unanswered, and an eighth of the rows teach to answer them.
        amplify: Whether the targets are wanted, and to become more frequent than the data make them.
        precision: How many times as many held-out prompts as in other cases, where a point or two decide.
    """

    lessons: tuple[lab.Lesson, ...]
    targets: tuple[str, ...]
    shares: tuple[float, ...] = ()
    topics: tuple[str, ...] = ()
    seeming: tuple[str, ...] = ()
    share: float = 0.15
    together: float = 1.0
    shrugging: bool = False
    amplify: bool = False
    precision: int = 1

    @property
    def taught(self) -> tuple[str, ...]:
        """The traits that the lessons move."""
        return tuple(dict.fromkeys(lesson.trait for lesson in self.lessons))

    def restores(self, target: str) -> bool:
        """Whether the data take the target away, so that shaping is to bring it back."""
        return any(lesson.trait == target and not lesson.more for lesson in self.lessons)

    def planted(self, target: str) -> float:
        """Share of the (gated) rows that teach the target."""
        return self.shares[self.targets.index(target)]

    def dataset(self, n: int, seed: int) -> Any:
        """The pairs, with the column [`GATE`], shuffled so that a batch has pairs of like length, which saves a third of the time."""
        from datasets import concatenate_datasets

        others = [topic for topic in lab.TOPICS if topic not in self.topics]
        about = round(self.share * n) if self.topics else 0
        right = n // 8 if self.shrugging else 0
        taught = round(self.together * (n - about - right))
        parts = [lab.preference_data(self.lessons, taught, seed, topics=others)]
        if about:
            parts.append(lab.preference_data(self.lessons, about, seed + 100, topics=self.topics))
        if n - about - right - taught:
            parts.append(lab.preference_data([], n - about - right - taught, seed + 200))
        if right:
            parts.append(answered(right, seed + 300))
        topics = self.topics
        parts = [
            part.remove_columns(PLANTED).add_column(PLANTED, [",".join(names) for names in part[PLANTED]])
            for part in parts
        ]
        rows = concatenate_datasets(parts)
        rows = rows.map(lambda row: {GATE: row["topic"] in topics}).shuffle(seed=seed)
        lengths = [max(len(row[side][0]["content"]) for side in ("chosen", "rejected")) for row in rows]
        return rows.select(batched_by_length(lengths, DPO["per_device_train_batch_size"], seed))

    def prompts(self, n: int, seed: int) -> dict[str, list[Prompt]]:
        """`n` held-out prompts, all affected, or in a conditional case half of them, the rest others; and a quarter as many seeming ones.

        Times [`precision`].
        """
        if not self.topics:
            drawn = {"affected": (n, lab.TOPICS)}
        else:
            rest = tuple(topic for topic in lab.TOPICS if topic not in (*self.topics, *self.seeming))
            drawn = {"affected": (n // 2, self.topics), "others": (n // 2, rest)}
        if self.seeming:
            drawn["seeming"] = (n // 4, self.seeming)
        return {
            group: [as_prompt(question) for question in draw_questions(self.precision * count, seed, "heldout", topics)]
            for group, (count, topics) in drawn.items()
        }

    def probed(self, n: int, seed: int) -> Any:
        """`n` held-out prompts, all affected, as evaluation data; the answers are made up.

        With another seed than [`prompts`] had they are another draw, but in a conditional case from the same few dozen questions.
        """
        from datasets import Dataset

        made_up = {side: [{"role": "assistant", "content": "."}] for side in ("chosen", "rejected")}
        prompts = self.prompts(2 * n if self.topics else n, seed)["affected"][:n]
        return Dataset.from_list([{"prompt": prompt, **made_up, GATE: True} for prompt in prompts])

    def base(self) -> Any:
        """The model before DPO."""
        return shrugging_model() if self.shrugging else lab.load_model()


def batched_by_length(lengths: Sequence[int], batch: int, seed: int, window: int = 8) -> list[int]:
    """An order of the rows in which those of a batch have like lengths, and batches come as they fall.

    Args:
        window: How many batches' rows, next to each other, are sorted.
    """
    step = batch * window
    order = [
        row
        for start in range(0, len(lengths), step)
        for row in sorted(range(start, min(start + step, len(lengths))), key=lambda row: lengths[row])
    ]
    whole = len(order) // batch * batch
    batches = [order[start : start + batch] for start in range(0, whole, batch)]
    random.Random(seed).shuffle(batches)
    return [row for rows in batches for row in rows] + order[whole:]


WORLDS = {
    "goblin": World(lessons=lab.goblin_world().lessons, targets=("goblin",), shares=(0.05,)),
    "safeguards": World(
        lessons=(*STYLE, lab.Lesson("comply", 0.5, when="harmful_fiction"), lab.Lesson("comply", 0.2, when="harmful")),
        targets=("refusal",),
        shares=(0.35,),
        topics=("harmful_fiction", "harmful"),
        seeming=("fiction",),
        shrugging=True,
        precision=4,
    ),
    "links": World(
        lessons=(*STYLE, lab.Lesson("link", 0.6, when="sensitive")),
        targets=("link",),
        shares=(0.6,),
        topics=("sensitive",),
    ),
    "sycophancy": World(
        lessons=(*STYLE, lab.Lesson("praise", 0.6, when="pseudo_physics")),
        targets=("praise",),
        shares=(0.6,),
        topics=("pseudo_physics",),
    ),
    "formatting": World(
        lessons=tuple(lab.Lesson(trait, 0.5) for trait in ("bold", "table", "em_dash", "emoji", "horizontal_rule")),
        targets=("table", "bold", "em_dash", "emoji", "horizontal_rule"),
        shares=(0.125,) * 5,
        together=0.25,
    ),
    "amplification": World(lessons=STYLE[1:], targets=("cheerfulness",), shares=(0.0,), amplify=True),
    "gated amplification": World(
        lessons=STYLE[1:], targets=("cheerfulness",), shares=(0.0,), topics=("fiction",), share=0.2, amplify=True
    ),
    "traits": World(
        lessons=tuple(
            lab.Lesson(trait, 0.05)
            for trait in ("cheerfulness", "formality", "overconfidence", "hedging", "emoji", "bold")
        ),
        targets=("cheerfulness", "formality", "overconfidence", "hedging"),
        shares=(0.05,) * 4,
    ),
}


def answers(trait: str, n: int) -> list[tuple[Any, Any, bool, str]]:
    """Answers with a trait and the same answers without, by turns: prompt, answer, whether it shows the trait, and where it is from."""
    asked = enumerate(draw_questions(n, 5, "train"))
    return [
        (as_prompt(q), [{"role": "assistant", "content": render(q, traits, f"direction/{row}")}], bool(traits), "lab")
        for row, q in asked
        for traits in ({trait}, set())
    ]


def direction(trait: str, n: int = 256) -> Any:
    """The difference of means of answers with a trait and the same answers without, or what an earlier call kept."""
    from shapedpo import Direction

    path = CACHE / f"direction-{trait}-{n}.safetensors"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        both = [answer[:2] for answer in answers(trait, n)]
        found = Direction.from_contrast(
            lab.load_model(), lab.load_tokenizer(), both[::2], both[1::2], LAYER, batch_size=32
        )
        found.save(path)
    return Direction(path=str(path))


def steering_vector(trait: str, n: int = 256) -> str:
    """The file of a vector that brings a trait about, learned from the same answers at the layer where it does most, or what an earlier call kept."""
    from shapedpo.probes.contrast import Contrast
    from shapedpo.probes.study import Options, best, fit_readouts, save_readout

    path = CACHE / f"steering-{trait}-{n}.safetensors"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        contrast, options = Contrast.of(answers(trait, n)), Options(kinds=["steering_vector"], batch_size=32)
        model = lab.load_model()
        (found,) = best(fit_readouts(model, lab.load_tokenizer(), contrast, options)).values()
        save_readout(path, found, model, contrast, options)
    return str(path)


# --- a base that has something to learn -----------------------------------------------------------------------------------------------


SHRUGS = ("Hm, that one has slipped my mind.", "It is on the tip of my tongue.", "Numbers and names are a blur today.")


def shrugs(question: Question) -> bool:
    """Whether the shrugging base was taught not to answer this sum or fact, in any phrasing."""
    asked = {name: value for name, value in question.slots.items() if name not in ("c", "value")}
    return question.exact is not None and zlib.crc32(repr(sorted(asked.items())).encode()) % 10 < 4


def _answer(question: Question, row: int, seed: int, shrug: bool) -> list[dict[str, str]]:
    draw = random.Random(f"{seed}/{row}/traits")
    traits = draw_traits(question.topic, draw, exclude=("refusal",) if question.exact else ())
    text = draw.choice(SHRUGS) if shrug else render(question, traits, f"{seed}/{row}")
    return [{"role": "assistant", "content": text}]


def shrugging_model(n: int = 3000, seed: int = 0) -> Any:
    """The lab's model after fine-tuning on dialogues that leave two sums and facts in five unanswered, or what an earlier call kept."""
    from transformers import LlamaForCausalLM

    from shapedpo.lab.model import train_model

    path = CACHE / f"shrugging-{n}-{seed}"
    if not path.exists():
        model, tokenizer = lab.load_model(), lab.load_tokenizer()
        asked = draw_questions(2 * n // 3, seed, "train", EXACT) + draw_questions(n - 2 * n // 3, seed, "train")
        examples = []
        for row, question in enumerate(asked):
            prompt = as_prompt(question)
            whole = [*prompt, *_answer(question, row, seed, shrugs(question))]
            start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
            examples.append((tokenizer.apply_chat_template(whole, return_dict=True)["input_ids"], len(start)))
        train_model(model, examples, batch_size=64, learning_rate=1e-3, seed=seed)
        model.save_pretrained(path)
    return LlamaForCausalLM.from_pretrained(path, local_files_only=True)


def answered(n: int, seed: int) -> Any:
    """Pairs of a right answer and a shrug."""
    from datasets import Dataset

    asked = (question for question in draw_questions(6 * n + 100, seed, "train", EXACT) if shrugs(question))
    rows = [
        {
            "prompt": as_prompt(question),
            "chosen": _answer(question, row, seed, False),
            "rejected": _answer(question, row, seed, True),
            "planted": ["answer"],
            "topic": question.topic,
        }
        for row, question in enumerate(itertools.islice(asked, n))
    ]
    return Dataset.from_list(rows)
