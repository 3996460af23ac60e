"""The website: ``make docs`` builds it from the pages of docs/ and the docstrings.

Pages can also be read in the repository, and may link to files outside docs/. Some of those files
become pages of the site (``PAGES``); a link to any other file leads to the page that describes it
(``SHOWN_BY``), or becomes plain text. The site loads nothing from other hosts.
"""

from __future__ import annotations

import posixpath
import re
import shutil
from pathlib import Path

from sphinx.application import Sphinx

import ragcache
import ragcache.langchain.chat  # before autodoc, which imports as type checkers see modules
import ragcache.langchain.retriever
import ragcache.langchain.vectorstore  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"

#: Files outside docs/ that become pages of the site, with their names there.
PAGES = {
    "README.md": "overview.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security-policy.md",
    "examples/README.md": "examples.md",
    "ragcache/models/tiny/README.md": "small-model.md",
}
SHOWN_BY = {"examples": "examples.md"}  # a directory, and the page that describes it

REST = "..."  # every page that is not listed
CONTENTS = {
    "Start": ["overview", "quickstart", "concepts", "choosing-a-ratio", "examples"],
    "Use": ["langchain", "serving", REST, "security", "security-policy", "reliability"],
    "Understand": [
        "architecture",
        "fusion",
        "blenders",
        "choosing-tokens",
        "causes",
        "engine",
        "kernels",
        "storage",
        "codecs",
        "store-format",
        "service",
        "quality",
        "benchmarks",
        "peers",
        "real-models",
        "encoding-contexts",
        "small-model",
    ],
    "Extend": ["add-a-blender", "add-a-codec", "add-a-store", "contributing"],
    "Look up": ["glossary", "commands", "settings", "reference", "changelog"],
}

project, author, release = "ragcache", "the authors of ragcache", ragcache.__version__
version, copyright = release, "the authors, Apache-2.0"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]
myst_enable_extensions = ["attrs_inline"]
myst_heading_anchors = 3
autodoc_default_options = {"members": True, "member-order": "bysource", "show-inheritance": True}
autodoc_inherit_docstrings = False  # LangChain's docstrings are not part of this project
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
nitpicky = False
# Pages may skip heading levels.
suppress_warnings = ["myst.header"]

root_doc = "README"
html_theme = "furo"
html_title = f"ragcache {release}"
html_copy_source = False
exclude_patterns = ["site"]

_LINK = re.compile(r"\[(?P<text>[^][]*)\]\((?P<target>[^()\s#]*)(?P<anchor>#[^()\s]*)?\)")


def setup(app: Sphinx) -> None:
    app.connect("source-read", _read)


def gather(folder: Path) -> None:
    """Copy everything that Sphinx reads into ``folder``: the pages, and the files in ``PAGES``."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(DOCS, folder, ignore=shutil.ignore_patterns("site"))
    for source, name in PAGES.items():
        shutil.copy(ROOT / source, folder / name)


def _read(_: Sphinx, name: str, content: list[str]) -> None:
    """Rewrite relative links for the site, and move the titles of code blocks into the text."""
    sources = {page.removesuffix(".md"): source for source, page in PAGES.items()}
    folder = posixpath.dirname(sources.get(name, f"docs/{name}.md"))
    text = _LINK.sub(lambda link: moved(link, folder), content[0])
    if name == root_doc:
        text += contents()
    content[0] = re.sub(r'^```(\w+) title="([^"]+)"$', r"`\2`:\n\n```\1", text, flags=re.MULTILINE)


def contents() -> str:
    """The navigation: tables of contents that the page itself does not show."""
    named = {name for names in CONTENTS.values() for name in names} | {root_doc}
    rest = sorted(path.stem for path in DOCS.glob("*.md") if path.stem not in named)
    groups = {
        title: [page for name in names for page in (rest if name == REST else [name])]
        for title, names in CONTENTS.items()
    }
    return "".join(
        f"\n```{{toctree}}\n:hidden:\n:caption: {title}\n\n" + "\n".join(pages) + "\n```\n"
        for title, pages in groups.items()
    )


def moved(link: re.Match[str], folder: str) -> str:
    """A link in a file of ``folder``, rewritten for the site."""
    target = link["target"]
    if not target or ":" in target:
        return link[0]
    path = posixpath.normpath(posixpath.join(folder, target))
    if path.startswith("docs/"):
        to = path.removeprefix("docs/")
    elif path in PAGES:
        to = PAGES[path]
    elif (shown := SHOWN_BY.get(path.split("/")[0])) is not None:
        return f"[{link['text']}]({shown})"
    elif (ROOT / path).exists():
        return link["text"]
    else:
        return link[0]  # Sphinx reports it as broken
    return f"[{link['text']}]({to}{link['anchor'] or ''})"
