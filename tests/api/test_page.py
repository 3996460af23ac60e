"""What the page shows, and the page in a browser."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING, Any

import pytest

from ragcache.api import report_page
from ragcache.api.example_questions import example_questions
from ragcache.api.serialize import report_json, store_json
from ragcache.blend import BLENDERS
from ragcache.errors import ConfigError
from ragcache.eval.articles import ARTICLE_QUESTIONS, ARTICLES
from ragcache.models import world_file
from ragcache.rag import RagCache
from ragcache.retriever.source import read
from ragcache.retriever.split import WHOLE
from ragcache.types import Document
from tests import scene
from tests.api.conftest import ANN, BOB, served

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
    report_page.write_report(path, {QUESTION: answers}, cache)
    return path


def test_a_report_of_several_questions(browser: Browser, cache: RagCache, tmp_path: Path) -> None:
    asked = {
        question: {mode: cache.ask(question, mode=mode) for mode in ("fused", "full")}
        for question in (QUESTION, "Where were boats built?")
    }
    report_page.write_report(tmp_path / "out.html", asked, cache)
    visit = Visit(browser, (tmp_path / "out.html").as_uri())
    see = visit.page
    assert see.locator("#asked").inner_text() == QUESTION
    see.get_by_role("radio", name="Where were boats built?").check()
    assert see.locator("#asked").inner_text() == "Where were boats built?"
    rows = see.locator(".answers li")
    facts = rows.locator(".bar + p").all_inner_texts()
    assert re.match(r"(\d+(\.\d)? times (sooner|later) than|as soon as) full prefill, ", facts[0])
    assert "full prefill" not in facts[1] and visit.errors == []
    see.close()


def shares(part: dict[str, Any]) -> list[float]:
    return [share for _, share in part["tokens"]]


@pytest.mark.parametrize("mode", ["fused", "reuse", "full", "prefix", "cacheblend"])
def test_rows_of_the_prompt_add_up_to_what_the_report_says(cache: RagCache, mode: str) -> None:
    answer = cache.ask(QUESTION, mode=mode)
    report, spans = answer.report, answer.prompt.spans
    assert len(report.computed) == len(answer.prompt)
    late = report.late_tokens * len(report.layers)
    assert sum(report.computed) == sum(layer.rows for layer in report.layers) + late
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
    prompt = data["questions"][0]["runs"][0]["ragcache"]["prompt"]
    assert any(EVIL in "".join(text for text, _ in part["tokens"]) for part in prompt)


def test_the_page_names_only_modes_there_are() -> None:
    named = re.findall(
        r'name="mode" value="([^"]+)"', (report_page.STATIC / "index.html").read_text()
    )
    assert len(named) >= 3 and set(named) <= set(BLENDERS)
    told = (report_page.STATIC / "words.js").read_text().split("MODES = {", 1)[1].split("};", 1)[0]
    assert set(re.findall(r"^ +(\w+): ", told, re.MULTILINE)) == set(BLENDERS)


def test_the_page_runs_and_draws_nothing_that_comes_from_documents() -> None:
    scripts = [file for file in report_page.STATIC.iterdir() if file.name.endswith(".js")]
    assert {file.name for file in scripts} > set(report_page.DRAWING)
    for script in (file.read_text() for file in scripts):
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write", script)
        assert not re.search(r"\beval\(|new Function|\.style\b|setAttribute\(\"(style|on)", script)
    index = (report_page.STATIC / "index.html").read_text()
    assert not re.search(r"<script(?! src=)|<style| style=| on[a-z]+=", index)


@pytest.mark.parametrize("before", [None, 0o666])
def test_a_report_is_its_owners_alone(cache: RagCache, tmp_path: Path, before: int | None) -> None:
    path = tmp_path / "out.html"
    if before is not None:
        path.touch()
        path.chmod(before)
    mask = os.umask(0)
    try:
        answers = {"full": cache.ask(QUESTION, mode="full")}
        report_page.write_report(path, {QUESTION: answers}, cache)
    finally:
        os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o600


def test_examples_are_of_what_is_stored(tmp_path: Path) -> None:
    with scene.small(tmp_path) as cache:
        assert example_questions(cache) == []
        cache.add([Document("notes/set-up_guide.md", "Some text."), Document("42", "A text.")])
        cache.add([Document("x", "Some more.", {"title": "The Mill"})])
        assert example_questions(cache) == [
            "What does “set up guide” say?",
            "What does “The Mill” say?",
        ]
        name = "verner-irwin"  # of the world, but with a text of its own
        cache.add([Document(f"documents.jsonl#{name}", "He plays the tuba.")])
        assert not any("instrument" in question for question in example_questions(cache))
        (own,) = (d for d in read([world_file("documents.jsonl")]) if d.id.endswith(f"#{name}"))
        cache.add([Document(own.id, own.text, dict(WHOLE))])
        found = example_questions(cache)
        assert found and all("Verner Irwin" in question for question in found)


def test_the_page_suggests_the_questions_about_stored_articles(tmp_path: Path) -> None:
    first = ARTICLE_QUESTIONS[0]
    with scene.small(tmp_path, chunk_tokens=64) as cache:
        cache.add(read([ARTICLES / first.file]))
        assert example_questions(cache) == [
            one.question.text for one in ARTICLE_QUESTIONS if one.file == first.file
        ]


def test_where_a_report_cannot_go(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it is a folder"):
        report_page.check_report_path(tmp_path)
    with pytest.raises(ConfigError, match="there is no folder"):
        report_page.check_report_path(tmp_path / "none" / "out.html")


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


@pytest.fixture(scope="module")
def saved_page(browser: Browser, file: Path) -> Iterator[Page]:
    """The file, opened once, for whoever only asks what its code says."""
    see = Visit(browser, file.as_uri()).page
    yield see
    see.close()


def test_the_file_in_a_browser(browser: Browser, file: Path) -> None:
    visit = Visit(browser, file.as_uri(), width=360)
    visit.check(3)
    assert visit.page.locator("#headline").inner_text().startswith("fused: ")
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
    runs = see.locator(".answers li")
    answers = [text.strip() for text in runs.locator(".text").all_inner_texts()]
    marks = runs.locator(".mark").all_inner_texts()
    agrees = {True: "✓ same answer as full", False: "✗ differs from full"}
    assert marks == [*(agrees[a == answers[2]] for a in answers[:2]), "the reference answer"]
    headline = see.locator("#headline").inner_text()
    said = (
        r"fused: (\d+(\.\d)? times (sooner|later) than|as soon as) full prefill; \d+ % computed; "
    )
    assert re.fullmatch(f"{said}(same|different) answer\\.", headline), headline
    assert headline.endswith("same answer.") is (answers[0] == answers[2])
    assert all(runs.locator(".about").all_inner_texts())
    assert not see.locator("#nothing").is_visible()
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


def test_an_example_is_asked_by_a_click(browser: Browser, address: str) -> None:
    visit = Visit(browser, f"{address}/demo")
    button = visit.page.locator("#examples button").first
    question = button.inner_text()
    assert question == "What does “boats” say?"
    button.click()
    visit.page.locator("#asked").get_by_text(question).wait_for()
    visit.page.locator(".answers [aria-busy=false] .fill").nth(2).wait_for()
    visit.page.close()


def test_nothing_retrieved_is_said_first(browser: Browser, cache: RagCache, tmp_path: Path) -> None:
    answers = {mode: cache.ask(QUESTION, mode=mode, chunks=[]) for mode in ("fused", "full")}
    report_page.write_report(tmp_path / "out.html", {QUESTION: answers}, cache)
    saved = Visit(browser, (tmp_path / "out.html").as_uri())
    with served(tmp_path / "empty", keys=[]) as running:
        live = Visit(browser, f"{running.url}/demo")
        live.page.locator("#empty").wait_for()
        live.page.get_by_label("Question").fill(QUESTION)
        live.page.keyboard.press("Enter")
        live.page.locator(".answers .fill").nth(2).wait_for()
        for visit in (saved, live):
            notice = visit.page.locator("#nothing")
            assert "Nothing was retrieved" in notice.inner_text()
            top = [visit.page.locator(i).bounding_box() for i in ("#nothing", "#headline")]
            assert top[0] and top[1] and top[0]["y"] < top[1]["y"]
            assert "computed" not in visit.page.locator("#headline").inner_text()
            assert visit.errors == []
            visit.page.close()


def test_why_nothing_was_retrieved(saved_page: Page) -> None:
    """Where a report says why."""
    saved_page.evaluate("why => page.sayNothing(why)", "the store holds <b>no</b> documents")
    said = saved_page.locator("#nothing").inner_text()
    assert said.startswith("Nothing was retrieved: the store holds <b>no</b> documents. The answer")


def test_files_are_added(browser: Browser, tmp_path: Path) -> None:
    given = {
        "mill.md": b"# The mill\n\nThe old mill stands on the Avon. <img src=x onerror=alert(1)>",
        "scan.pdf": b"%PDF-1.7",
        "latin.txt": "Müller".encode("latin-1"),
        "empty.txt": b"",
        "zeros.txt": b"a\0b",
        "long.txt": b"x" * 3000,
    }
    for name, data in given.items():
        (tmp_path / name).write_bytes(data)
    with served(tmp_path / "store", body_bytes=2048) as running:
        visit = Visit(browser, f"{running.url}/demo")
        see = visit.page
        see.get_by_text("API key is needed").wait_for()
        see.get_by_label("API key").fill(ANN)
        see.get_by_label("API key").press("Tab")
        see.locator("#empty").wait_for()
        see.get_by_text("Add files").click()
        assert "up to 2 KiB each" in see.locator("#drop").inner_text()
        see.set_input_files("#files", [tmp_path / name for name in given])
        see.get_by_label("Name of mill.md").fill("the mill")
        see.get_by_role("button", name="Add 6 files").click()
        see.get_by_text("more than the limit of 2 KiB").wait_for()
        told = see.locator("#chosen li").all_inner_texts()
        says = ["added: ", "only plain text", "not UTF-8 text", "is empty", "UTF-8 text", "3 KiB"]
        assert [say in text for say, text in zip(says, told, strict=True)] == [True] * 6, told
        assert see.locator("#chosen .bad").count() == 5
        see.locator("#documents").get_by_text("the mill").wait_for()
        assert see.get_by_role("button", name="Add 5 files").is_enabled()
        with running.client() as ann:
            assert [d["id"] for d in ann.get("/v1/documents").json()["data"]] == ["the mill"]
        with running.client(BOB) as bob:
            assert bob.get("/v1/documents").json()["data"] == []
        see.close()


def test_long_prompts_fold(browser: Browser, file: Path, tmp_path: Path) -> None:
    inside = re.search(r'id="ragcache-data">(.*?)</script>', file.read_text(), re.DOTALL)
    assert inside
    data = json.loads(inside[1])
    prompt = data["questions"][0]["runs"][0]["ragcache"]["prompt"]
    prompt[1]["tokens"] = prompt[1]["tokens"] * 300
    tokens = len(prompt[1]["tokens"])
    assert tokens > 2000
    (tmp_path / "long.html").write_text(report_page.report_html(data))
    visit = Visit(browser, (tmp_path / "long.html").as_uri())
    see = visit.page
    parts = see.locator(".part")
    drawn = parts.nth(1).locator(".t")
    assert [part.get_attribute("open") is not None for part in parts.all()[:2]] == [True, False]
    assert drawn.count() == 0 and parts.last.locator(".t").count() > 0
    parts.nth(1).locator("summary").click()
    drawn.first.wait_for()
    assert drawn.count() == 1000
    see.get_by_role("button", name=f"Show 1,000 more tokens of {tokens - 1000:,}").click()
    assert drawn.count() == 2000
    see.get_by_role("button", name="Unfold all").click()
    see.get_by_role("button", name="Fold all").click()
    see.get_by_role("button", name="Unfold all").wait_for()
    assert see.locator(".part[open]").count() == 0
    assert visit.errors == []
    see.close()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (0.0, "0.0 ms"),
        (0.0357, "35.7 ms"),
        (0.09996, "100 ms"),
        (0.2494, "249 ms"),
        (0.9996, "1.00 s"),
        (1.234, "1.23 s"),
        (12.34, "12.3 s"),
        (59.97, "1 min 0 s"),
        (125.0, "2 min 5 s"),
    ],
)
def test_times_are_as_people_say_them(saved_page: Page, given: float, says: str) -> None:
    assert saved_page.evaluate("s => words.seconds(s)", given) == says


@pytest.mark.parametrize(
    ("times", "answers", "says"),
    [
        (
            (0.1, 0.56),
            ("a", "a "),
            "5.6 times sooner than full prefill; 15 % computed; same answer",
        ),
        (
            (0.1, 0.05),
            ("a", "b"),
            "2.0 times later than full prefill; 15 % computed; different answer",
        ),
        ((1.0, 1.02), ("a", "a"), "as soon as full prefill; 15 % computed; same answer"),
        (
            (0.01, 12.0),
            ("a", "a"),
            "1,200 times sooner than full prefill; 15 % computed; same answer",
        ),
        ((1.5,), ("a",), "first token after 1.50 s; 15 % computed"),
    ],
)
def test_the_headline(
    saved_page: Page, times: tuple[float, ...], answers: tuple[str, ...], says: str
) -> None:
    counts = {"chunks": [{}], "chunk_tokens": 100, "reused_tokens": 85, "recomputed_tokens": 15}
    runs = [
        {"mode": mode, "answer": text, "ragcache": {**counts, "charged_budget": 0.15, "ttft_s": s}}
        for mode, s, text in zip(("fused", "full"), times, answers, strict=False)
    ]
    told = saved_page.evaluate("runs => words.headline(runs)", runs)
    assert told == {"mode": "fused", "text": says}


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
