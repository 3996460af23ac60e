"""The site is built without a warning, has every page, and asks no other host for anything."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.pages import ROOT

pytestmark = pytest.mark.slow  # `make docs` builds it too

#: What makes a browser fetch; a link is only followed by whoever clicks it.
FETCHED = {"img": "src", "script": "src", "iframe": "src", "link": "href"}


class Fetches(HTMLParser):
    """What a page has a browser fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if value := dict(attrs).get(FETCHED.get(tag, "")):
            self.found.append(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sphinx")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "docs/site", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def test_every_page_is_there(site: Path) -> None:
    made = {path.stem for path in site.glob("*.html")}
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} <= made
    assert {"overview", "changelog", "contributing", "security-policy", "examples"} <= made
    reference = (site / "reference.html").read_text(encoding="utf-8")
    assert "ragcache.rag.RagCache.ask" in reference


def test_no_other_host_is_asked(site: Path) -> None:
    foreign = []
    for page in site.glob("*.html"):
        fetches = Fetches()
        fetches.feed(page.read_text(encoding="utf-8"))
        foreign += [f"{page.name}: {one}" for one in fetches.found if "//" in one]
    for sheet in site.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        foreign += [
            f"{sheet.name}: {one}" for one in re.findall(r"url\([\"']?((?:https?:)?//.*?)\)", text)
        ]
    assert foreign == []
