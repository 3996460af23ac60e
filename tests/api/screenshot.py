"""Writes docs/figures/demo.png: the page with an answer of the small model on its world.

python -m tests.api.screenshot
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from ragcache.models import TINY, world
from ragcache.pipeline import RagCache
from ragcache.retriever.source import read
from tests.api.stub import served
from tests.api.test_page import CHROMIUM, QUIET

QUESTION = "Which instrument is the instrument of Verner Irwin?"
FILE = Path(__file__).parents[2] / "docs" / "figures" / "demo.png"


def main() -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        RagCache.open(folder, TINY) as cache,
        sync_playwright() as playwright,
    ):
        cache.add(read([world("documents.jsonl")]))
        for mode in ("fused", "reuse", "full"):  # the first questions measure and warm up
            cache.ask(QUESTION, mode=mode)
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        with served(cache) as address:
            page = browser.new_page(viewport={"width": 1100, "height": 800})
            page.goto(f"{address}/demo")
            page.get_by_label("Question").fill(QUESTION)
            page.keyboard.press("Enter")
            page.wait_for_function("() => document.querySelectorAll('.answers .fill').length === 3")
            page.locator("#go:enabled").wait_for()
            page.locator("h1").click()
            page.screenshot(path=FILE, full_page=True)
        browser.close()


if __name__ == "__main__":
    main()
