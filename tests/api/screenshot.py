"""Write docs/figures/demo.png: the page with an answer of the small model about its world.

python -m tests.api.screenshot
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from ragcache.api.scheduler import Scheduler
from ragcache.api.service import Service
from ragcache.models import TINY, world_file
from ragcache.rag import RagCache
from ragcache.retriever.source import read
from ragcache.settings import ServiceSettings, Settings
from tests.api.conftest import serving
from tests.api.test_page import CHROMIUM, QUIET

MODES = "fused", "reuse", "full"
QUESTION = "Which instrument is the instrument of Verner Irwin?"
FILE = Path(__file__).parents[2] / "docs" / "figures" / "demo.png"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        cache = RagCache.open(folder, TINY, Settings.load(store=folder))
        limits = ServiceSettings.load(port=0, grace_s=5.0)
        cache.add(read([world_file("documents.jsonl")]))
        for mode in MODES:  # the first questions measure and warm up
            cache.ask(QUESTION, mode=mode)
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        with serving(Service(cache, Scheduler(), settings=limits), []) as running:
            page = browser.new_page(viewport={"width": 1100, "height": 800})
            page.goto(f"{running.url}/demo")
            page.get_by_label("Question").fill(QUESTION)
            page.keyboard.press("Enter")
            page.wait_for_function(
                "n => document.querySelectorAll('.answers .fill').length === n", arg=len(MODES)
            )
            page.locator("#go:enabled").wait_for()
            page.locator("h1").click()
            page.screenshot(path=FILE, full_page=True)
            browser.close()


if __name__ == "__main__":
    main()
