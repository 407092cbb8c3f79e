"""The page of an audit in a real browser, as a file and from its server: it draws without complaint and everything on it works."""

from __future__ import annotations

import csv
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shapedpo.audit.analysis.lessons import lessons
from shapedpo.audit.analysis.maps import cluster_maps
from shapedpo.audit.analysis.run import analyse
from shapedpo.audit.labels.names import Label, Labels, hypothesis_key
from shapedpo.audit.page.render import render, write_page
from shapedpo.audit.page.rows import RowStore
from shapedpo.audit.page.server import ViewServer
from shapedpo.audit.page.source import Audit
from tests.browser import Opened, missing

from .audits import HOSTILE, PRAISE, tokenizer
from .worlds import World


pytestmark = pytest.mark.skipif(missing() is not None, reason=f"no browser for the page: {missing()}")

Open = Callable[..., Opened]


@pytest.fixture(scope="module")
def page_file(finished: Audit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(
        finished, tokenizer(), tmp_path_factory.mktemp("page") / HOSTILE[1].replace("/", "") / "audit.html"
    )


@pytest.fixture(scope="module")
def address(finished: Audit, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    audit = replace(finished, folder=tmp_path_factory.mktemp("view"))
    server = ViewServer(render(audit.overview(), served=True), audit.analysis, RowStore.open(audit, progress=False))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield server.address
    server.shutdown()
    server.server_close()


@pytest.fixture(params=["file", "server"])
def either(request: pytest.FixtureRequest, page_file: Path, address: str) -> Path | str:
    return page_file if request.param == "file" else address


def texts(page: Any, selector: str) -> list[str]:
    return [text.strip() for text in page.locator(selector).all_inner_texts()]


def table(saved: Any) -> list[dict[str, str]]:
    return list(csv.DictReader(Path(saved.value.path()).read_text(encoding="utf-8").splitlines()))


def test_first_screen_says_what_is_taught_and_leads_to_the_rows(
    opened: Open, either: Path | str, finished: Audit
) -> None:
    page = opened(either).page
    first = page.locator("#lesson-groups .lesson >> nth=0")
    assert first.bounding_box()["y"] < 450
    assert PRAISE in first.inner_text()
    assert f"{finished.analysis.n_rows} pairs" in page.inner_text("#facts")
    first.click()
    page.wait_for_selector("#detail article.row")
    number = page.evaluate("location.hash").removeprefix("#l=")
    lesson = lessons(finished.analysis)[int(number)]
    assert texts(page, "#detail .row-head b") == [f"row {row}" for row in lesson.rows[:8]]
    assert PRAISE in texts(page, "#detail article.row >> nth=0 >> .chosen mark")
    assert PRAISE not in texts(page, "#detail article.row >> nth=0 >> .rejected mark")
    page.click("#detail .row-list > button")
    page.locator("#detail article.row").nth(15).wait_for()
    assert page.locator("#detail article.row").count() == 16
    page.keyboard.press("Escape")
    assert page.locator("#detail").is_hidden()
    assert page.evaluate("location.hash") == ""


def test_predictions_are_shown_where_there_are_some(
    opened: Open, finished: Audit, page_file: Path, tmp_path: Path
) -> None:
    page = opened(page_file).page
    page.evaluate("openHypothesis(0)")
    predicted = page.locator("#detail .figures div", has_text="predicted change").inner_text()
    best = finished.analysis.hypotheses[0]
    assert finished.prediction is not None
    values = finished.prediction.at("feature_cluster", best.response)
    assert values is not None
    assert f"{values['score']:+.2f}".replace("-", "−") in predicted
    assert page.locator("#detail .figures div", has_text="in rollouts").count() == 0  # nobody said how far a run goes
    scaled = replace(finished.prediction, scaled=np.ones_like(finished.prediction.scaled))
    page = opened(write_page(replace(finished, prediction=scaled), None, tmp_path / "scaled.html")).page
    page.evaluate("openHypothesis(0)")
    assert "%" in page.locator("#detail .figures div", has_text="in rollouts").inner_text()
    without = write_page(replace(finished, prediction=None), None, tmp_path / "without.html")
    page = opened(without).page
    assert page.locator("#head [data-name=predicted]").count() == 0
    page.evaluate("openHypothesis(0)")
    page.wait_for_selector("#detail article.row")
    assert page.locator("#detail mark").count() == 0  # no tokenizer, no marks


def test_search_looks_into_labels_and_rows(opened: Open, either: Path | str) -> None:
    page = opened(either).page
    page.keyboard.press("/")
    page.keyboard.type(f"soup {PRAISE}")
    page.locator("#found", has_text="Found:").wait_for()
    assert "0 rows" in page.inner_text("#found")
    page.fill("#search", PRAISE)
    page.locator("#found-rows article.row").first.wait_for()
    assert all(PRAISE in text for text in texts(page, "#found-rows article.row"))
    for line in texts(page, "#body .what"):
        assert line
    page.locator("#found-rows button", has_text="what it teaches").first.click()
    page.locator("#found-rows .partners .link").first.click()
    page.wait_for_selector("#detail article.row")
    page.keyboard.press("Escape")
    page.press("#search", "Escape")
    page.locator("#found-section").wait_for(state="hidden")


def test_filters_ranking_pages_and_export(opened: Open, page_file: Path, finished: Audit) -> None:
    page = opened(page_file).page
    found = finished.analysis.hypotheses

    def count() -> int:
        return int(page.inner_text("#count").split()[0].replace(",", ""))

    assert count() == sum(h.q <= 0.05 for h in found)
    page.select_option("[name=q]", "")
    assert count() == len(found)
    assert page.locator("#body tr").count() == 25
    page.click("#next")
    assert page.inner_text("#page").startswith("26 to 50")
    page.select_option("[name=view]", "prompt")
    page.select_option("[name=direction]", "-1")
    page.fill("[name=d]", "0.5")
    expected = [h for h in found if h.view == "prompt" and h.delta < 0 and abs(h.d) >= 0.5]
    assert count() == len(expected)
    page.select_option("[name=sort]", "z")
    with page.expect_download() as saved:
        page.click("#csv")
    rows = table(saved)
    assert [float(row["z"]) for row in rows] == pytest.approx(
        sorted((h.z for h in expected), key=lambda z: -abs(z)), rel=1e-3
    )
    page.locator("#head .sort", has_text="q").click()
    with page.expect_download() as saved:
        page.click("#json")
    values = [row["q"] for row in json.loads(Path(saved.value.path()).read_text(encoding="utf-8"))]
    assert values == sorted(values)
    page.fill("[name=least]", "100000")
    assert "Nothing fits" in page.inner_text("#body")


def test_rows_behind_something_are_exported(opened: Open, either: Path | str, finished: Audit) -> None:
    page = opened(either).page
    best = finished.analysis.hypotheses[0]
    lesson = lessons(finished.analysis)[0]
    for act, wanted, named in (
        ("openHypothesis(0)", best.rows, best.n_named),
        ("openLesson(0)", lesson.rows, len(lesson.rows)),
    ):
        page.evaluate(act)
        with page.expect_download() as saved:
            page.click("text=row numbers, CSV")
        rows = table(saved)
        assert [int(row["row"]) for row in rows] == wanted.tolist()
        assert sum(int(row["named"]) for row in rows) == named


def test_maps_show_clusters_and_their_partners(opened: Open, either: Path | str, finished: Audit) -> None:
    page = opened(either).page
    clusters = finished.analysis.clusters
    assert page.locator("#map-response circle").count() == len(clusters["feature"])
    page.click("[data-view=prompt]")
    assert page.locator("#map-condition circle").count() == len(clusters["prompt"])
    assert page.locator("#map-response circle").count() == len(clusters["response"])
    best = finished.analysis.of("prompt")[0]
    page.select_option("#select-condition", str(best.condition))
    page.wait_for_selector("#cluster .exemplar")
    assert page.locator("#map-condition circle.selected").get_attribute("data-number") == str(best.condition)
    partners = [h for h in finished.analysis.of("prompt") if h.condition == best.condition]
    coloured = page.locator("#map-response circle:not(.none)").count()
    assert coloured == len({h.response for h in partners})
    best_d = max((h for h in partners if h.delta > 0), key=lambda h: abs(h.d))
    shown = page.locator("#cluster .partners li").first
    assert "· q " in shown.inner_text()
    assert (shown.get_attribute("class") == "chance") == (best_d.q > 0.05)
    page.locator("#cluster .partners .link").first.click()
    page.wait_for_selector("#detail article.row")
    page.keyboard.press("Escape")
    page.click("text=rank all")
    assert page.inner_text("#count").startswith(f"{len(partners)} of ")
    assert page.inner_text("#only").startswith("only ")
    page.select_option("[name=q]", "0.05")
    assert page.inner_text("#count").startswith(f"{sum(h.q <= 0.05 for h in partners)} of ")
    page.click("#only")
    assert page.inner_text("#count").startswith(f"{sum(h.q <= 0.05 for h in finished.analysis.hypotheses)} of ")
    assert page.locator("#only").is_hidden()
    page.locator("#map-response circle:not(.none)").first.dispatch_event("click")
    assert page.locator("#map-condition circle.selected").count() == 0
    page.hover("#map-response circle.selected")
    assert page.inner_text("#tip")


@pytest.mark.parametrize(("width", "colors"), [(360, "light"), (820, "dark"), (1920, "light")])
def test_page_fits_its_window(opened: Open, page_file: Path, width: int, colors: str) -> None:
    page = opened(page_file, width=width, colors=colors)
    background = page.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(252, 252, 251)", "dark": "rgb(20, 22, 26)"}[colors]
    assert page.overflow() == 0
    page.page.select_option("#select-response", index=1)
    page.page.fill("#search", "the")
    page.page.wait_for_selector("#found-rows article.row")
    assert page.overflow() == 0
    page.page.locator("#body .link").first.click()
    page.page.wait_for_selector("#detail article.row")
    assert page.overflow() == 0
    assert page.page.evaluate("byId('detail').scrollWidth <= byId('detail').clientWidth")


def test_hostile_text_does_nothing(opened: Open, finished: Audit, tmp_path: Path) -> None:
    """Markup in texts, labels and names: nothing runs, and what is read is what was written."""
    evil = [Label([text], text, text, [text]) for text in HOSTILE]
    labels = Labels(
        {feature: HOSTILE[feature % len(HOSTILE)] for feature in range(finished.harvest.d_sae)},
        {kind: {n: evil[n % len(evil)] for n in range(40)} for kind in ("feature", "data", "prompt", "response")},
        {hypothesis_key(h): evil[n % len(evil)] for n, h in enumerate(finished.analysis.hypotheses)},
        HOSTILE[0],
    )
    finished.harvest.settings["dataset"], before = HOSTILE[0], finished.harvest.settings["dataset"]
    try:
        path = write_page(replace(finished, labels=labels), tokenizer(), tmp_path / "evil.html")
    finally:
        finished.harvest.settings["dataset"] = before
    page = opened(path).page
    assert page.inner_text("h1").endswith("script>")
    for view in ("prompt", "feature"):
        page.click(f"[data-view={view}]")
        page.select_option("#select-response", index=1)
    page.fill("#search", "img src=x onerror")
    page.locator("#found-rows article.row").first.wait_for()
    assert HOSTILE[1] in page.locator("#found-rows .data").filter(has_text="onerror").first.inner_text()
    page.hover("#map-response circle >> nth=0")
    titled = next(n for n, h in enumerate(finished.analysis.hypotheses) if evil[n % len(evil)].title == HOSTILE[1])
    page.evaluate(f"openHypothesis({titled})")
    page.wait_for_selector("#detail article.row")
    assert page.inner_text("#detail-title") == HOSTILE[1]
    for button in page.locator("#detail button:visible").all()[1:6]:
        button.click()
    with page.expect_download() as saved:
        page.evaluate("byId('csv').click()")
    assert table(saved)
    assert page.evaluate("window.hacked") is None
    assert page.locator("img, iframe, a[href^=javascript]").count() == 0


def test_a_world_that_teaches_nothing_says_so(opened: Open, tmp_path: Path) -> None:
    """Neither hypotheses nor clusters, labels or predictions: the least that an audit can be."""
    harvest = World(40, topics=2, groups=1).harvest(tmp_path / "harvest")
    analysis = analyse(harvest, out=tmp_path / "analysis", progress=False)
    audit = Audit.open(tmp_path)
    assert audit.tokenizer() is None  # the harvest does not say which model
    page = opened(write_page(audit, None), width=400)
    assert page.page.inner_text("#lesson-groups").count("Nothing found.") == 3
    assert "none stands out from what chance" in page.page.inner_text("#facts")
    assert page.page.locator("#map-condition circle").count() == len(cluster_maps(analysis, harvest)["data"].rows)
    page.page.click("[data-view=prompt]")
    page.page.fill("#search", "chosen 7")
    page.page.locator("#found", has_text="Found:").wait_for()
    assert page.overflow() == 0


def test_marks_lie_on_the_words(finished: Audit) -> None:
    """Places count as browsers count, also behind signs outside the basic plane."""
    from shapedpo.audit.page.marks import marked_rows

    praise = next(n for n, features in enumerate(finished.analysis.clusters["feature"]) if 2 * 4 * 8 in features)
    rows = {int(row): {("feature", praise)} for row in finished.analysis.of("global")[0].named}
    found = list(marked_rows(finished.harvest, rows, finished.analysis.clusters, tokenizer()))
    assert [row.row for row in found] == sorted(rows)
    wide = 0
    for row in found:
        text = row.texts["chosen"]
        marked = row.marks["feature", praise]["chosen"]
        words = [text.encode("utf-16-le")[2 * start : 2 * end].decode("utf-16-le") for start, end, _ in marked]
        # the cluster holds the features of physics too, and the tokenizer splits that word
        assert set(words) <= {PRAISE, "ce"}
        assert (PRAISE in words) == (PRAISE in text)
        wide += any(sign > "\uffff" for sign in text)
    assert wide
