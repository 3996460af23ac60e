"""Readable text out of Markdown, HTML and PDF, by libraries that are kept for just that.

Every function gives ``(title, text)``; the title is "" where the source names none. Nothing here
opens files or names them in errors: that is :mod:`ragcache.retriever.source`.
"""

from __future__ import annotations

import re
import warnings
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from bs4 import Tag
    from markdown_it.token import Token

_FRONT_MATTER = re.compile(r"\A---[ \t]*\n.*?\n(?:---|\.\.\.)[ \t]*(?:\n|\Z)", re.DOTALL)

#: Elements that never hold the text of a page.
_FURNITURE = (
    *("script", "style", "noscript", "template", "svg", "iframe", "object", "canvas"),
    *("nav", "aside", "form", "button", "select", "dialog"),
)
#: Elements that stand on lines of their own.
_BLOCKS = (
    *("address", "article", "blockquote", "dd", "details", "div", "dl", "dt", "fieldset"),
    *("figcaption", "figure", "footer", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr"),
    *("main", "ol", "p", "pre", "section", "summary", "table", "ul"),
)


def tidy(text: str) -> str:
    """At most one blank line in a row, no spaces at line ends, nothing around the whole."""
    text = re.sub(r"[ \t]+(?=\n)", "", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def markdown_text(source: str) -> tuple[str, str]:
    """Markdown without what only serves its rendering; the title is its first heading.

    Headings, lists, tables and code keep their marks, so that the text still reads, and splits, as
    Markdown. Front matter, comments, link targets, images (but for their descriptions) and
    emphasis marks go.
    """
    from markdown_it import MarkdownIt

    tokens = MarkdownIt("commonmark").enable("table").parse(_FRONT_MATTER.sub("", source, count=1))
    title, depth = "", 0
    out: list[str] = []
    for before, token in zip([None, *tokens], tokens, strict=False):
        if token.type in ("bullet_list_open", "ordered_list_open"):
            depth += 1
        elif token.type in ("bullet_list_close", "ordered_list_close"):
            depth -= 1
        piece = _block(token, depth)
        if not title and before is not None and before.type == "heading_open":
            title = piece
        out.append(piece)
    return title, tidy(re.sub(r" \| $", "", "".join(out), flags=re.MULTILINE))


def _block(token: Token, depth: int) -> str:
    match token.type:
        case "inline":
            return "".join(map(_inline, token.children or ()))
        case "heading_open":
            return "#" * int(token.tag[1:]) + " "
        case "list_item_open":
            mark = f"{token.info}{token.markup}" if token.info else "-"
            return "  " * (depth - 1) + mark + " "
        case "fence" | "code_block":
            return f"```{token.info.strip()}\n{token.content}```\n\n"
        case "html_block":
            return html_text(token.content)[1] + "\n\n"
        case "td_close" | "th_close":
            return " | "
        case "paragraph_close" if token.hidden:  # an item of a tight list
            return "\n"
        case "bullet_list_open" | "ordered_list_open" if depth > 1:
            return ""
        case "tr_close":
            return "\n"
        case "heading_close" | "paragraph_close" | "table_close" | "hr":
            return "\n\n"
        case "bullet_list_close" | "ordered_list_close" if depth == 0:
            return "\n\n"
    return ""


def _inline(token: Token) -> str:
    match token.type:
        case "text" | "text_special":
            return token.content
        case "code_inline":
            return f"`{token.content}`"
        case "image":
            return "".join(map(_inline, token.children or ()))
        case "softbreak":
            return " "  # where a line of the source ends, its paragraph goes on
        case "hardbreak":
            return "\n"
        case "html_inline" if token.content.lower().startswith("<br"):
            return "\n"
    return ""


def html_text(source: str) -> tuple[str, str]:
    """The main text of a page, a line per block; the title is its ``<title>``.

    The main text is that of ``<main>``, else of the only ``<article>``, else of ``<body>``, without
    scripts, navigation, forms, asides, hidden elements, and the page's own header and footer.
    """
    from bs4 import BeautifulSoup, UnusualUsageWarning

    with warnings.catch_warnings():  # about XHTML, and pages without a tag: both are read well
        warnings.simplefilter("ignore", UnusualUsageWarning)
        soup = BeautifulSoup(source, "html.parser")
    title = " ".join(soup.title.get_text().split()) if soup.title else ""
    for tag in soup.find_all(("head", "title")):
        tag.decompose()
    articles = soup.find_all("article")
    root = soup.find("main") or (articles[0] if len(articles) == 1 else soup.body) or soup
    for tag in root.find_all(_FURNITURE):
        tag.decompose()
    for tag in root.find_all(hidden=True):
        tag.decompose()
    for tag in root.find_all(("header", "footer")):
        if root.name in ("body", "[document]") and not tag.find_parent(("article", "section")):
            tag.decompose()
    _break_lines(root)
    return title, tidy(root.get_text())


def _break_lines(root: Tag) -> None:
    """Make line ends those that a browser would show, instead of those of the source."""
    from bs4.element import NavigableString

    for string in root.find_all(string=True):
        # Comments and the like are subclasses of the plain string: get_text leaves them out.
        if type(string) is NavigableString and not string.find_parent("pre"):
            string.replace_with(re.sub(r"\s+", " ", string))
    for tag in root.find_all("br"):
        tag.replace_with("\n")
    for tag in root.find_all("li"):
        tag.insert_before("\n- ")
    for tag in root.find_all(("td", "th")):
        if tag.find_next_sibling(("td", "th")):
            tag.insert_after(" | ")
    for tag in root.find_all("tr"):
        tag.insert_before("\n")
    for tag in root.find_all(_BLOCKS):
        tag.insert_before("\n\n")
        tag.insert_after("\n\n")


def pdf_text(stream: IO[bytes]) -> tuple[str, str]:
    """The text of all pages, a blank line between two; the title is the one in its properties.

    An empty password is tried. Raises what pypdf raises: ``PyPdfError`` and, on files that are
    damaged in ways it does not expect, about any error that parsing can meet.
    """
    from pypdf import PdfReader

    reader = PdfReader(stream)
    pages = [page.extract_text() for page in reader.pages]
    title = reader.metadata.title if reader.metadata else None
    return (title or "").strip(), tidy("\n\n".join(pages))
