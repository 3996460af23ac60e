"""What the page shows, and the page in a browser, as a person uses it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING, Any

import pytest

from ragcache.api import page
from ragcache.api.reporting import report_json, store_json
from ragcache.blend import BLENDERS
from ragcache.errors import ConfigError
from ragcache.pipeline import RagCache
from ragcache.retriever.split import WHOLE
from ragcache.types import Document
from tests import scene
from tests.api.conftest import served

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

QUESTION = "Where does Mira Holt live?"
EVIL = "</script><img src=x onerror=alert(1)> <!-- & lives here"
CHROMIUM = which("chromium") or which("chromium-browser") or which("google-chrome")
QUIET = (  # a browser that asks nobody for anything by itself
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


DOCUMENTS = [*scene.DOCUMENTS, Document("evil", f"Mira Holt {EVIL}, 日本 🎉.", dict(WHOLE))]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RagCache]:
    with scene.small(tmp_path_factory.mktemp("store"), top_k=3) as cache:
        cache.add(DOCUMENTS)
        yield cache


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of the service, which asks for no key on this machine."""
    with served(tmp_path_factory.mktemp("served"), keys=[], top_k=3) as running:
        with running.client(key=None) as client:
            documents = [
                {"id": d.id, "text": d.text, "metadata": dict(d.metadata)} for d in DOCUMENTS
            ]
            client.post("/v1/documents", json={"documents": documents}).raise_for_status()
        yield running.url


@pytest.fixture(scope="module")
def file(cache: RagCache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "out.html"
    answers = {mode: cache.ask(QUESTION, mode=mode) for mode in ("fused", "reuse", "full")}
    page.write(path, QUESTION, answers, cache)
    return path


def shares(part: dict[str, Any]) -> list[float]:
    return [share for _, share in part["tokens"]]


@pytest.mark.parametrize("mode", ["fused", "reuse", "full", "prefix", "cacheblend"])
def test_rows_of_the_prompt_add_up_to_what_the_report_says(cache: RagCache, mode: str) -> None:
    answer = cache.ask(QUESTION, mode=mode)
    report, spans = answer.report, answer.prompt.spans
    assert len(report.computed) == len(answer.prompt)
    assert sum(report.computed) == sum(layer.rows for layer in report.layers)
    for chunk, (start, stop) in zip(report.chunks, spans, strict=True):
        computed = sum(report.computed[start:stop])
        assert chunk.charged == pytest.approx(computed / len(report.layers) / chunk.tokens)
    assert set(report.computed[answer.prompt.question_start :]) == {len(report.layers)}


@pytest.mark.parametrize("mode", ["fused", "full"])
def test_a_trace_has_the_prompts_text_and_its_shares(cache: RagCache, mode: str) -> None:
    answer = cache.ask(QUESTION, mode=mode)
    found = json.loads(json.dumps(report_json(answer, cache.engine, trace=True), allow_nan=False))
    parts = found["prompt"]
    assert [p["kind"] for p in parts] == ["prefix", *["chunk"] * len(answer.passages), "question"]
    assert [p["name"] for p in parts[1:-1]] == [p.chunk.id for p in answer.passages]
    assert [p["loaded"] for p in parts] == [*[mode == "fused"] * (len(parts) - 1), False]
    texts = ["".join(text for text, _ in part["tokens"]) for part in parts]
    assert texts[1:-1] == [p.chunk.text.strip() + "\n\n" for p in answer.passages]
    assert QUESTION in texts[-1] and any("日本 🎉" in text for text in texts)
    for part, chunk in zip(parts[1:-1], answer.report.chunks, strict=True):
        if len(part["tokens"]) == chunk.tokens:  # no token holds a part of a character
            assert sum(shares(part)) / chunk.tokens == pytest.approx(chunk.charged)
    assert set(shares(parts[-1])) == {1.0}


def test_without_a_trace_there_is_no_text(cache: RagCache) -> None:
    answer = cache.ask(QUESTION)
    said = json.dumps(report_json(answer))
    assert "parrot" not in said and "prompt" not in json.loads(said)
    with pytest.raises(ValueError, match="give the engine"):
        report_json(answer, trace=True)


def test_a_store_in_json(cache: RagCache) -> None:
    stats, found = cache.store.stats(), store_json(cache.chunks)
    assert (found["chunks"], found["hits"], found["tier"]) == (stats.chunks, stats.hits, None)


def test_the_file_is_whole_and_asks_nobody(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert "default-src 'none'" in text and "unsafe" not in text
    assert re.findall(r'(?:src|href)="(?!data:)', text) == []
    assert set(re.findall(r"https?://[^\s\"'<>]+", text)) <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<[^>]* on[a-z]+=", text), "an inline event handler"
    inside = re.search(r'id="ragcache-data">(.*?)</script>', text, re.DOTALL)
    assert inside and "<" not in inside[1]
    data = json.loads(inside[1])
    prompt = data["runs"][0]["ragcache"]["prompt"]
    assert any(EVIL in "".join(text for text, _ in part["tokens"]) for part in prompt)


def test_the_page_names_only_modes_there_are() -> None:
    named = re.findall(r'name="mode" value="([^"]+)"', (page.STATIC / "index.html").read_text())
    assert len(named) >= 3 and set(named) <= set(BLENDERS)
    script = (page.STATIC / "draw.js").read_text() + (page.STATIC / "demo.js").read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write", script)


def test_where_a_report_cannot_go(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it is a folder"):
        page.check(tmp_path)
    with pytest.raises(ConfigError, match="there is no folder"):
        page.check(tmp_path / "none" / "out.html")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


class Visit:
    """A page that is watched: what it asks for, and what it complains about."""

    def __init__(self, browser: Browser, address: str, *, width: int = 1100, dark: bool = False):
        self.page: Page = browser.new_page(
            viewport={"width": width, "height": 800}, color_scheme="dark" if dark else "light"
        )
        self.errors: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda said: self.errors.append(said.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(address)

    def check(self, runs: int) -> None:
        """The heat map, waterfall and bars are there, for so many modes, and nothing is wrong."""
        see = self.page
        see.wait_for_function(
            "n => document.querySelectorAll('.answers [aria-busy=false] .fill').length === n",
            arg=runs,
        )
        for drawn in (".t.reused", ".t.recomputed", ".t.fresh", "#waterfall .compute", ".fill"):
            assert see.locator(f"#results {drawn}").last.is_visible()
        assert see.locator("#waterfall .read").count() == 4
        assert see.locator(".part").count() >= 4 and see.locator("#tiles dd").count() >= 4
        assert see.locator("#heat img").count() == 0
        assert "</script>" in see.locator("#heat").inner_text()
        wide = see.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert wide <= 0, f"{wide} pixels too wide"
        assert self.errors == []


def test_the_file_in_a_browser(browser: Browser, file: Path) -> None:
    visit = Visit(browser, file.as_uri(), width=360)
    visit.check(3)
    assert [url for url in visit.asked if not url.startswith("data:")] == [file.as_uri()]
    assert not visit.page.locator("#ask").is_visible()
    visit.page.get_by_role("radio", name="full").check()
    assert visit.page.locator("#heat .reused").count() == 0
    visit.page.close()


@pytest.mark.parametrize(("width", "dark"), [(1100, False), (360, True)])
def test_a_person_asks_by_keyboard(browser: Browser, address: str, width: int, dark: bool) -> None:
    visit = Visit(browser, f"{address}/demo", width=width, dark=dark)
    see = visit.page
    see.keyboard.press("Tab")
    see.keyboard.type(QUESTION)
    see.keyboard.press("Enter")
    visit.check(3)
    back = see.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", back))) < 200) is dark
    for _ in range(60):  # to the first part of the heat map
        if see.evaluate("document.activeElement.matches('.tokens .t')"):
            break
        see.keyboard.press("Tab")
    see.keyboard.press("End")
    assert see.locator("#token").inner_text().endswith((", reused", "layers"))
    assert all(url.startswith(address) for url in visit.asked)
    see.close()


def test_what_goes_wrong_is_said(browser: Browser, address: str) -> None:
    visit = Visit(browser, f"{address}/demo")
    visit.page.get_by_text("Options and API key").click()
    visit.page.get_by_label("Other modes").fill("blend")
    visit.page.get_by_label("Question").fill(QUESTION)
    visit.page.keyboard.press("Enter")
    alert = visit.page.get_by_role("alert")
    alert.wait_for()
    assert "mode 'blend' is unknown" in alert.inner_text()
    assert visit.page.locator(".answers li").count() == 3
    visit.page.close()
