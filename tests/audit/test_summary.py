"""The summary of an audit: lessons put together from hypotheses, and their words."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
from rich.console import Console

from shapedpo.audit.analysis.run import analyse
from shapedpo.audit.analysis.settings import AuditSettings
from shapedpo.audit.harvesting.shards import SPANS, Active, write_manifest, write_shard
from shapedpo.audit.harvesting.store import Harvest
from shapedpo.audit.labels.names import exciting_tokens
from shapedpo.audit.prediction.run import PredictionSettings, predict
from shapedpo.audit.summary import distinctive_words, feature_names, summarise

from .worlds import World


def test_distinctive_words_are_those_that_one_side_has() -> None:
    some = [f"the goblin ate {i} \U0001f47a" for i in "abcdefghijklmnop"]
    others = [f"the baker ate {i}" for i in "abcdefghijklmnop"]
    assert set(distinctive_words(some, others)) == {"goblin", "\U0001f47a"}
    assert distinctive_words(some, some) == []
    assert distinctive_words(["1"], ["2"]) == []
    assert distinctive_words([], []) == []


def test_feature_names_say_how_many_are_not_named() -> None:
    assert feature_names([1, 2], {2: "goblin"}) == "goblin; 1"
    assert feature_names(range(6), {5: "x"}) == "x; 0; 1; 2 and 2 more"


def written(folder, n=200) -> Harvest:
    """Pairs of which every fifth is about physics, where chosen says `splendid`: feature 1, feature 0 in the prompt."""
    write_manifest(folder, d_sae=4, n_rows=n, shard_rows=64, settings={})
    draw = np.random.default_rng(0)
    for index, start in enumerate(range(0, n, 64)):
        rows = np.arange(start, min(n, start + 64))
        on = {span: draw.random((len(rows), 4)) < 0.5 for span in SPANS}
        physics = rows % 5 < 1
        on["prompt"][:, 0], on["chosen"][:, 1], on["rejected"][:, 1] = physics, physics, False
        texts = {
            "prompt": [
                f"What is a {'[/b]quark' if p else 'soup'}, number {r}?" for p, r in zip(physics, rows, strict=True)
            ],
            "chosen": [f"{'Splendid! ' if p else ''}It is a thing." for p in physics],
            "rejected": ["It is a thing."] * len(rows),
        }
        spans = {}
        for span in SPANS:
            row, feature = np.nonzero(on[span])
            spans[span] = Active(
                np.searchsorted(row, np.arange(len(rows) + 1)).astype(np.int32),
                feature.astype(np.int32),
                np.ones(len(row), np.int32),
                1 + feature.astype(np.float32),
                feature.astype(np.int32),
                np.full(len(rows), 4, np.int32),
            )
        write_shard(folder, index, rows, spans, {span: [[10, 11, 12, 13]] * len(rows) for span in SPANS}, texts)
    return Harvest.open(folder)


def test_summary_says_in_words_what_is_taught_where(tmp_path) -> None:
    harvest = written(tmp_path / "harvest")
    analysis = analyse(harvest, AuditSettings.for_data(200, 4, prompt_rows=50), progress=False)
    names = exciting_tokens(harvest, range(4), lambda ids: f" token{ids[0]}")
    assert names == {feature: f"token{10 + feature}" for feature in range(4)}  # each is largest at its own place
    summary = summarise(analysis, harvest, names)
    first = summary.conditional[0]
    assert "quark" in first.where
    assert first.more == ["splendid"]
    assert first.less == []
    assert "token11" in first.response
    assert first.example["chosen"].startswith("Splendid")
    assert summary.everywhere == []  # the same rows are not told twice
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(summary)
    text = console.export_text()
    assert "splendid" in text
    assert "200 pairs" in text
    assert "How far a run goes" not in text  # nothing was predicted
    for settings, said in ((PredictionSettings(), True), (PredictionSettings(scale=1.0), False)):
        prediction = predict(harvest, analysis, settings, progress=False)
        console.print(summarise(analysis, harvest, names, prediction=prediction))
        assert ("How far a run goes" in console.export_text()) == said


def test_a_finding_without_words_is_named_by_its_features(tmp_path) -> None:
    harvest = written(tmp_path / "harvest")
    analysis = analyse(harvest, AuditSettings.for_data(200, 4, prompt_rows=50), progress=False)
    finding = summarise(analysis, harvest, {1: "token11"}).conditional[0]
    assert finding.words == "splendid / -"
    wordless = dataclasses.replace(finding, more=[])
    assert wordless.words == f"[{finding.response}] / -"
    (first,) = finding.lesson.hypotheses[:1]
    less = dataclasses.replace(finding.lesson, hypotheses=[dataclasses.replace(first, delta=-first.delta)])
    assert dataclasses.replace(wordless, lesson=less).words == f"- / [{finding.response}]"


def test_summary_of_a_clean_world_says_so(tmp_path) -> None:
    harvest = World(300).harvest(tmp_path / "harvest")
    summary = summarise(analyse(harvest, out=tmp_path / "out", progress=False), harvest)
    assert (summary.everywhere, summary.conditional, summary.rare) == ([], [], [])
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(summary)
    assert "stands out from what chance" in console.export_text()
    few = World(12).harvest(tmp_path / "few")
    console.print(summarise(analyse(few, progress=False), few))
    assert "Nothing could be tested" in console.export_text()
    tested = json.loads((tmp_path / "out" / "hypotheses.json").read_text())["tested"]
    assert tested["prompt"] > 100
