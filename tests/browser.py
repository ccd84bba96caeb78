"""A browser to open pages in: Chromium through Playwright, where both are there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@contextmanager
def chromium() -> Iterator[Any]:
    """A running browser; skips where there is none."""
    api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(_ARGUMENTS))
        try:
            yield browser
        finally:
            browser.close()


class Opened:
    """A page of ours in a browser, and what went wrong in it.

    Attributes:
        page: Playwright's.
        said: errors and warnings on its console, and whatever it tried to open as a dialog.
        fetched: what it asked for, itself apart.
    """

    def __init__(self, browser: Any, file: Path, width: int = 1440) -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 900})
        self.said: list[str] = []
        self.fetched: list[str] = []
        own = file.resolve().as_uri()
        self.page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.said.append(f"error: {error}"))
        self.page.on("dialog", lambda dialog: (self.said.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        self.page.on("request", lambda request: self.fetched.append(request.url) if request.url != own else None)
        self.page.goto(own, timeout=60_000)

    def drawn(self) -> Opened:
        """Wait until every figure is there."""
        self.page.wait_for_selector("html[data-ready]", state="attached", timeout=60_000)
        return self

    def resized(self, width: int) -> Opened:
        """Give it another width, and its figures the time to take it."""
        self.page.set_viewport_size({"width": width, "height": 900})
        self.page.wait_for_function(
            "[...document.querySelectorAll('.plot')].every("
            "plot => Math.abs(plot.querySelector('.main-svg').getBoundingClientRect().width - plot.clientWidth) <= 1)",
            timeout=30_000,
        )
        return self

    def sticking_out(self) -> list[str]:
        """What reaches beyond the window, but for what scrolls inside a frame of its own."""
        return list(
            self.page.evaluate("""() => {
              const width = document.documentElement.clientWidth, out = [];
              const scroll = document.documentElement.scrollWidth;
              if (scroll > width) out.push(`page ${scroll}`);
              for (const element of document.querySelectorAll("body *")) {
                const box = element.getBoundingClientRect();
                if (box.width && (box.right > width + 1 || box.left < -1)
                    && !element.closest(".wide, svg, .skip") && element.checkVisibility())
                  out.push(`${element.tagName}.${element.className} ${box.left}-${box.right}`);
              }
              return out;
            }""")
        )


def screenshots_wanted() -> Path | None:
    """Where somebody wants screenshots of the pages that tests open: ``MEMTRACE_SCREENSHOTS=folder``."""
    folder = os.environ.get("MEMTRACE_SCREENSHOTS")
    return Path(folder) if folder else None
