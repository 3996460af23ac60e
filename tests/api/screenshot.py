"""Write docs/figures/demo.png: the page with answers of SmolLM2 about the demo's articles.

python -m tests.api.screenshot STORE, after: ragcache demo --store STORE
"""

from __future__ import annotations

import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

from ragcache.api.scheduler import Scheduler
from ragcache.api.service import Service
from ragcache.eval.articles import ARTICLE_QUESTIONS, TOP_K
from ragcache.rag import RagCache
from ragcache.settings import ServiceSettings, Settings
from ragcache.types import Sampling
from tests.api.conftest import serving
from tests.api.test_page import CHROMIUM, QUIET

MODES = "fused", "reuse", "full"
FILE = Path(__file__).parents[2] / "docs" / "figures" / "demo.png"


def main(store: str, number: int) -> None:
    """Ask the question of this number, from 0, over the store."""
    question = ARTICLE_QUESTIONS[number].question.text
    with sync_playwright() as playwright:
        settings = Settings.load(store=store, top_k=TOP_K, max_tokens=32, ratio=0.15)
        cache = RagCache.open(store, settings=settings)
        for mode in MODES:  # warm-up
            cache.ask(question, mode=mode, top_k=1, sampling=Sampling(max_tokens=1))
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        limits = ServiceSettings.load(port=0, grace_s=5.0)
        with serving(Service(cache, Scheduler(), settings=limits), []) as running:
            page = browser.new_page(viewport={"width": 1100, "height": 1500})
            page.set_default_timeout(300_000)
            page.goto(f"{running.url}/demo")
            page.get_by_label("Question").fill(question)
            page.keyboard.press("Enter")
            page.wait_for_function(
                "n => document.querySelectorAll('.answers .fill').length === n", arg=len(MODES)
            )
            page.locator("#go:enabled").wait_for()
            page.locator("h1").click()
            page.screenshot(path=FILE)
            browser.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0)
