"""The page of a run's records, without a browser: what it shows, what it survives, and what gets through it."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from shapedpo.cli import main
from shapedpo.monitor.report import ReportSink, render, write_whole
from shapedpo.monitor.report.digest import HISTORY, SAMPLED, Digest, thin
from shapedpo.monitor.report.marks import interval, scale, spark
from shapedpo.pages import clean
from tests.monitor.records import synthetic


HOSTILE = [
    "</script><script>window.hacked = 1</script>",
    '<img src=x onerror="window.hacked = 1">',
    "\"' onmouseover=window.hacked=1 '\"",
    "<!--<script>",
    "\u2028\u2029 </style> {{ 7 * 7 }} {% raw %} ${1}",
    "\u202eright to left \u05d0\u05d1\u05d2 \u2066",
    "w" * 600,
    "lone \ud800 and \udfff, \x00 and \x1b[31m",
]


class Page(HTMLParser):
    """Elements, attributes and text of a page, as a browser would split it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.inside = ""
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self.feed(html)
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in self.raw:
            self.inside = tag
            self.raw[tag].append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = "" if tag == self.inside else self.inside

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.raw[self.inside][-1] += data
        else:
            self.texts.append(data)

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.raw["script"][0])

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def hostile_records() -> list[dict[str, Any]]:
    """Records with something hostile wherever a text can stand."""
    records = synthetic(concepts=3, steps=4, features=3, samples=2, probes=2)
    names = [concept["name"] for concept in records[0]["concepts"]]

    def poison(value: Any, seed: int) -> Any:
        if isinstance(value, dict):
            return {
                key: item if key == "type" else poison(item, seed + i) for i, (key, item) in enumerate(value.items())
            }
        if isinstance(value, list):
            return [poison(item, seed + i) for i, item in enumerate(value)]
        if isinstance(value, str) and value not in names:
            return HOSTILE[seed % len(HOSTILE)] + value
        return value

    return [poison(record, i) for i, record in enumerate(records)]


def test_page_shows_what_was_asked_and_what_came_of_it() -> None:
    page = Page(render(synthetic(concepts=5)))
    for expected in (
        "goblin-world-hold",
        "meta-llama/Llama-3.1-8B-Instruct",
        "5,000 rows",
        "ab12f09c77d1e3aa",
        "learning_rate 0.0002",
        "step 300 of 300",
        "finished",
        "Amplification is a gauge",
        "65,536 watched",
        "% of 64 rollouts of 64 held-out prompts",
    ):
        assert expected in page.text
    data = page.data
    assert data["concepts"][0]["name"] == "emoji"  # the most amplified first
    assert data["concepts"][-1]["name"] == "hedging"
    assert data["finished"] is True
    assert [probe["step"] for probe in data["probes"]] == [0, 150, 300]
    assert data["sampled"][-1]["r2"] == 0.87
    tokens = data["sampled"][0]["samples"][0]["tokens"]
    assert "".join(tokens) == synthetic(concepts=5)[1]["samples"][0]["completion"]


def test_figures_stand_in_the_page_with_their_intervals() -> None:
    record = {"type": "step", "step": 10, "concepts": {"goblin": {"amplification": [0.5, 0.1], "strength": 2.0}}}
    text = Page(render([record])).text
    assert "+0.50 [+0.30, +0.70]" in text
    assert "▲ 1 amplified ▼ 0 suppressed 0 without a clear change" in text


@pytest.mark.parametrize(
    ("share", "text"), [(0.0, None), (0.05, "5.0 % of the window's pairs are left out"), (0.6, "No estimates")]
)
def test_pairs_that_are_left_out_are_told(share: float, text: str | None) -> None:
    warnings = [
        text
        for text in Page(render([{"type": "step", "step": 1, "left_out": share}])).text.split(". ")
        if "window's pairs" in text
    ]
    assert len(warnings) == (text is not None)
    assert not warnings or text in warnings[0]


def test_page_of_nothing_says_what_is_missing() -> None:
    page = Page(render([]))
    for expected in ("No run record yet", "No named concepts", "monitor=", "Set probe_steps", "No pairs kept yet"):
        assert expected in page.text


@pytest.mark.parametrize("kind", ["run", "step", "features", "pairs", "probe", "end"])
def test_page_of_one_kind_of_record_alone(kind: str) -> None:
    assert "shapedpo" in render([record for record in synthetic() if record["type"] == kind])


@pytest.mark.parametrize("value", [None, [None, None], [], "a text", True, {"a": 1}, -3, [[1, 2], {"b": None}]])
def test_values_that_are_missing_or_of_another_kind(value: Any) -> None:
    """Each value of each record in turn, and the page is still made."""

    def replaced(record: Any, path: list[Any]) -> Any:
        if not path:
            return value
        if isinstance(record, dict):
            return {key: replaced(item, path[1:]) if key == path[0] else item for key, item in record.items()}
        return [replaced(item, path[1:]) if i == path[0] else item for i, item in enumerate(record)]

    def paths(record: Any, before: list[Any]) -> list[list[Any]]:
        if isinstance(record, dict):
            inner = [path for key, item in record.items() for path in paths(item, [*before, key])]
        elif isinstance(record, list):
            inner = paths(record[0], [*before, 0]) if record else []
        else:
            inner = []
        return [before, *inner]

    records = synthetic(concepts=1, steps=1, features=1, samples=1, probes=2, rows=1, words=3)
    for index, record in enumerate(records):
        for path in paths(record, []):
            render([*records[:index], replaced(record, path), *records[index + 1 :]])


def test_unknown_types_and_keys_are_passed_over() -> None:
    records = synthetic()
    extended = [{"type": "later", "step": 7, "x": 1}, *({**record, "later": [1]} for record in records), {"no": "type"}]
    assert render(extended) == render(records)


def test_hostile_text_stays_text() -> None:
    """No element, attribute or script comes out of a text: the page is made of the same ones as that of harmless records."""
    records = hostile_records()
    html = render(records)
    html.encode("utf-8")
    page, harmless = Page(html), Page(render(synthetic(concepts=3, steps=4, features=3, samples=2, probes=2)))
    for tag in ("script", "style", "img", "iframe", "object", "link", "meta", "a", "form"):
        assert page.count(tag) == harmless.count(tag), tag
    assert not any(name.startswith("on") or name == "style" for _, attributes in page.tags for name in attributes)
    assert page.raw["script"][1:] == harmless.raw["script"][1:]
    assert page.raw["style"] == harmless.raw["style"]
    assert "window.hacked" in page.text  # as text
    assert "{{ 7 * 7 }}" in page.text
    json_text = page.raw["script"][0]
    assert not set("<>&\u2028\u2029") & set(json_text)
    assert page.data["concepts"][0]["name"]  # still JSON


def test_policy_allows_the_pages_own_scripts_and_styles_only() -> None:
    page = Page(render(synthetic()))
    policies = [
        a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert len(policies) == 1
    policy = str(policies[0])
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    for text in [*page.raw["script"][1:], *page.raw["style"]]:
        assert f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" in policy


def test_page_names_nothing_to_load() -> None:
    page = Page(render(synthetic()))
    for tag, attributes in page.tags:
        assert "src" not in attributes, tag
        assert (attributes.get("href") or "#").startswith(("#", "data:,")), tag
    assert not re.search(r"@import|url\(", page.raw["style"][0])


def test_long_text_is_cut_and_says_so() -> None:
    long = "word " * 20_000
    pair = {
        "row": 1,
        "prompt": long,
        "chosen": "short",
        "rejected": None,
        "delta": 1.0,
        "margin": 1.0,
        "contribution": 1.0,
    }
    sample = {"prompt": "p", "completion": long, "tokens": [long], "scores": {}, "activations": {}}
    records = [
        {"type": "step", "step": 1, "concepts": {"a.b c": {}}},
        {"type": "pairs", "step": 1, "concepts": {"a.b c": [pair] * 3}},
        {"type": "probe", "step": 0, "concepts": {}, "samples": [sample]},
    ]
    html = render(records)
    assert len(html) < len(render([])) + 50_000
    assert "(96,000 more characters, not in this page)" in Page(html).text
    assert "96,000 more characters" in Page(html).data["sampled"][0]["samples"][0]["tokens"][1]
    assert clean("abc\ud800\x00", 4) == "abc\ufffd … (1 more characters, not in this page)"


# --- size, time, and runs that go on ------------------------------------------------------------------------------------


def test_large_run_is_rendered_within_a_second_and_a_few_megabytes() -> None:
    records = synthetic(concepts=20, steps=1000, features=200, samples=64, probes=3, words=60)
    render(records[:50])  # the template is compiled once
    times = []
    for _ in range(2):
        began = time.process_time()
        html = render(records)
        times.append(time.process_time() - began)
    assert min(times) < 1.0
    assert len(html.encode()) < 6e6


def test_history_stays_bounded_and_even() -> None:
    digest = Digest({"type": "step", "step": step} for step in range(1, 20_001))
    kept = list(digest.steps.thinned())
    assert len(kept) <= HISTORY
    assert (kept[0], kept[-1]) == (1, 20_000)
    gaps = [b - a for a, b in itertools.pairwise(kept)]
    assert max(gaps) <= 2.5 * 20_000 / HISTORY
    assert thin([1, 2, 3], 5) == [1, 2, 3]


def test_rollouts_of_the_first_and_the_last_probe_are_kept() -> None:
    digest = Digest({"type": "probe", "step": 50 * i, "samples": []} for i in range(100))
    kept = list(digest.sampled.thinned())
    assert len(kept) <= SAMPLED
    assert (kept[0], kept[-1]) == (0, 4950)


def test_resumed_run_takes_the_place_of_what_came_after_its_checkpoint() -> None:
    steps = [{"type": "step", "step": s, "concepts": {"a": {"amplification": [s, 1]}}} for s in (10, 20, 30, 20, 25)]
    end = {"type": "end", "step": 30}
    digest = Digest([*steps[:3], end, *steps[3:]])
    assert list(digest.steps.thinned()) == [10, 20, 25]
    assert not digest.finished
    assert digest.step == 25


def test_marks() -> None:
    axis = scale([(1.0, 0.5), (None, None), (-3.0, None)])
    assert axis == 3.0
    assert interval((0.0, None), 2.0).x == (75.0, 75.0, 75.0)
    low, middle, high = interval((1.0, 0.25), 2.0).x
    assert middle == pytest.approx(75 + 70 / 2)
    assert (high - middle) == pytest.approx(1.96 * 0.25 / 2 * 70, abs=0.2)
    assert (middle - low) == pytest.approx(high - middle, abs=0.2)
    assert [
        interval(estimate, None).verdict for estimate in [(1, 0.1), (-1, 0.1), (1, 1), (1, None), (None, None)]
    ] == [
        "amplified",
        "suppressed",
        "unclear",
        "unclear",
        "none",
    ]
    assert spark([1], [(1.0, 0.1)]) is None
    drawn = spark([1, 2, 3], [(0.0, None), (None, None), (1.0, None)])
    assert drawn is not None
    assert drawn.line == "M2 24L117 2"
    assert drawn.band == ""


# --- the sink and the command -------------------------------------------------------------------------------------------


def test_sink_writes_as_the_run_goes(tmp_path: Path) -> None:
    path = tmp_path / "out" / "report.html"
    records = synthetic(steps=6)
    sink = ReportSink(path, interval=0.0)
    sink.open([])
    assert "No named concepts" in path.read_text(encoding="utf-8")
    for record in records:
        sink.write([record])
    sink.close()
    text = Page(path.read_text(encoding="utf-8"))
    assert text.data["finished"] is True
    assert text.data["written"] == pytest.approx(time.time(), abs=60)
    assert Page(render(records)).texts == text.texts
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]

    resumed = ReportSink(path)
    resumed.open(records[:-3])
    assert Page(path.read_text(encoding="utf-8")).data["finished"] is False


def test_sink_waits_between_pages_but_not_for_a_probe(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    run, *_, last = synthetic(steps=2, probes=0)
    sink = ReportSink(path, interval=3600.0)
    sink.open([])
    first = path.read_bytes()
    sink.write([run])
    assert path.read_bytes() == first
    sink.write([{"type": "probe", "step": 0}])
    second = path.read_bytes()
    assert second != first
    sink.write([{"type": "step", "step": 3}])
    assert path.read_bytes() == second
    sink.write([last])
    assert path.read_bytes() != second


def test_page_that_cannot_be_written_does_not_stop_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    sink = ReportSink(tmp_path / "file" / "report.html")
    with pytest.warns(RuntimeWarning, match="could not be written"):
        sink.open([])


def test_half_a_page_is_never_seen(tmp_path: Path) -> None:
    """Writing breaks off at a character that cannot be written: the old page stands, and nothing is left beside it."""
    path = tmp_path / "report.html"
    write_whole(path, "whole")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "x" * 1_000_000 + "\ud800")
    assert path.read_text() == "whole"
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_command_makes_the_page_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.dumps(record) for record in synthetic()]
    (tmp_path / "concepts.jsonl").write_text(
        "\n".join(lines) + '\n{"type": "st', encoding="utf-8"
    )  # cut short by a crash
    assert main(["report", str(tmp_path)]) == 0
    assert "report.html" in capsys.readouterr().out
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == render(synthetic())
    assert main(["report", str(tmp_path / "concepts.jsonl"), "--out", str(tmp_path / "other.html")]) == 0
    assert (tmp_path / "other.html").exists()
    page = (tmp_path / "report.html").read_bytes()
    (tmp_path / "concepts.jsonl").rename(
        tmp_path / "concepts.1.jsonl"
    )  # of an earlier run: the page of the later one stays
    assert main(["report", str(tmp_path / "concepts.1.jsonl")]) == 0
    assert "report.1.html" in capsys.readouterr().out
    assert (tmp_path / "report.html").read_bytes() == (tmp_path / "report.1.html").read_bytes() == page


def test_command_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "There is no concepts.jsonl" in capsys.readouterr().err
    (tmp_path / "concepts.jsonl").write_text("", encoding="utf-8")
    assert main(["report", str(tmp_path)]) == 2
    assert "has no records" in capsys.readouterr().err


def test_command_imports_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "concepts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in synthetic()), encoding="utf-8")
    heavy = "{'torch', 'transformers', 'datasets', 'matplotlib', 'plotly', 'wandb'}"
    code = (
        f"import sys; from shapedpo.cli import main; main(['report', sys.argv[1]]); print({heavy} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
