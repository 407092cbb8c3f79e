"""A model of what a step costs: floating-point operations, bytes and messages, each times what one of it takes on the machine.

The counts are formulas, checked against what was counted in real steps. What one of it takes is fitted on some cases (non-negative least
squares of relative errors) and tried on others. Times are CPU time, so that a busy machine disturbs them little, and are scaled by how fast a fixed piece of
work was in the same minute.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import nnls

from benchmarks.scaling_cases import COLUMNS, Case, split_launch


FLOAT = 4
"""Bytes."""
GATHERED = 1024
"""Features whose tables the monitor gathers at a time (`shapedpo/monitor/features.py`)."""


# --- counts ------------------------------------------------------------------------------------------------------------------------


def matrix_parameters(case: Case) -> int:
    """Parameters of the layers' matrices: attention's four, and the three of an MLP four times as wide."""
    return 16 * case.hidden**2 * case.layers


def trl_flops(case: Case, scored: int | None = None) -> int:
    """Of TRL's step: forward, backward and the reference's forward.

    Attention keeps no scores and computes them again in the backward pass (two products forward, five backward, over the whole square, as
    flash attention is counted); the fused head computes its logits again too.

    Args:
        case: What is trained.
        scored: Positions of a batch whose logits are computed: by default all that predict a token, as on a CPU; with Triton the completions' only.
    """
    n = 2 * case.pairs * case.tokens
    scored = 2 * case.pairs * (case.tokens - 1) if scored is None else scored
    layers = 2 * n * matrix_parameters(case) * (1 + 2 + 1)
    head = 2 * scored * case.hidden * case.vocabulary * (1 + 3 + 1)
    attention = 2 * n * case.tokens * case.hidden * case.layers * (2 + 5 + 2)
    return layers + head + attention


def read_tokens(case: Case) -> int:
    """Completion tokens of a batch: with the EOS that TRL adds, which takes the place of a word."""
    return 2 * case.pairs * case.completion


def read_flops(case: Case) -> int:
    """Of reading: each watched feature's product with each completion token."""
    columns = 0 if case.action == "text" else COLUMNS * case.concepts
    return 2 * read_tokens(case) * case.hidden * (columns + case.features * case.monitor)


def shaping_flops(case: Case) -> int:
    """What shaping adds: reading, the running sums of three figures and of their squares, and a projection's small products.

    What the hold controller computes on the host is left out.
    """
    b, c = case.pairs, case.concepts
    windows = 2 * 2 * 3 * b * (c + case.features * case.monitor)
    project = 2 * b * c**2 + 2 * c**2 + 2 * b * c if case.action == "project" else 0
    return read_flops(case) + windows + project


def shaping_messages(case: Case, processes: int, logged: bool = False) -> tuple[int, int]:
    """How many messages a process sends more than under TRL, and how many bytes it hands in.

    In a step: one sum of all concepts' figures; the pairs' rows for the hold controller (which one process gathers too); the Gram matrix of a
    projection. At a log: one sum of the windows and a table of the top pairs, for the concepts and, the table in parts, for the monitored features.
    """
    c = case.concepts
    sizes = [case.pairs * (2 + 2 * c)] if case.action == "hold" else []
    if processes > 1:
        sizes.append(4 * (c + 3))
    if processes > 1 and case.action == "project":
        sizes.append(2 * c * (c + 1))  # float64
    if processes > 1 and logged:
        sizes += [6 * (c + 1), 8 * 6 * c]
        if case.monitor:
            sizes += [6 * (case.features + 1), *(6 * part for part in gathered(case.features))]
    return len(sizes), FLOAT * sum(sizes)


def gathered(features: int) -> list[int]:
    """The parts in which tables of all features are gathered."""
    return [min(GATHERED, features - first) for first in range(0, features, GATHERED)]


def held_bytes(case: Case) -> int:
    """Weights of the watched features and running sums, float32: what stays in memory beside TRL's."""
    d, c = case.hidden, case.concepts
    watched = (0 if case.action == "text" else c * COLUMNS) + case.features * case.monitor
    readers = watched * (2 * d + 2) + d * bool(watched)  # each one's weights, bias and threshold; the SAE's own bias
    state = 6 * c + 8 * 6 * c + 12 * case.features * case.monitor
    return FLOAT * (readers + state)


# --- terms -------------------------------------------------------------------------------------------------------------------------


def trl_terms(case: Case, launch: str) -> dict[str, float]:
    """TRL's step as a sum of terms. The host's work and that on parameters and gradients is each launch's own."""
    n = 2 * case.pairs * case.tokens
    parameters = matrix_parameters(case) + 2 * case.vocabulary * case.hidden
    return {
        f"host, {launch}": 1.0,
        f"layers, {split_launch(launch)[0]}": case.layers,
        "GFLOP": trl_flops(case) / 1e9,
        "activations, MB": FLOAT * n * case.hidden * case.layers / 1e6,
        "logits, MB": FLOAT * 2 * case.pairs * (case.tokens - 1) * case.vocabulary / 1e6,
        f"parameters, MB, {launch}": FLOAT * parameters / 1e6,
    }


def shaping_terms(case: Case, processes: int) -> dict[str, float]:
    """What shaping adds, as a sum of terms."""
    c, tokens = case.concepts, read_tokens(case)
    text = case.action == "text"
    watched = case.features * case.monitor
    return {
        "step": 1.0,
        "concept": c,
        "concept that reads activations": 0 if text else c,
        "text, thousand tokens": tokens / 1e3 if text else 0.0,
        "reads, MB": 0.0 if text else FLOAT * tokens * case.hidden * c / 1e6,
        "GFLOP": read_flops(case) / 1e9,
        "monitor": float(case.monitor),
        "monitored activations, MB": FLOAT * tokens * watched / 1e6,
        "monitor's state, MB": FLOAT * watched * 12 / 1e6,
        "hold": float(case.action == "hold"),
        "held concept": c * (case.action == "hold"),
        "project": float(case.action == "project"),
        "message": float(shaping_messages(case, processes)[0]),
    }


class Costs:
    """What one of each term takes, milliseconds.

    Args:
        rows: The terms of each case.
        times: What each took, milliseconds.
    """

    def __init__(self, rows: Sequence[Mapping[str, float]], times: Sequence[float]) -> None:
        self.names = sorted({name for row in rows for name in row if any(row.get(name, 0) for row in rows)})
        table = np.array([[row.get(name, 0.0) for name in self.names] for row in rows])
        scale = np.asarray(times)[:, None]
        self.each = dict(zip(self.names, nnls(table / scale, np.ones(len(rows)))[0].tolist(), strict=True))

    def predict(self, row: Mapping[str, float]) -> float:
        """Milliseconds. A term that no fitted case had counts nothing."""
        return sum(self.each.get(name, 0.0) * amount for name, amount in row.items())


# --- what was measured -------------------------------------------------------------------------------------------------------------


SECTIONS = ("collate", "read", "shaping", "monitor", "hold", "messages")
"""Of a shaped step: texts in the collator; activations in the reference's pass; scores, offsets and metrics; running sums; the controller; collectives."""


def summary(found: Mapping[str, Any]) -> dict[str, Any]:
    """A measured case as one row: medians over its steps.

    `TRL, ms` and `shaped, ms` are whole steps, `added, ms` is shapedpo's own code in a shaped step (and, section by section, its parts): CPU time of rank 0, or on a GPU wall
    time. `difference, %` is what the whole steps say of the overhead, with all their noise.
    """
    case, gpu = Case(**found["case"]), found["device"] == "cuda"
    kind, index = ("wall", 1) if gpu else ("cpu", 0)
    plain, shaped = ([turn for turn in found["turns"] if turn["plain"] == which] for which in (True, False))
    whole = [turn for turn in shaped if not turn["synchronised"]]
    parts = [turn for turn in shaped if turn["synchronised"] == gpu]

    def middle(values: Iterable[float]) -> float:
        return 1e3 * statistics.median(values)

    counts = found["counts"]
    messages = {
        which: np.array(list(count["messages"].values()) or [[0, 0]]).sum(axis=0) for which, count in counts.items()
    }
    more = {
        "": messages["shaped"] - messages["plain"],
        ", logged": messages["shaped, logged"] - messages["plain, logged"],
    }
    row = {
        "launch": found["launch"],
        **case.fields,
        "processes": found["processes"],
        "steps": len(plain) + len(shaped),
        "TRL, ms": middle(turn[kind] for turn in plain),
        "shaped, ms": middle(turn[kind] for turn in whole),
        "added, ms": middle(sum(times[index] for times in turn["sections"].values()) for turn in parts),
        **{f"{name}, ms": middle(turn["sections"].get(name, [0, 0])[index] for turn in parts) for name in SECTIONS},
        "TRL, wall ms": middle(turn["wall"] for turn in plain),
        "shaped, wall ms": middle(turn["wall"] for turn in whole),
        "a log, ms": middle(log[index] for log in found["logs"]),
        "pace, ms": 1.0 if gpu else statistics.median(turn["pace"] for turn in found["turns"]),
        "TRL, FLOP": counts["plain"]["flops"],
        "extra FLOP": counts["shaped"]["flops"] - counts["plain"]["flops"],
        "extra operators": counts["shaped"]["operators"] - counts["plain"]["operators"],
        "TRL, messages": int(messages["plain"][0]),
        "TRL, bytes": int(messages["plain"][1]),
        **{f"extra messages{which}": int(number[0]) for which, number in more.items()},
        **{f"extra bytes{which}": int(number[1]) for which, number in more.items()},
        "held bytes": found["held_bytes"],
    }
    for name, turns in (("TRL", plain), ("shaped", whole)):
        row[f"{name}, peak bytes"] = max((turn["peak"] for turn in turns if turn["peak"] is not None), default=None)
        row[f"{name}, tokens/s"] = 2e3 * case.pairs * case.tokens * found["processes"] / row[f"{name}, wall ms"]
    row["overhead, %"] = 100 * row["added, ms"] / row["TRL, ms"]
    row["difference, %"] = 100 * (row["shaped, ms"] / row["TRL, ms"] - 1)
    return row


def case_of(row: Mapping[str, Any]) -> Case:
    """The case of a row."""
    return Case(**{name: row[name] for name in Case().fields})


def fit(rows: Sequence[dict[str, Any]], learn: Sequence[bool]) -> tuple[Costs, Costs]:
    """Fits both models on some rows, and writes into each what they predict for it.

    Args:
        rows: Of [`summary`]. Gain `predicted TRL, ms`, `predicted added, ms`, `predicted overhead, %` and `predicted shaped, ms`.
        learn: Which to fit on.
    """
    pace = statistics.median(row["pace, ms"] for row in rows)
    cases = [case_of(row) for row in rows]
    terms = {
        "TRL": [trl_terms(case, row["launch"]) for case, row in zip(cases, rows, strict=True)],
        "added": [shaping_terms(case, row["processes"]) for case, row in zip(cases, rows, strict=True)],
    }
    costs = []
    for name, table in terms.items():
        times = [row[f"{name}, ms"] * pace / row["pace, ms"] for row in rows]
        known = [index for index, one in enumerate(learn) if one]
        cost = Costs([table[index] for index in known], [times[index] for index in known])
        for row, one in zip(rows, table, strict=True):
            row[f"predicted {name}, ms"] = cost.predict(one) * row["pace, ms"] / pace
        costs.append(cost)
    for row, one in zip(rows, learn, strict=True):
        row["predicted shaped, ms"] = row["predicted TRL, ms"] + row["predicted added, ms"]
        row["predicted overhead, %"] = 100 * row["predicted added, ms"] / row["predicted TRL, ms"]
        row["held out"] = not one
    return costs[0], costs[1]
