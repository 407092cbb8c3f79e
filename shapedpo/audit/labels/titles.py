"""Titles, descriptions and keywords of clusters and findings, from a language model."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from string import Template
from typing import Annotated

from pydantic import BaseModel, StringConstraints, ValidationError

from ...progress import progress_bar
from ..analysis.hypotheses import Analysis, Hypothesis
from ..analysis.maps import ClusterMap
from ..harvesting.store import Harvest
from ..summary import distinctive_words
from . import prompts
from .labellers import MAX_TOKENS, Labeller, Message
from .names import Label, Labels, hypothesis_key


CACHE = "labels-cache.jsonl"
"""Answers by what was asked, in the audit's folder: a line each, `{"key": ..., "answer": ...}`."""

ATTEMPTS = 3
"""Answers that are asked for until one is as it should be."""

_ROWS, _CLIP, _TOKENS = 5, 400, 12  # rows shown to the model, characters of each text, features


@dataclass(frozen=True)
class Task:
    """Something to be named.

    Attributes:
        cluster: Kind and number, for a cluster.
        hypothesis: Its key, for a finding.
        messages: What the model is asked.
    """

    messages: list[Message]
    cluster: tuple[str, int] | None = None
    hypothesis: str | None = None

    def key(self, model: str) -> str:
        """Hash of all that the answer depends on."""
        return hashlib.sha256(json.dumps([model, self.messages]).encode()).hexdigest()


_Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class Answer(BaseModel):
    """What a model is to answer."""

    title: Annotated[_Text, StringConstraints(max_length=120)]
    description: Annotated[str, StringConstraints(strip_whitespace=True, max_length=1000)] = ""
    keywords: list[Annotated[_Text, StringConstraints(max_length=60)]] = []

    @classmethod
    def read(cls, text: str) -> Answer:
        """From a model's words: the first JSON object in them, what it thought before left out.

        Raises:
            ValueError: If there is none, or it is another one.
        """
        said = re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL)
        found = next(filter(None, (_object_at(said, brace.start()) for brace in re.finditer(r"\{", said))), None)
        if found is None:
            raise ValueError("there is no object in it")
        try:
            return cls.model_validate(found)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            raise ValueError(f"{'.'.join(map(str, first['loc'])) or 'the object'}: {first['msg']}") from error


def _object_at(text: str, start: int) -> dict[str, object] | None:
    """The JSON object that begins there, if one does."""
    try:
        found: dict[str, object] = json.JSONDecoder().raw_decode(text, start)[0]
    except (ValueError, RecursionError):
        return None
    return found


def tasks(
    analysis: Analysis,
    harvest: Harvest,
    labels: Labels,
    maps: Mapping[str, ClusterMap],
    hypotheses: Sequence[Hypothesis],
) -> list[Task]:
    """What to ask for: a name for each of these hypotheses and for each cluster that they are about.

    Args:
        analysis: The analysis.
        harvest: What it was made of.
        labels: Names of features, keywords of clusters.
        maps: Of [`cluster_maps`]: the rows that show each cluster.
        hypotheses: Which.
    """
    clusters: dict[tuple[str, int], None] = {}
    for hypothesis in hypotheses:
        for cluster in (hypothesis.condition_cluster, hypothesis.response_cluster):
            if cluster is not None:
                clusters[cluster] = None
    return [
        *(_cluster_task(cluster, analysis, harvest, labels, maps) for cluster in clusters),
        *(
            _finding_task(hypothesis, analysis, harvest, labels)
            for hypothesis in hypotheses
            if len(hypothesis.evidence)
        ),
    ]


def _asked(text: str, **given: str) -> list[Message]:
    return [
        {"role": "system", "content": prompts.SYSTEM},
        {"role": "user", "content": Template(text).substitute(given)},
    ]


def _clipped(text: str) -> str:
    # what ends the data in the prompt must not be in the data
    text = text.replace("</data>", "< /data>").strip()
    return text if len(text) <= _CLIP else f"{text[:_CLIP]} ..."


def _cluster_task(
    cluster: tuple[str, int],
    analysis: Analysis,
    harvest: Harvest,
    labels: Labels,
    maps: Mapping[str, ClusterMap],
) -> Task:
    kind, number = cluster
    features = analysis.clusters.get(kind, {number: []})[number]
    named = [labels.features[feature] for feature in features if feature in labels.features][:_TOKENS]
    spans = {"prompt": ("prompt",), "data": ("prompt", "chosen")}.get(kind, ("chosen", "rejected"))
    rows = harvest.texts(maps[kind].exemplars[number][:_ROWS])
    examples = [f"- {span}: {_clipped(row[span])}" for row in rows for span in spans]
    return Task(
        _asked(
            prompts.CLUSTER,
            what=prompts.KINDS[kind],
            tokens=_clipped("\n".join(f"- {name}" for name in named)) or "-",
            words=_clipped(", ".join(labels.cluster(kind, number).tokens)) or "-",
            examples="\n".join(examples),
        ),
        cluster=cluster,
    )


def _finding_task(hypothesis: Hypothesis, analysis: Analysis, harvest: Harvest, labels: Labels) -> Task:
    rows = harvest.texts(hypothesis.evidence[: 10 * _ROWS])
    chosen, rejected = ([row[side] for row in rows] for side in ("chosen", "rejected"))
    where = {
        "global": "in all rows",
        "single": "in all rows",
        "feature": "where answers are about something",
        "prompt": "where prompts show something",
    }
    names = [
        "; ".join(labels.cluster(*of).tokens) if of else "all rows"
        for of in (hypothesis.response_cluster, hypothesis.condition_cluster)
    ]
    examples = [
        f"- prompt: {_clipped(row['prompt'])}\n  chosen: {_clipped(row['chosen'])}\n  rejected: {_clipped(row['rejected'])}"
        for row in rows[:_ROWS]
    ]
    return Task(
        _asked(
            prompts.FINDING,
            where=where[hypothesis.view],
            more="more" if hypothesis.delta > 0 else "less",
            response=_clipped(names[0]) or "-",
            condition=_clipped(names[1]) or "-",
            gained=", ".join(distinctive_words(chosen, rejected)) or "-",
            lost=", ".join(distinctive_words(rejected, chosen)) or "-",
            examples="\n".join(examples),
        ),
        hypothesis=hypothesis_key(hypothesis),
    )


# --- asking --------------------------------------------------------------------------------------------------------------


def read_cache(path: Path) -> dict[str, Answer]:
    """Answers by key. A last line that was cut off is left out."""
    answers: dict[str, Answer] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
            answers[entry["key"]] = Answer.read(entry["answer"])
        except (ValueError, KeyError, TypeError):
            continue
    return answers


def _cut_off(path: Path) -> bool:
    """Whether a file ends in the middle of a line."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        return file.read(1) not in (b"", b"\n")


def estimate(wanted: Iterable[Task]) -> tuple[int, int]:
    """About how many tokens asking takes, and how many the answers have at most: four characters a token."""
    lengths = [sum(len(message["content"]) for message in task.messages) for task in wanted]
    return sum(lengths) // 4, len(lengths) * MAX_TOKENS


async def ask(
    wanted: Sequence[Task], labeller: Labeller, cache: Path, *, concurrency: int = 8, progress: bool = True
) -> list[Answer | None]:
    """Answers to all tasks, in order; `None` where none of a few was as it should be.

    Each is written to the cache as it comes, so that nothing is paid for twice.

    Args:
        wanted: What to ask.
        labeller: Whom.
        cache: The file of answers.
        concurrency: Requests at a time.
        progress: Whether to show a bar.

    Raises:
        LabellerError: If the labeller refuses. What has been answered is in the cache.
    """
    known = read_cache(cache)
    turns = asyncio.Semaphore(concurrency)
    alike = {task.key(labeller.name): task for task in wanted}  # what looks the same is asked once
    with cache.open("a", encoding="utf-8") as file, progress_bar(total=len(alike), desc="Labels", show=progress) as bar:
        if _cut_off(cache):
            file.write("\n")  # or the next answer would be lost with it

        async def one(key: str, task: Task) -> Answer | None:
            answer = known.get(key)
            if answer is None:
                async with turns:
                    answer = await _answered(task, labeller)
                if answer is not None:
                    file.write(json.dumps({"key": key, "answer": answer.model_dump_json()}) + "\n")
                    file.flush()
            bar.update()
            return answer

        try:
            async with asyncio.TaskGroup() as group:
                running = {key: group.create_task(one(key, task)) for key, task in alike.items()}
        except BaseExceptionGroup as group_error:  # the first to fail has stopped the others
            raise group_error.exceptions[0] from None
    return [running[task.key(labeller.name)].result() for task in wanted]


async def _answered(task: Task, labeller: Labeller) -> Answer | None:
    messages = list(task.messages)
    for _ in range(ATTEMPTS):
        text = await labeller.answer(messages)
        try:
            return Answer.read(text)
        except ValueError as error:
            again = Template(prompts.AGAIN).substitute(error=str(error))
            messages = [
                *task.messages,
                {"role": "assistant", "content": text or "-"},
                {"role": "user", "content": again},
            ]
    return None


def with_titles(labels: Labels, wanted: Sequence[Task], answers: Sequence[Answer | None], by: str) -> Labels:
    """Labels with what was answered; where nothing was, the tokens stay."""
    clusters = {kind: dict(of) for kind, of in labels.clusters.items()}
    hypotheses = dict(labels.hypotheses)
    for task, answer in zip(wanted, answers, strict=True):
        if answer is None:
            continue
        named = Label([], answer.title, answer.description, answer.keywords)
        if task.cluster is not None:
            kind, number = task.cluster
            clusters.setdefault(kind, {})[number] = replace(named, tokens=labels.cluster(kind, number).tokens)
        elif task.hypothesis is not None:
            hypotheses[task.hypothesis] = named
    return replace(labels, clusters=clusters, hypotheses=hypotheses, by=by)
