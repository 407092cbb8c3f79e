"""How fast the page of an audit answers, in a real browser: from its server with 260,000 rows and 5,000 hypotheses, and as one file.

    python -m benchmarks.audit_page --rows 260000 --hypotheses 5000

The audit is made of arrays: texts of random tokens, features of clusters at random places, hypotheses about random rows. Store, page and server
are the real ones. Each action is timed in the browser from the click to the end of the layout that shows the answer, rows fetched and all.
Writes `benchmarks/results/audit-page.md`.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from shapedpo import lab
from shapedpo.audit.analysis.hypotheses import Analysis, Hypothesis
from shapedpo.audit.analysis.leading import Leading
from shapedpo.audit.analysis.maps import ClusterMap
from shapedpo.audit.analysis.settings import AuditSettings
from shapedpo.audit.harvesting.shards import SPANS, Active, write_manifest, write_shard
from shapedpo.audit.harvesting.store import Harvest
from shapedpo.audit.labels.names import KINDS, Label, Labels
from shapedpo.audit.page.render import render, write_page
from shapedpo.audit.page.rows import RowStore
from shapedpo.audit.page.server import ViewServer
from shapedpo.audit.page.source import Audit
from shapedpo.sources import model_source


RESULTS = Path(__file__).parent / "results" / "audit-page.md"
TOKENS = {"prompt": 80, "chosen": 120, "rejected": 120}
FRESH, SHARD, ACTIVE, GROUP = (
    4096,
    2048,
    200,
    12,
)  # rows drawn afresh, rows of a shard, features of a span, of a cluster
REPEATS = 5


@dataclass(frozen=True)
class Sizes:
    """Of a made-up audit.

    Args:
        rows: Pairs.
        hypotheses: All views together.
        clusters: Of each kind.
        seed: Of everything.
    """

    rows: int = 260_000
    hypotheses: int = 5_000
    clusters: int = 512
    seed: int = 0

    @property
    def d_sae(self) -> int:
        return self.clusters * GROUP


def made_up(folder: Path, sizes: Sizes) -> Audit:
    """An audit of random rows."""
    draw = np.random.default_rng(sizes.seed)
    harvest = _harvest(folder / "harvest", sizes, draw)
    groups = np.arange(sizes.d_sae).reshape(sizes.clusters, GROUP).tolist()
    n, k = sizes.rows, sizes.clusters
    analysis = Analysis(
        settings=AuditSettings(),
        n_rows=n,
        hypotheses=_hypotheses(sizes, draw),
        clusters={"feature": groups, "prompt": groups, "response": groups},
        rows=harvest.rows,
        data_clusters=draw.integers(k, size=n).astype(np.int32),
        typicality=draw.random(n, np.float32),
        leading=Leading(k, 1),
        delta_sd=np.ones(sizes.d_sae),
        tested=dict.fromkeys(("feature", "prompt"), k * k),
    )
    maps = {
        kind: ClusterMap(
            place=draw.uniform(-1, 1, (k, 2)).astype(np.float32),
            rows=draw.integers(100, n // 20 + 101, k),
            lean=draw.normal(0, 0.3, k).astype(np.float32),
            exemplars=draw.integers(n, size=(k, 5)).tolist(),
        )
        for kind in KINDS
    }
    words = [f"word{i}" for i in range(5000)]
    names = {i: ", ".join(draw.choice(words, 3)) for i in range(sizes.d_sae)}
    clusters = {kind: {i: Label(draw.choice(words, 6).tolist()) for i in range(k)} for kind in KINDS}
    return Audit(folder, analysis, harvest, Labels(names, clusters), maps)


def _hypotheses(sizes: Sizes, draw: np.random.Generator) -> list[Hypothesis]:
    found = []
    for number in range(sizes.hypotheses):
        view = ("global", "feature", "prompt")[0 if number < sizes.hypotheses // 50 else 1 + number % 2]
        strength = float(draw.exponential(0.2))
        sign = 1 if draw.random() < 0.6 else -1
        rows = np.unique(draw.integers(sizes.rows, size=min(sizes.rows, 10_000 if view == "global" else 600)))
        found.append(
            Hypothesis(
                view=view,
                condition=-1 if view == "global" else int(draw.integers(sizes.clusters)),
                response=int(draw.integers(sizes.clusters)),
                delta=sign * strength,
                mean_in=sign * strength,
                mean_out=0.0,
                d=sign * strength * 3,
                z=sign * strength * 40,
                p=1e-6,
                q=float(10 ** draw.uniform(-12, 0)),
                halves=(sign * strength, sign * strength),
                n_in=len(rows) * 2,
                n_named=len(rows) // 2,
                rows=draw.permutation(rows),
                contributions=np.linspace(sign, 0, len(rows)).astype(np.float32),
            )
        )
    return found


def _harvest(folder: Path, sizes: Sizes, draw: np.random.Generator) -> Harvest:
    split: Any = AutoTokenizer.from_pretrained(model_source("lab"))
    pairs = lab.preference_data((), 1000, sizes.seed)
    sentences = (
        [pair[-1]["content"] for pair in pairs["chosen"]] if isinstance(pairs["chosen"][0], list) else pairs["chosen"]
    )
    ids, texts = {}, {}
    for span, length in TOKENS.items():
        chosen = [
            " ".join(draw.choice(sentences, max(1, round(length / 25 * draw.lognormal(0, 0.6)))))
            for _ in range(min(FRESH, sizes.rows))
        ]
        ids[span] = split(chosen, add_special_tokens=False).input_ids
        texts[span] = split.batch_decode(ids[span], skip_special_tokens=True)
    write_manifest(
        folder, d_sae=sizes.d_sae, n_rows=sizes.rows, shard_rows=SHARD, settings={"model": "lab", "dataset": "made-up"}
    )
    for index, start in enumerate(range(0, sizes.rows, SHARD)):
        rows = np.arange(start, min(sizes.rows, start + SHARD))
        which = [row % len(ids[SPANS[0]]) for row in rows]
        spans = {}
        for span in SPANS:
            tokens = np.array([len(ids[span][row]) for row in which], np.int32)
            features = np.argsort(draw.random((len(rows), sizes.d_sae // 8), np.float32), axis=1)[:, :ACTIVE]
            features = np.sort(features * 8 + draw.integers(8, size=features.shape), axis=1)
            count = features.shape[1]
            spans[span] = Active(
                np.arange(0, len(rows) * count + 1, count, dtype=np.int32),
                features.ravel().astype(np.int32),
                np.ones(features.size, np.int32),
                np.ones(features.size, np.float32),
                (draw.random(features.shape) * tokens[:, None]).astype(np.int32).ravel(),
                tokens,
            )
        shown = {span: [f"{texts[span][i]} row{row}" for row, i in zip(rows, which, strict=True)] for span in SPANS}
        write_shard(folder, index, rows, spans, {span: [ids[span][i] for i in which] for span in SPANS}, shown)
    return Harvest.open(folder)


# --- in the browser --------------------------------------------------------------------------------------------------

ACTIONS = {
    "open a hypothesis, with its rows": "openHypothesis(next())",
    "more rows of it": "document.querySelector('#detail .row-list > button').click()",
    "close it": "dialog.close()",
    "filter by view": "setField('view', ['feature', 'prompt', 'global', ''][turn % 4])",
    "filter by effect": "setField('d', String(0.1 + turn / 10))",
    "rank by another statistic": "setField('sort', ['d', 'z', 'q', 'n', 'strength'][turn % 5])",
    "next page of the table": "byId('next').click()",
    "choose a cluster on a map": "choose('condition', turn * 7)",
    "the other view's maps": "all('[data-view]')[turn % 2].click()",
    "search labels and texts (waits 120 ms for more typing)": "setSearch(['word1', 'row25', 'word77', 'the', 'word4242 nothing'][turn % 5])",
}
"""What a reader does: by name, what the page runs."""

_TIMER = """
window.setField = (name, value) => {
  filters.elements[name].value = value;
  filters.dispatchEvent(new Event("input"));
};
window.pending = 0;
for (const name of ["rowsOf", "byNumber", "search"]) {
  const of = source[name];
  source[name] = async (...given) => {
    window.pending += 1;
    try { return await of(...given); } finally { setTimeout(() => (window.pending -= 1), 0); }
  };
}
window.setSearch = (text) => { byId("search").value = text; search(); };
window.place = 0;
window.next = () => table.found[(window.place += 37) % table.found.length];
window.timed = async (turn, act) => {
  const began = performance.now();
  act(turn);
  await new Promise((done) => setTimeout(done, 0));
  while (window.pending) await new Promise((done) => setTimeout(done, 1));
  document.body.offsetHeight;
  return performance.now() - began;
};
"""


def measured(page: Any, repeats: int) -> dict[str, float]:
    """The slowest of some repetitions of each action, in milliseconds."""
    page.evaluate(f"() => {{ {_TIMER} }}")
    found = {}
    for name, action in ACTIONS.items():
        times = [page.evaluate(f"() => timed({turn}, (turn) => {{ {action} }})") for turn in range(repeats)]
        found[name] = max(times)
    return found


def audit_page(
    folder: Path, sizes: Sizes, repeats: int = REPEATS
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Times of each action by page, and facts about the making of both."""
    from tests.browser import Opened, browser

    audit = made_up(folder, sizes)
    facts = {}

    def took(name: str, began: float, path: Path) -> None:
        facts[name] = f"{time.monotonic() - began:.0f} s, {path.stat().st_size / 1e6:.0f} MB"

    began = time.monotonic()
    store = RowStore.open(audit)
    took("`view.sqlite`, once", began, store.path)
    began = time.monotonic()
    file = write_page(audit, audit.tokenizer())
    took("`audit.html`", began, file)
    server = ViewServer(render(audit.overview(), served=True), audit.analysis, store)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    times = {}
    try:
        with browser() as started:
            for name, where in (("`shapedpo view`", server.address), ("`audit.html`", file)):
                opened = Opened(started, where)
                began = time.monotonic()
                page = opened.open()
                times[name] = {"open the page": 1000 * (time.monotonic() - began), **measured(page, repeats)}
                opened.check()
                opened.close()
    finally:
        server.shutdown()
        server.server_close()
    return times, facts


def main(arguments: Sequence[str] | None = None) -> None:
    """The benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=Sizes.rows)
    parser.add_argument("--hypotheses", type=int, default=Sizes.hypotheses)
    options = parser.parse_args(arguments)
    sizes = Sizes(options.rows, options.hypotheses)
    with tempfile.TemporaryDirectory() as folder:
        times, facts = audit_page(Path(folder), sizes)
    lines = [
        f"{sizes.rows:,} rows, {sizes.hypotheses:,} hypotheses, {sizes.clusters} clusters of each kind; headless Chromium, the slowest of "
        f"{REPEATS} repetitions, in milliseconds, with the layout and the rows that are fetched.",
        "",
        f"| action | {' | '.join(times)} |",
        f"| --- |{' ---: |' * len(times)}",
        *(
            f"| {action} | {' | '.join(f'{of[action]:.0f}' for of in times.values())} |"
            for action in next(iter(times.values()))
        ),
        "",
        *(f"- {name}: {fact}" for name, fact in facts.items()),
    ]
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
