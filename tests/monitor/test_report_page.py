"""The page of a run's records in a real browser: it draws without complaint, nothing leaves it, and everything on it works."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shapedpo.monitor.report import ReportSink, render, write_whole
from tests.browser import Opened, missing
from tests.monitor.records import synthetic
from tests.monitor.test_report import HOSTILE, hostile_records


pytestmark = pytest.mark.skipif(missing() is not None, reason=f"no browser for the page: {missing()}")

Open = Callable[..., Opened]
RECORDS = synthetic(concepts=8, steps=40, features=20, samples=10, probes=4)


@pytest.fixture
def opened(opened: Open, tmp_path: Path) -> Open:
    """Opens the page of some records."""

    def open_page(records: list[dict[str, Any]] = RECORDS, **options: Any) -> Opened:
        path = tmp_path / f"report-{len(list(tmp_path.iterdir()))}.html"
        write_whole(path, render(records))
        return opened(path, **options)

    return open_page


def texts(page: Any, selector: str) -> list[str]:
    return [text.strip() for text in page.locator(selector).all_inner_texts()]


@pytest.mark.parametrize(
    "records",
    [
        RECORDS,
        [],
        synthetic(concepts=2, steps=1, features=0, samples=0, probes=0),
        synthetic(concepts=0, steps=2, features=3, samples=2, probes=2),
        hostile_records(),
    ],
)
def test_page_fits_its_window(opened: Open, records: list[dict[str, Any]]) -> None:
    page = opened(records, width=1600)
    page.page.evaluate("for (const details of document.querySelectorAll('details')) details.open = true")
    for button in page.page.locator("button.open:visible").all()[:3]:
        button.click()
    assert page.overflow() == 0
    for width, colors in [(820, "dark"), (360, "light")]:
        page.page.emulate_media(color_scheme=colors)
        page.page.set_viewport_size({"width": width, "height": 900})
        page.page.wait_for_function("() => drawnWidth === document.documentElement.clientWidth")
        assert page.overflow() == 0


def test_colours_follow_the_system_and_the_button(opened: Open) -> None:
    page = opened(colors="light").page
    background = "getComputedStyle(document.body).backgroundColor"
    light, dark = "rgb(252, 252, 251)", "rgb(20, 22, 26)"
    assert page.evaluate(background) == light
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(background) == dark
    page.click("#theme")
    assert page.evaluate(background) == light
    page.click("#theme")
    page.emulate_media(color_scheme="light")
    assert page.evaluate(background) == dark
    assert page.get_attribute("#theme", "aria-label") == "Colours: dark"
    page.reload()
    page.wait_for_selector("html[data-ready]", state="attached")
    assert page.evaluate(background) == dark  # remembered
    page.click("#theme")
    assert page.evaluate(background) == light


def test_text_can_be_read_against_its_ground(opened: Open) -> None:
    """Contrast of 4.5 to 1 at least (WCAG AA), for every colour that text has."""
    page = opened(synthetic(concepts=1, steps=1, features=0, samples=0, probes=0)).page
    script = """() => {
          const channel = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
          const paint = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
          const light = (name) => {
            const probe = document.body.appendChild(document.createElement("span"));
            probe.style.color = `var(${name})`;
            paint.fillStyle = getComputedStyle(probe).color;
            probe.remove();
            paint.fillRect(0, 0, 1, 1);
            const [r, g, b] = [...paint.getImageData(0, 0, 1, 1).data].map((v) => channel(v / 255));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
          const found = {};
          for (const ground of ["--bg", "--panel", "--faint"]) {
            for (const ink of ["--ink", "--muted", "--link", "--amplified", "--suppressed", "--unclear", "--observed"]) {
              found[`${ink} on ${ground}`] = ratio(light(ink), light(ground));
            }
          }
          return found;
        }"""
    for colors in ("light", "dark"):
        page.emulate_media(color_scheme=colors)
        ratios = page.evaluate(script)
        assert {name: round(ratio, 2) for name, ratio in ratios.items() if ratio < 4.5} == {}


def test_search_filters_everything(opened: Open) -> None:
    page = opened().page
    counts = {kind: page.locator(f"tbody[data-kind={kind}]").count() for kind in ("concepts", "features", "pairs")}
    assert counts == {"concepts": 8, "features": 40, "pairs": 48}
    page.keyboard.press("/")
    page.keyboard.type("goblins sourdough")
    page.wait_for_selector("#found:not([hidden])")
    said = page.inner_text("#found")
    assert said.startswith("Found: 0 concepts")
    shown = texts(page, "tbody[data-kind=pairs]:visible")
    assert 0 < len(shown) < 48
    assert all("goblins" in text and "sourdough" in text for text in shown)
    assert f"{len(shown)} pair" in said
    assert all("sourdough" in text for text in texts(page, ".rollout"))
    page.keyboard.press("Escape")
    assert page.locator("tbody[data-kind=concepts]:visible").count() == 8
    assert page.locator("details.group[open]").count() == 1

    page.fill("#search", "invented links")
    page.locator("#found", has_text="1 concept ").wait_for()
    assert texts(page, "tbody[data-kind=concepts]:visible .name") == ["invented links"]
    page.fill("#search", "no such text anywhere")
    page.wait_for_selector("text=No rollout matches the search.")
    page.locator("tbody.item:visible").first.wait_for(state="detached")  # the search goes on while the page is shown


def test_tables_sort_both_ways_with_unknown_values_last(opened: Open) -> None:
    page = opened().page
    column = "table.headline tbody .name"
    assert texts(page, column)[0] == "emoji"
    header = page.locator("table.headline thead .sort", has_text="amplification")
    header.click()
    assert texts(page, column)[0] == "emoji"
    assert header.locator("xpath=..").get_attribute("aria-sort") == "descending"
    header.press("Enter")  # from the keyboard
    assert texts(page, column)[0] == "apology"
    page.locator("table.headline thead .sort", has_text="concept").click()
    assert texts(page, column) == sorted(texts(page, column))
    page.locator("table.headline thead .sort", has_text="strength").click()
    assert texts(page, column)[:3] == ["goblin", "invented links", "emoji"]
    page.locator("table.headline thead .sort", has_text="strength").click()
    assert texts(page, column)[:3] == ["emoji", "invented links", "goblin"]


def test_concept_in_focus_is_the_same_everywhere(opened: Open) -> None:
    page = opened().page
    assert "emoji" in page.inner_text("#history h4 >> nth=0")
    page.click(".focus-concept:has-text('goblin')")
    assert "goblin" in page.inner_text("#history h4 >> nth=0")
    assert page.locator("#history svg.plot").count() == 3  # amplification, pressure, and the strength that hold moves
    assert page.locator("#focus-rollouts option:checked").inner_text() == "goblin"
    marked = {text.strip() for text in texts(page, ".rollout mark")}
    assert marked <= {"goblins", "rope"}
    assert "goblins" in marked
    page.select_option("#focus-rollouts", label="cheerfulness")
    assert "cheerfulness" in page.inner_text("#history h4 >> nth=0")
    assert {text.strip() for text in texts(page, ".rollout mark")} <= {"patience", "known", "Patience", "Known"}
    assert page.locator("tbody.focus .name").inner_text() == "cheerfulness"
    page.select_option("#focus-history", label="hedging")
    assert page.locator("#history svg.plot").count() == 2  # a watched concept has no strength


def test_rollouts_before_and_after(opened: Open) -> None:
    page = opened().page
    samples = {record["step"]: record["samples"] for record in RECORDS if record["type"] == "probe"}
    steps = sorted(samples)
    assert texts(page, "#after-step option") == [f"step {step}" for step in steps[1:]]
    assert page.locator(".rollout").count() == 6

    def first() -> list[str]:
        return texts(page, ".rollout >> nth=0 >> .text")

    assert first() == [samples[0][0]["completion"], samples[steps[-1]][0]["completion"]]
    page.select_option("#after-step", label=f"step {steps[1]}")
    assert first() == [samples[0][0]["completion"], samples[steps[1]][0]["completion"]]
    page.select_option("#focus-rollouts", label="goblin")
    page.select_option("#rollout-order", "rise")
    gains = [
        after["scores"]["goblin"] - before["scores"]["goblin"]
        for before, after in zip(samples[0], samples[steps[1]], strict=True)
    ]
    assert page.inner_text(".rollout >> nth=0 >> .prompt") == samples[0][gains.index(max(gains))]["prompt"]
    page.click("#more-rollouts")
    assert page.locator(".rollout").count() == 10
    assert page.locator("#more-rollouts").is_hidden()


def test_predicted_against_observed(opened: Open) -> None:
    page = opened().page
    assert (
        page.inner_text("#truth-facts")
        == "R² 0.87 over all monitored features · predicted by amplification · observed by probe rollouts with amplification"
    )
    assert page.locator("#scatter svg.plot >> nth=0 >> g[aria-label=dot] circle").count() == 60 + 8
    page.select_option("#truth-step", "0")
    assert "nothing has been predicted yet" in page.inner_text("#scatter")
    box = page.locator("#rate-chart svg.plot >> nth=0").bounding_box()
    assert box["width"] > 100


def test_charts_answer_to_the_pointer_and_the_window(opened: Open) -> None:
    page = opened().page
    page.hover("#history svg.plot >> nth=0")
    page.wait_for_selector("#history svg.plot g[aria-label=tip] text")
    assert "amplification" in page.locator("#history svg.plot g[aria-label=tip] >> nth=0").text_content()
    wide = page.locator("#history svg.plot >> nth=0").bounding_box()["width"]
    page.set_viewport_size({"width": 400, "height": 800})
    page.locator("#history svg.plot[width='334']").first.wait_for()  # 400 less margins, padding and border
    assert page.evaluate("document.documentElement.scrollWidth") == 400
    assert page.locator("#history svg.plot >> nth=0").bounding_box()["width"] != wide


def test_rows_open_and_long_texts_unfold(opened: Open) -> None:
    page = opened().page
    button = page.locator("table.features .open >> nth=0")
    assert page.locator("tr.detail:visible").count() == 0
    button.press("Enter")
    assert button.get_attribute("aria-expanded") == "true"
    assert page.locator("tr.detail:visible .example").count() == 3
    assert page.locator("table[data-table=amplified] tbody:visible").count() == 12
    page.click("text=show all 20 >> nth=0")
    assert page.locator("table[data-table=amplified] tbody:visible").count() == 20
    more = page.locator("#pairs .more-text:visible >> nth=0")
    text = more.locator("xpath=..").locator(".data")
    before = text.bounding_box()["height"]
    more.click()
    assert text.bounding_box()["height"] > before
    assert more.inner_text() == "show less"


def test_everything_is_reached_by_the_keyboard(opened: Open) -> None:
    page = opened(synthetic(concepts=2, steps=3, features=1, samples=2, probes=2, rows=1)).page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    wanted = {
        "search",
        "theme",
        "sort",
        "focus-concept",
        "focus-history",
        "truth-step",
        "after-step",
        "focus-rollouts",
        "scroll",
    }
    reached: set[str] = set()
    for _ in range(200):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("(e => e.id || e.dataset.keep || e.className || e.tagName)(document.activeElement)"))
        if wanted <= reached:
            break
    assert wanted - reached == set()
    unnamed = page.evaluate(
        "[...document.querySelectorAll('button, select, input, [role=img], section')].filter(e => "
        "!(e.textContent.trim() || e.getAttribute('aria-label') || e.labels?.length || e.getAttribute('aria-labelledby'))).length"
    )
    assert unnamed == 0


def test_hostile_text_does_nothing(opened: Open) -> None:
    """Markup in every text, names of concepts among them: nothing runs, and what is read is what was written."""
    records = hostile_records()
    name = HOSTILE[1]
    for record in records:
        if isinstance(record.get("concepts"), dict):
            record["concepts"] = {name: next(iter(record["concepts"].values()))}
        elif "concepts" in record:
            record["concepts"][0] |= {"name": name, "label": name}
            record["concepts"] = record["concepts"][:1]
    sample = records[1]["samples"][0]
    sample |= {"tokens": HOSTILE[:2], "scores": {name: 1.0}, "activations": {name: [2.0, 3.0]}}
    page = opened(records).page
    for button in page.locator("button:visible").all():
        if button.get_attribute("id") != "theme":
            button.click()
    page.hover("#history svg.plot >> nth=0")
    page.hover("#scatter svg.plot >> nth=0")
    page.wait_for_timeout(200)
    assert page.evaluate("window.hacked") is None
    assert page.locator("img, iframe, a[href^=javascript]").count() == 0
    assert texts(page, "table.headline .name") == [name]
    assert texts(page, ".rollout >> nth=0 >> mark >> nth=1") == [name]
    assert page.inner_text("h1").endswith("goblin-world-hold")


def test_page_reloads_while_the_run_goes_and_keeps_its_state(started: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    records = synthetic(concepts=4, steps=10, samples=4, probes=2)
    half = len(records) // 2
    sink = ReportSink(path, interval=0.0)
    sink.open(records[:half])
    page = Opened(started, path)
    page.page.clock.install()
    page.open()
    assert "running" in page.page.inner_text(".chip")
    page.page.select_option("#focus-history", label="hedging")
    page.page.locator("table.headline thead .sort", has_text="concept").click()
    page.page.locator("table.features .open >> nth=0").click()
    feature = page.page.inner_text("table.features .feature-name .mono >> nth=0")
    page.page.fill("#search", "the")
    page.page.keyboard.press("End")
    page.page.clock.run_for(500)
    page.page.evaluate("scrollTo(0, 700)")
    step = page.page.inner_text(".status b")

    sink.write(records[half:-1])
    page.page.clock.run_for(11_000)
    page.page.wait_for_function("step => document.querySelector('.status b')?.textContent !== step", arg=step)
    page.ready()
    assert page.page.input_value("#search") == "the"
    assert page.page.evaluate("document.activeElement.id") == "search"
    assert page.page.evaluate("scrollY") == 700
    assert page.page.locator("#focus-history option:checked").inner_text() == "hedging"
    assert texts(page.page, "table.headline tbody .name") == sorted(texts(page.page, "table.headline tbody .name"))
    assert texts(page.page, "tbody:has(.open[aria-expanded=true]) .feature-name .mono") == [feature]

    sink.write(records[-1:])
    page.page.clock.run_for(11_000)
    page.page.wait_for_selector(".chip.done")
    page.ready()
    assert page.page.locator("#live").is_hidden()
    page.page.evaluate("window.same = true")
    page.page.clock.run_for(60_000)
    assert page.page.evaluate("window.same") is True  # a finished run's page reloads no more
    page.check()
    page.close()


def test_reader_can_stop_the_reloading(started: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_whole(path, render(synthetic(finished=False)))
    page = Opened(started, path)
    page.page.clock.install()
    page.open()
    page.page.click("#live")
    page.page.evaluate("window.same = true")
    page.page.clock.run_for(60_000)
    assert page.page.evaluate("window.same") is True
    page.check()
    page.close()


def test_page_reads_without_its_script(started: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_whole(path, render(RECORDS))
    page = Opened(started, path, java_script_enabled=False)
    page.page.goto(page.address)
    text = page.page.inner_text("main")
    for expected in ("goblin", "Amplification is a gauge", "Tell me about", "The rollouts need the page's script."):
        assert expected in text
    page.check()
    page.close()


def test_page_prints(opened: Open) -> None:
    page = opened(colors="dark").page
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(252, 252, 251)"
    assert page.locator("#search").is_hidden()
    assert len(page.pdf()) > 20_000


@pytest.mark.slow
def test_large_page_answers_quickly(opened: Open) -> None:
    page = opened(synthetic(concepts=20, steps=1000, features=200, samples=64, probes=3, words=60)).page
    session = page.context.new_cdp_session(page)
    session.send(
        "Performance.enable", {"timeDomain": "threadTicks"}
    )  # of the processor: the machine has other things to do

    def spent() -> float:
        return {entry["name"]: entry["value"] for entry in session.send("Performance.getMetrics")["metrics"]}[
            "TaskDuration"
        ]

    times = {}
    for name, act in {
        "search": "byId('search').value = 'goblins'; search()",
        "clear": "byId('search').value = ''; search()",
        "focus": "setFocus(7)",
        "sort": "document.querySelector('table.headline .sort').click()",
        "features": "document.querySelector('table.features .sort').click()",
    }.items():
        began = spent()
        page.evaluate(f"() => {{ {act}; document.body.offsetHeight; }}")
        times[name] = spent() - began
    assert min(times.values()) > 0
    assert max(times.values()) < 1, json.dumps(times)  # seconds
