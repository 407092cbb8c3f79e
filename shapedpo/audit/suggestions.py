"""What an audit found that bears on a description, in plain words, of what a model should and should not learn."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .analysis.hypotheses import Analysis
from .harvesting.store import Harvest
from .labels.names import Label, Labels, hypothesis_key
from .prediction.run import Prediction
from .summary import summarise


Embed = Callable[[Sequence[str]], NDArray[np.float32]]

LEAST = 0.15
"""Similarity below which nothing is suggested."""

_SENTENCE = re.compile(r"[.;!?\n]+")
_CLAUSE = re.compile(
    r",?\s+(?:but|and|yet|while)\s+(?=(?:\w+\s+){0,2}?(?:should|must|shall|may|can|cannot|never|not|avoid\w*|do|does|don't)\b)"
    r"|,?\s+(?:but|yet)\s+(?=(?:be|stay|keep|remain)\b)",
    re.IGNORECASE,
)
_NOT = re.compile(
    r"\b(?:not|never|(?<!say )(?<!says )no|nor|without|avoid\w*|cannot|stop|less|\w+n't)\b", re.IGNORECASE
)
_EMPTY = re.compile(
    r"\b(?:model|assistant|answers?|should|must|shall|may|can|do|does|learn|want|stay|keep|be|use|uses|talks?|about|say|says)\b",
    re.IGNORECASE,
)
_HYPOTHESES = 200  # of each view


@dataclass(frozen=True)
class Part:
    """A part of a specification: its text, and whether it asks for what it says or forbids it."""

    text: str
    wanted: bool


@dataclass(frozen=True)
class Suggestion:
    """Something that the audit knows of and a part of the specification speaks of.

    Attributes:
        part: The part.
        kind: `finding`, `hypothesis`, `feature_cluster`, `response_cluster` or `feature`.
        number: Of a finding in the summary, of a hypothesis in `analysis.hypotheses`, or of the cluster or feature.
        what: What it is called.
        similarity: Of its words with the part's, up to 1.
        effect: Predicted change, in sd of its score; `None` without a prediction.
        conflict: Whether the data push against the part: toward what it forbids, or away from what it asks for.
    """

    part: Part
    kind: str
    number: int
    what: str
    similarity: float
    effect: float | None
    conflict: bool


@dataclass(frozen=True)
class _Thing:
    kind: str
    number: int
    what: str
    words: str  # of what moves
    where: str  # of the prompts where it does
    effect: float | None
    clear: bool  # whether the effect is surely of its sign


def parts(spec: str) -> list[Part]:
    """Cut a specification into parts, at sentences and before `but should`, `and must not` and the like. A part with a word of negation
    forbids what it says."""
    found = []
    for sentence in _SENTENCE.split(spec):
        wanted = True
        for clause in _CLAUSE.split(sentence):
            if clause := clause.strip(" ,:-"):
                wanted = not _NOT.search(clause)
                found.append(Part(clause, wanted))
    return found


def suggest(
    spec: str,
    harvest: Harvest,
    analysis: Analysis,
    labels: Labels,
    prediction: Prediction | None = None,
    *,
    embed: Embed | None = None,
    most: int = 10,
) -> list[Suggestion]:
    """Rank what an audit found by how near it is to each part of a specification, findings before the clusters and features behind them.

    Args:
        spec: What the model should and should not learn.
        harvest: The harvest.
        analysis: Its analysis.
        labels: What features and clusters are called.
        prediction: What a run will change.
        embed: Makes `(n, d)` embeddings of n texts. Without one, texts are compared by the parts of words that they share (TF-IDF of 3 to 5
            letters, so that endings matter little).
        most: Suggestions for each part at most.

    Raises:
        ValueError: If the specification says nothing.
    """
    asked = parts(spec)
    if not asked:
        raise ValueError("The specification is empty. Say what the model should and should not learn, in sentences.")
    things = [thing for thing in _things(harvest, analysis, labels, prediction) if re.search(r"\w\w", thing.words)]
    if not things:
        return []
    queries = [_EMPTY.sub(" ", _NOT.sub(" ", part.text)) for part in asked]
    similar = _similarity(queries, [f"{thing.words} {thing.where}".strip() for thing in things], embed)
    # a part that speaks of the prompts alone is neither met nor gone against by what moves there
    of_what_moves = similar.copy()
    if conditional := [place for place, thing in enumerate(things) if thing.where]:
        of_what_moves[:, conditional] = _similarity(queries, [things[place].words for place in conditional], embed)
    found = []
    for part, row, moves in zip(asked, similar, of_what_moves, strict=True):
        near = [place for place in np.argsort(-row, kind="stable") if row[place] >= LEAST]
        near.sort(key=lambda place: things[place].kind != "finding")  # they put together what the others say one by one
        for place in near[:most]:
            one = things[place]
            told = one.clear and one.effect is not None and moves[place] >= LEAST
            conflict = bool(told and one.effect and (one.effect > 0) != part.wanted)
            found.append(Suggestion(part, one.kind, one.number, one.what, float(row[place]), one.effect, conflict))
    return found


def _similarity(queries: Sequence[str], texts: Sequence[str], embed: Embed | None) -> NDArray[np.float64]:
    if embed is None:
        from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer

        function_words = re.compile(rf"\b(?:{'|'.join(ENGLISH_STOP_WORDS)})\b")
        vectorizer = TfidfVectorizer(
            analyzer="char_wb",
            ngram_range=(3, 5),
            sublinear_tf=True,
            preprocessor=lambda text: function_words.sub(" ", text.lower()),
        )
        vectors = vectorizer.fit_transform([*queries, *texts])
        return (vectors[: len(queries)] @ vectors[len(queries) :].T).toarray()
    vectors = np.asarray(embed([*queries, *texts]), np.float64)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return vectors[: len(queries)] @ vectors[len(queries) :].T


def _things(harvest: Harvest, analysis: Analysis, labels: Labels, prediction: Prediction | None) -> list[_Thing]:
    """Everything with words, and its effect. What chosen completions have less of is a thing of its own, which the data push away from."""
    things = []
    predicted = _predicted(prediction) if prediction else {}

    def add(
        kind: str,
        number: int,
        words: str,
        place: tuple[str, int, str, int],
        sign: int = 0,
        what: str = "",
        where: str = "",
    ) -> None:
        """`sign` is that of a finding's effect on the words, which its tests are sure of."""
        effect, clear = None, False
        if place in predicted:
            score, low, high = predicted[place]
            effect = sign * abs(score) if sign else score
            clear = bool(sign) or low > 0 or high < 0
        things.append(_Thing(kind, number, what or words, words, where, effect, clear))

    summary = summarise(analysis, harvest, labels.features, most=len(analysis.attributions))
    for finding in (*summary.everywhere, *summary.conditional, *summary.rare):
        first = finding.lesson.first
        title = _words(labels.hypotheses.get(hypothesis_key(first), Label()))
        where = "" if finding.where == "all rows" else finding.where
        for sign, words in ((1, finding.more), (-1, finding.less)):
            if words:
                what = f"{'more' if sign > 0 else 'less'} {', '.join(words)}" + (f", where {where}" if where else "")
                text = " ".join((*words, title if (first.delta > 0) == (sign > 0) else ""))
                add("finding", finding.lesson.number, text, analysis.predicted_as(first), sign, what, where)
    seen: dict[str, int] = {}
    for number, one in enumerate(analysis.hypotheses):
        seen[one.view] = seen.get(one.view, 0) + 1
        if (
            one.conditional and one.q <= analysis.settings.max_q and seen[one.view] <= _HYPOTHESES
        ):  # else the cluster says it
            response = _words(labels.cluster(*one.response_cluster))
            condition = _words(labels.cluster(*one.condition_cluster)) if one.condition_cluster else ""
            own = _words(labels.hypotheses.get(hypothesis_key(one), Label()))
            what = response + (f", where {condition}" if condition else "")
            add("hypothesis", number, f"{own} {response}", analysis.predicted_as(one), what=what, where=condition)
    for kind, of in (("feature_cluster", "feature"), ("response_cluster", "response")):
        for number in range(len(analysis.clusters[of])):
            add(kind, number, _words(labels.cluster(of, number)), (kind, number, "global", -1))
    for feature, name in sorted(labels.features.items()):
        add("feature", feature, name, ("feature", feature, "global", -1))
    return things


def _predicted(prediction: Prediction) -> dict[tuple[str, int, str, int], tuple[float, float, float]]:
    """Score, and the ends of its interval, by kind, number, view and condition: for many things, each of which `Prediction.at` would look for."""
    names = "kind", "number", "view", "condition", "score", "score_low", "score_high"
    lines = zip(*(getattr(prediction, name).tolist() for name in names), strict=True)
    return {line[:4]: line[4:] for line in lines}


def _words(label: Label) -> str:
    return " ".join(part for part in (label.title, label.description, *label.keywords, *label.tokens) if part)


def embedder(name: str, batch: int = 64) -> Embed:
    """Sentence embeddings of any encoder that transformers loads: the mean over tokens of its last hidden states.

    Args:
        name: A folder, or a name on the hub.
        batch: Texts at once.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModel.from_pretrained(name).eval()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    @torch.no_grad()
    def embed(texts: Sequence[str]) -> NDArray[np.float32]:
        found = []
        for start in range(0, len(texts), batch):
            inputs = tokenizer(
                list(texts[start : start + batch]), padding=True, truncation=True, max_length=512, return_tensors="pt"
            )
            mask = inputs["attention_mask"][..., None]
            states = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
            found.append(((states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)).float().numpy())
        return np.concatenate(found)

    return embed
