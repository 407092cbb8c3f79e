"""Contrast sets: responses that show a concept and responses that do not, from files of several forms."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from ..readouts.responses import Messages, Response, response_text


ANSWERS = ("response", "completion")
SIDES = (("positive", "negative"), ("chosen", "rejected"))
_LABELS = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}
FORMS = (
    "`prompt`, `response` (or `completion`) and `label`, or in its place `shows`, the list of concepts that the response shows; "
    "or `prompt`, `positive` and `negative` (or `chosen` and `rejected`)"
)


class Row(NamedTuple):
    """A labelled response.

    Attributes:
        prompt: Text or messages.
        response: Likewise.
        label: Whether it shows the concept.
        source: Where it is from, such as a file's name.
        others: Names of other concepts that it shows.
    """

    prompt: Any
    response: Any
    label: bool
    source: str
    others: tuple[str, ...] = ()


class Contrast(NamedTuple):
    """Labelled responses.

    Attributes:
        responses: N of them, each with its prompt.
        labels: `(N,)` bool, whether it shows the concept.
        groups: `(N,)` int, responses to one prompt have one number: they are compared with each other, and never split up.
        sources: `(N,)` str, where each is from, such as a file's name.
        others: By name, other concepts that it may be taken for: `(N,)` bool, the responses that show each.
    """

    responses: list[Response]
    labels: np.ndarray
    groups: np.ndarray
    sources: np.ndarray
    others: Mapping[str, np.ndarray] = MappingProxyType({})

    @classmethod
    def of(cls, rows: Iterable[tuple[Any, Any, bool, str] | Row]) -> Contrast:
        """From [`Row`]s, or `(prompt, response, label, source)`.

        Raises:
            ValueError: If there are not at least two responses of either kind.
        """
        given = [Row(*row) for row in rows]
        numbers: dict[str, int] = {}
        keys = [_key(row.prompt) for row in given]
        groups = np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)
        labels = np.array([row.label for row in given], dtype=bool)
        if min(labels.sum(), (~labels).sum()) < 2:
            raise ValueError(
                f"Of the {len(given)} responses of the contrast set, {labels.sum()} show the concept: at least 2 that do and 2 that do not "
                "are needed."
            )
        names = dict.fromkeys(name for row in given for name in row.others)
        others = {name: np.array([name in row.others for row in given]) for name in names}
        sources = np.array([row.source for row in given])
        return cls([(row.prompt, row.response) for row in given], labels, groups, sources, others)

    def take(self, index: np.ndarray) -> Contrast:
        """Some of them, by their numbers."""
        others = {name: shown[index] for name, shown in self.others.items()}
        some = [self.responses[i] for i in index]
        return Contrast(some, self.labels[index], self.groups[index], self.sources[index], others)

    def hard(self) -> dict[str, np.ndarray]:
        """Kinds of negatives, `(N,)` bool each: those that show each of the others, and those of each source where there are several.

        They overlap, and one that has none is left out.
        """
        kinds = {name: shown & ~self.labels for name, shown in self.others.items()}
        names = np.unique(self.sources[~self.labels])
        if len(names) > 1:
            kinds |= {str(name): (self.sources == name) & ~self.labels for name in names}
        return {name: rows for name, rows in kinds.items() if rows.any()}

    def weights(self) -> np.ndarray:
        """`(N,)`, what each response counts in a fit: the kinds of [`hard`] alike, however rare (see [`~shapedpo.sae.find.balanced_weights`])."""
        from ..sae.find import balanced_weights

        return balanced_weights(self.labels, list(self.hard().values()))

    def pairs(self) -> np.ndarray:
        """`(P, 2)`, the numbers of a response that shows the concept and one that does not, of every such two of a group."""
        found = []
        for group in np.unique(self.groups):
            rows = np.flatnonzero(self.groups == group)
            found += [(a, b) for a in rows[self.labels[rows]] for b in rows[~self.labels[rows]]]
        return np.array(found, dtype=np.int64).reshape(-1, 2)

    def split(self, heldout: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the responses to fit on and of those to judge on: whole groups, both kinds on both sides.

        Args:
            heldout: Share that is held out, at most 1/2.
            seed: Of the shuffle.

        Raises:
            ValueError: If either side would lack one kind.
        """
        from sklearn.model_selection import StratifiedGroupKFold

        folds = max(2, round(1 / heldout))
        most = min(len(np.unique(self.groups[self.labels == kind])) for kind in (True, False))
        if most >= 2:
            splitter = StratifiedGroupKFold(min(folds, most), shuffle=True, random_state=seed)
            for fit, judge in splitter.split(np.zeros(len(self.labels)), self.labels, self.groups):
                if all(0 < self.labels[part].sum() < len(part) for part in (fit, judge)):
                    return fit, judge
        raise ValueError(
            "The contrast set cannot be split into a part to fit on and one to judge on: responses to one prompt stay together, and each "
            "part needs both kinds. Give more prompts."
        )


def read_contrast(
    paths: Sequence[str], label: bool | None = None, chat: bool = False, concept: str | None = None
) -> list[Row]:
    """Rows for [`Contrast.of`] from files.

    Args:
        paths: JSON Lines, JSON, CSV or Parquet, of the columns in [`FORMS`]; other columns are passed over.
        label: What all their responses are, for files without labels, which have `prompt` and `response` only.
        chat: Whether text is a user's message and the assistant's answer to it. Else text is read as it stands, as TRL does.
        concept: Which of the concepts that rows with `shows` name is the one.

    Raises:
        ValueError: If a file is missing or a row has another form; the text names the row.
    """

    def message(text: Any, role: str) -> str | Messages:
        return [{"role": role, "content": text}] if chat and isinstance(text, str) else text

    rows = []
    for path in paths:
        for place, row in _rows(path):
            shows = _shows(row, place)
            named = label is None and shows is not None and "label" not in row
            if named and concept is None:
                raise ValueError(
                    f"{place} names the concepts that it shows, and not which is the one. Give it a `label`, or `shapedpo fit` a `--concept`."
                )
            others = tuple(name for name in shows or () if name != concept)
            for answer, shown in _answers(row, concept in (shows or ()) if named else label, place):
                prompt, response = message(row["prompt"], "user"), message(answer, "assistant")
                _check_texts(prompt, response, place)
                rows.append(Row(prompt, response, shown, str(path), others))
    return rows


def _check_texts(prompt: Any, response: Any, place: str) -> None:
    """Raise `ValueError` unless they are two strings or two lists of messages, and the response has text."""
    for name, value in (("prompt", prompt), ("response", response)):
        messages = isinstance(value, list) and all(isinstance(m, Mapping) and "role" in m for m in value)
        if not isinstance(value, str) and not (messages and value):
            raise ValueError(
                f"{place}: the {name} must be a string or a list of messages with `role` and `content`, got {value!r:.80}."
            )
    if isinstance(prompt, str) != isinstance(response, str):
        raise ValueError(f"{place}: prompt and response must both be strings, or both lists of messages.")
    if not response_text(response).strip():
        raise ValueError(f"{place}: the response is empty. Leave the row out.")


def _shows(row: Mapping[str, Any], place: str) -> list[str] | None:
    """The concepts that a row says its response shows, if it says so."""
    shows = row.get("shows")
    if shows is None:
        return None
    if isinstance(shows, str):  # in a CSV
        return [name.strip() for name in shows.split(",") if name.strip()]
    if not isinstance(shows, list) or not all(isinstance(name, str) for name in shows):
        raise ValueError(f"{place} has `shows`: {shows!r}. Expected a list of names.")
    return shows


def _answers(row: Mapping[str, Any], label: bool | None, place: str) -> list[tuple[Any, bool]]:
    if "prompt" not in row:
        raise ValueError(f"{place} has no 'prompt'. Expected {FORMS}.")
    answer = next((row[name] for name in ANSWERS if row.get(name) is not None), None)
    if answer is not None and label is not None:
        return [(answer, label)]
    if answer is not None:
        if "label" not in row:
            raise ValueError(f"{place} has no 'label'. Expected {FORMS}.")
        given = row["label"].strip().lower() if isinstance(row["label"], str) else row["label"]
        if not isinstance(given, Hashable) or given not in _LABELS:
            raise ValueError(f"{place} has the label {row['label']!r}. Expected true or false.")
        return [(answer, _LABELS[given])]
    if label is None:
        for positive, negative in SIDES:
            if row.get(positive) is not None and row.get(negative) is not None:
                return [(row[positive], True), (row[negative], False)]
    raise ValueError(
        f"{place} has no {ANSWERS[0]!r}. Expected {FORMS if label is None else '`prompt` and `response`'}."
    )


def _rows(path: str) -> list[tuple[str, Mapping[str, Any]]]:
    """A file's rows, each with what to call it in an error."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"there is no contrast set '{path}'.")
    if file.suffix in (".csv", ".parquet"):
        import pandas as pd

        try:
            csv = file.suffix == ".csv"
            table = pd.read_csv(file, dtype=str, keep_default_na=False) if csv else pd.read_parquet(file)
        except (ValueError, OSError) as error:  # of another encoding, or no table at all
            raise ValueError(f"cannot read '{path}' as {file.suffix[1:]}: {error}.") from error
        return [(f"'{path}', row {number}", _plain(row)) for number, row in enumerate(table.to_dict("records"), 1)]
    try:
        text = file.read_text(encoding="utf-8-sig")  # with or without the mark that some editors put first
    except UnicodeDecodeError as error:
        raise ValueError(f"'{path}' is not UTF-8 ({error}). Convert it.") from error
    entries: list[tuple[str, Any]] = []
    if file.suffix == ".json":
        entries = [(f"'{path}', row {number}", row) for number, row in enumerate(_json(text, f"'{path}'"), 1)]
    else:
        for number, line in enumerate(
            text.split("\n"), start=1
        ):  # not `splitlines`: JSON may hold other line ends in strings
            if line.strip():
                place = f"'{path}', line {number}"
                entries.append((place, _json(line, place)))
    for place, row in entries:
        if not isinstance(row, Mapping):
            raise ValueError(f"{place} is no object. Expected {FORMS}.")
    return entries


def check_labels(rows: Iterable[Row]) -> None:
    """Raise `ValueError` if a response to a prompt is there as one that shows the concept and as one that does not."""
    labels: dict[tuple[str, str], bool] = {}
    for row in rows:
        if labels.setdefault((_key(row.prompt), _key(row.response)), row.label) != row.label:
            raise ValueError(
                f"the response {response_text(row.response)!r:.80} to {response_text(row.prompt)!r:.80} is there twice, once as one that shows "
                "the concept and once as one that does not. Leave one out."
            )


def _key(text: str | Messages) -> str:
    return text if isinstance(text, str) else json.dumps(text, sort_keys=True)


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{place}: not JSON ({error}).") from error


def _plain(row: Mapping[Any, Any]) -> dict[str, Any]:
    """A table's row with Python's own lists and numbers."""
    return {
        str(key): value.tolist() if isinstance(value, np.ndarray | np.generic) else value for key, value in row.items()
    }
