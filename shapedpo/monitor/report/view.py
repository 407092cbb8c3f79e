"""What the report shows, worked out of a digest of the records: plain values for the template, and the data for its charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...pages import clean
from .digest import Digest, Record, items, mapping, number, numbers, thin
from .drawn import FEATURES, TEXT, drawn
from .marks import interval, scale, spark


EXAMPLE = 600
"""The same for the example rows of a feature, of which there can be hundreds."""

COLUMNS = 8
"""Probes that the table of rates has columns for."""

UNITS = {"batch": "pairs", "window": "pairs", "monitor": "features"}
"""What settings are counted in that do not say so."""


def view(digest: Digest) -> dict[str, Any]:
    """Everything the template needs.

    Args:
        digest: Of the records.

    Returns:
        Its variables. All texts are cleaned and cut, none is escaped: that is the template's part. `data` is what the page's
        script gets, as JSON.
    """
    concepts = _concepts(digest)
    names = [concept["name"] for concept in concepts]
    run = digest.run
    settings = mapping(run.get("settings"))
    most = number(settings.get("max_steps"))
    shown_last = digest.steps.last
    last = mapping(shown_last[1]) if shown_last else {}
    return {
        "title": clean(run.get("run_name") or clean(run.get("model")).rstrip("/").split("/")[-1] or "a run", 200),
        "run": {"model": clean(run.get("model"), 300), **_data(run)},
        "known": bool(run),
        "settings": _settings(settings),
        "concepts": concepts,
        "status": {
            "finished": digest.finished,
            "step": digest.step,
            "most": int(most) if most and most > 0 else None,
            "pairs": number(last.get("pairs")),
            "epoch": number(last.get("epoch")),
        },
        "estimator": "probe rollouts" if _probed_last(digest) else clean(last.get("estimator") or "", 200),
        "left_out": number(last.get("left_out")) or 0.0,
        "verdicts": {
            v: sum(c["verdict"] == v for c in concepts) for v in ("amplified", "suppressed", "unclear", "none")
        },
        "has_steps": shown_last is not None,
        "has_strength": any(concept["strength"] is not None for concept in concepts),
        "features": _features(digest.features),
        "rates": _rates(digest, concepts),
        "pairs": _pairs(digest.pairs, concepts),
        "has_texts": settings.get("texts") is not False,
        "has_samples": any(probe["samples"] for probe in digest.sampled.thinned().values()),
        "data": drawn(digest, names, concepts),
    }


def _data(run: Record) -> dict[str, Any]:
    data = mapping(run.get("data"))
    return {"rows": number(data.get("rows")), "fingerprint": clean(data.get("fingerprint"), 80)}


def _settings(settings: Record) -> list[tuple[str, str]]:
    """Name and value of each setting, in the order of the record."""
    return [
        (clean(key, 80), _plain(value) if value is None else f"{_plain(value)} {UNITS.get(key, '')}".rstrip())
        for key, value in settings.items()
    ]


def _plain(value: Any) -> str:
    """A value in few words: `sigmoid, sft`, `0.0002`, `off`."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{clean(key, 80)}: {_plain(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_plain(item) for item in value)
    return clean(value, 300)


def _concepts(digest: Digest) -> list[dict[str, Any]]:
    """The named concepts, most amplified first; those without an estimate last."""
    last = mapping(mapping(digest.steps.last[1]).get("concepts")) if digest.steps.last else {}
    probe = mapping(mapping(digest.probes.last[1]).get("concepts")) if digest.probes.last else {}
    asked = {clean(concept.get("name")): concept for concept in items(digest.run.get("concepts"))}
    history = digest.steps.thinned()
    changes = probe if _probed_last(digest) or not any("change" in mapping(v) for v in last.values()) else last
    names = list(dict.fromkeys([*asked, *map(clean, last), *map(clean, probe)]))
    latest = {name: _estimates(mapping(last.get(name))) for name in names}
    axis = scale([estimates["amplification"] for estimates in latest.values()])
    rows = []
    for name in names:
        concept, estimates = asked.get(name, {}), latest[name]
        values = [mapping(mapping(record.get("concepts")).get(name)) for record in history.values()]
        readout = dict(mapping(concept.get("readout")))
        gauge = interval(estimates["amplification"], axis)
        rows.append(
            {
                "name": name,
                "label": clean(concept.get("label") or name, 200),
                "action": clean(concept.get("action") or "watch", 40),
                "method": _method(concept.get("method")),
                "asked_strength": number(concept.get("strength")),
                "readout": clean(readout.pop("type", ""), 80),
                "reads": _plain(readout),
                "gate": "" if concept.get("gate") is None else _plain(concept["gate"]),
                "threshold": number(concept.get("threshold")),
                "gauge": gauge,
                "verdict": gauge.verdict,
                "pressure": estimates["pressure"],
                "delta": estimates["delta"],
                "strength": number(mapping(last.get(name)).get("strength")),
                "change": interval(numbers(mapping(changes.get(name)).get("change"), 2), None),
                "spark": spark(list(history), [numbers(v.get("amplification"), 2) for v in values]),
            }
        )
    return sorted(rows, key=lambda row: (row["gauge"].value is None, -(row["gauge"].value or 0.0)))


def _probed_last(digest: Digest) -> bool:
    """Whether the last probe is of the last figures' step or later: a run ends with one."""
    return digest.probes.last is not None and (digest.steps.last or (-1,))[0] <= digest.probes.last[0]


def _method(method: Any) -> str:
    """`reward`, or with options `mask (fraction: 0.05)`."""
    if isinstance(method, Mapping) and "name" in method:
        options = _plain({key: value for key, value in method.items() if key != "name"})
        return f"{_plain(method['name'])} ({options})" if options else _plain(method["name"])
    return "" if method is None else _plain(method)


def _estimates(values: Record) -> dict[str, tuple[float | None, ...]]:
    return {key: numbers(values.get(key), 2) for key in ("amplification", "pressure", "delta")}


def _features(record: Record) -> dict[str, Any]:
    """The two tables of SAE features, on one scale."""
    tables = {side: items(record.get(side))[:FEATURES] for side in ("amplified", "suppressed")}
    axis = scale([numbers(entry.get("amplification"), 2) for entries in tables.values() for entry in entries])
    return {
        "known": bool(record),
        "step": number(record.get("step")),
        "sae": clean(record.get("sae"), 200),
        "watched": number(record.get("watched")),
        **{
            side: [
                {
                    "feature": clean(entry.get("feature"), 40),
                    "label": clean(entry.get("label"), 200),
                    "tokens": _tokens(entry.get("tokens")),
                    "promotes": _tokens(entry.get("promotes")),
                    "gauge": interval(numbers(entry.get("amplification"), 2), axis),
                    "pressure": numbers(entry.get("pressure"), 2),
                    "delta": numbers(entry.get("delta"), 2),
                    "rows": [_pair(pair, EXAMPLE) for pair in items(entry.get("rows"))[:3]],
                }
                for entry in entries
            ]
            for side, entries in tables.items()
        },
    }


def _tokens(tokens: Any) -> list[str]:
    """Tokens as they are read: without the space before a word, and blank ones by a sign."""
    blank = {"": "␣", "\n": "⏎", "\t": "⇥"}
    texts = [clean(token, 40) for token in tokens[:8]] if isinstance(tokens, list | tuple) else []
    return [text.strip() or blank.get(text.strip(" "), "␣") for text in texts]


def _pair(pair: Record, limit: int) -> dict[str, Any]:
    values = {key: number(pair.get(key)) for key in ("row", "delta", "margin", "contribution")}
    return {**values, **{key: clean(pair.get(key), limit) for key in ("prompt", "chosen", "rejected")}}


def _pairs(record: Record, concepts: Sequence[Record]) -> dict[str, Any]:
    """The pairs behind each concept that has any, in the concepts' order."""
    of = {clean(name): pairs for name, pairs in mapping(record.get("concepts")).items()}
    return {
        "known": bool(record),
        "step": number(record.get("step")),
        "groups": [
            {"name": concept["name"], "label": concept["label"], "verdict": concept["verdict"], "rows": rows}
            for concept in concepts
            if (rows := sorted((_pair(pair, TEXT) for pair in items(of.get(concept["name"]))), key=_size, reverse=True))
        ],
    }


def _size(pair: Record) -> float:
    """How much a pair contributes, either way."""
    return abs(pair["contribution"] or 0.0)


def _rates(digest: Digest, concepts: Sequence[Record]) -> dict[str, Any]:
    """Rates by probe, those before training beside the later ones."""
    probes = digest.probes.thinned()
    steps = thin(list(probes), COLUMNS)
    last = probes[steps[-1]] if steps else {}
    rows = []
    for concept in concepts:
        cells = []
        for step in steps:
            rate, low, high = numbers(
                mapping(mapping(probes[step].get("concepts")).get(concept["name"])).get("rate"), 3
            )
            cells.append({"value": rate, "low": low, "high": high})
        rows.append({"label": concept["label"], "cells": cells, "change": concept["change"]})
    return {
        "known": bool(probes),
        "steps": steps,
        "count": len(probes),
        "rollouts": number(last.get("rollouts")),
        "rollouts_before": number(probes[0].get("rollouts")) if 0 in probes else None,
        "prompts": number(last.get("prompts")),
        "rows": rows,
    }
