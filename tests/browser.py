"""A headless browser for the tests of pages: Debian's chromium or Chrome, found on this machine, driven by Playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


FLAGS = [
    "--headless",
    "--no-sandbox",  # as root, which containers run tests as, it does not start with one
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]


def executable() -> str | None:
    """The browser: `SHAPEDPO_BROWSER`, or the first one on the path."""
    names = [os.environ.get("SHAPEDPO_BROWSER", ""), "chromium", "chromium-browser", "google-chrome", "chrome"]
    return next((path for name in names if name and (path := shutil.which(name))), None)


def missing() -> str | None:
    """Why no browser can be had, or `None`."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "playwright is not installed (pip install -c constraints.txt -e '.[dev]')"
    if executable() is None:
        return "there is no chromium or Chrome on the path (`make browser`, or name one in SHAPEDPO_BROWSER)"
    return None


@contextmanager
def browser() -> Iterator[Any]:
    """A started browser, stopped afterwards."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=executable(), args=FLAGS)
        try:
            yield started
        finally:
            started.close()


class Opened:
    """A page in the browser, and all that it complained of or asked the network for.

    Args:
        started: The browser.
        where: The page's file, or the address of the server that it may ask.

    Attributes:
        page: Playwright's.
        problems: Console errors and warnings, and exceptions.
        requests: Addresses it asked for, other than its own.
    """

    def __init__(
        self, started: Any, where: Path | str, width: int = 1600, colors: str = "light", **options: Any
    ) -> None:
        self.context = started.new_context(viewport={"width": width, "height": 900}, color_scheme=colors, **options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.dialogs: list[str] = []
        self.address = where if isinstance(where, str) else where.as_uri()
        self.served = isinstance(where, str)
        self.page.on("console", lambda message: self._console(message))
        self.page.on("pageerror", lambda error: self.problems.append(f"exception: {error}"))
        self.page.on("dialog", lambda dialog: (self.dialogs.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self._request(request.url))

    def open(self) -> Any:
        """Load it, and wait until everything is drawn."""
        self.page.goto(self.address)
        self.ready()
        return self.page

    def ready(self) -> None:
        """Wait until everything is drawn."""
        self.page.wait_for_selector("html[data-ready]", state="attached")

    def overflow(self) -> int:
        """By how many pixels the page is wider than its window."""
        return self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")

    def check(self) -> None:
        """No complaint, no dialog, and nothing asked of the network."""
        assert self.problems == []
        assert self.dialogs == []
        assert self.requests == []

    def close(self) -> None:
        self.context.close()

    def _console(self, message: Any) -> None:
        if message.type in ("error", "warning", "assert"):
            self.problems.append(f"{message.type}: {message.text}")

    def _request(self, url: str) -> None:
        own = url.startswith(self.address) if self.served else url.split("#")[0] == self.address
        if not own and not url.startswith(("data:", "blob:")):
            self.requests.append(url)
