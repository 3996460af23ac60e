"""Extract the text of Markdown (markdown-it) and PDF (pypdf).

Files are opened, and named in errors, by :mod:`ragcache.retriever.readers`. Each function raises
LimitExceeded once the time of ``clock`` is over.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from datetime import date
from functools import partial
from typing import IO, TYPE_CHECKING, Any

from ragcache.retriever.extraction import ExtractedText, TimeLimit
from ragcache.retriever.webpage import collapse_blank_lines, extract_html

if TYPE_CHECKING:
    from markdown_it.token import Token
    from pypdf import PageObject, PdfReader

_FRONT_MATTER = re.compile(
    r"\A(?P<mark>---|\+\+\+)[ \t]*\n(?P<fields>.*?)^(?:(?P=mark)|\.\.\.)[ \t]*$\n?",
    re.DOTALL | re.MULTILINE,
)
_SCALARS = str | int | float | bool | date


def extract_markdown(source: str, clock: TimeLimit | None = None) -> ExtractedText:
    """Markdown without marks that only matter for rendering.

    Headings, lists, tables and code keep their marks, so that the text still splits as Markdown.
    Comments, link targets, emphasis marks and images (except for their descriptions) are removed.
    Front matter becomes metadata: fields in YAML between lines of ``---``, or in TOML between
    lines of ``+++``; anything else there is text. The title is that of the front matter, else the
    first heading.
    """
    from markdown_it import MarkdownIt

    clock = clock or TimeLimit()
    fields, source = _front_matter(source, clock)
    parser = MarkdownIt("commonmark").enable("table")
    for rules in (parser.block.ruler, parser.inline.ruler):
        rules.before(rules.get_active_rules()[0], "clock", partial(_check_clock, clock))
    tokens = parser.parse(source)
    title, depth = "", 0
    dropped = kept = 0
    why = ""
    out: list[str] = []
    for before, token in zip([None, *tokens], tokens, strict=False):
        clock.check()
        if token.type in ("bullet_list_open", "ordered_list_open"):
            depth += 1
        elif token.type in ("bullet_list_close", "ordered_list_close"):
            depth -= 1
        if token.type == "html_block":
            page = extract_html(token.content, clock)
            dropped, why = dropped + page.dropped, page.why or why
            piece = page.text + "\n\n"
        else:
            piece = _block(token, depth)
        if not title and before is not None and before.type == "heading_open":
            title = piece
        out.append(piece)
    text = collapse_blank_lines(re.sub(r" \| $", "", "".join(out), flags=re.MULTILINE))
    kept = len(text)
    title = fields.pop("title", "") or title
    return ExtractedText(title, text, dropped, kept, why=why, metadata=fields)


def _check_clock(clock: TimeLimit, *_: object) -> bool:
    """A parser rule that never matches, but checks the clock wherever rules are tried."""
    clock.check()
    return False


def _front_matter(source: str, clock: TimeLimit) -> tuple[dict[str, str], str]:
    """The fields of the front matter, and the text that follows it."""
    found = _FRONT_MATTER.match(source)
    if found is None:
        return {}, source
    try:
        if found["mark"] == "---":
            fields = _from_yaml(found["fields"], clock)
        else:
            fields = tomllib.loads(found["fields"])
        if not isinstance(fields, dict) or not all(isinstance(key, str) for key in fields):
            return {}, source  # a thematic break, not front matter
        texts = {key: text for key, value in fields.items() if (text := _field(value))}
    except (ValueError, RecursionError):
        return {}, source
    return texts, source[found.end() :]


def _from_yaml(text: str, clock: TimeLimit) -> object:
    """Parse YAML without aliases, which can expand to any size. Raises ValueError."""
    import yaml

    class Plain(yaml.SafeLoader):  # type: ignore[misc]  # it has no types
        def compose_node(self, parent: Any, index: Any) -> Any:
            clock.check()
            if self.check_event(yaml.AliasEvent):
                raise ValueError("an alias")
            return super().compose_node(parent, index)

    try:
        return yaml.load(text, Plain)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _field(value: object) -> str:
    """A field's value as text: scalar lists joined by commas, other nested values as JSON."""
    if isinstance(value, list) and all(isinstance(one, _SCALARS) for one in value):
        return ", ".join(filter(None, map(_field, value)))
    if isinstance(value, list | dict):
        return json.dumps(value, default=str, ensure_ascii=False) if value else ""
    return str(value) if isinstance(value, _SCALARS) else ""


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
        case "td_close" | "th_close":
            return " | "
        case "paragraph_close" if token.hidden:  # in a tight list
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
            return " "  # a line end within a paragraph
        case "hardbreak":
            return "\n"
        case "html_inline" if token.content.lower().startswith("<br"):
            return "\n"
    return ""


def extract_pdf(stream: IO[bytes], clock: TimeLimit | None = None) -> ExtractedText:
    """The text and free-text annotations of all pages, then a line for each form field filled in.

    Pages are separated by a blank line; those with a picture and no text are dropped. The title is
    that of the document's properties. An empty password is tried. Raises what pypdf raises:
    ``PyPdfError``, and for damaged files almost any built-in error.
    """
    from pypdf import PdfReader

    clock = clock or TimeLimit()
    reader = PdfReader(stream)
    pages: list[str] = []
    scans: list[int] = []
    for number, page in enumerate(reader.pages, start=1):
        text = page.extract_text(visitor_operand_before=lambda *_: clock.check())
        pages.append("\n".join([text, *_annotations(page)]))
        if not pages[-1].strip() and _has_pictures(page):
            scans.append(number)
    filled = [f"{name}: {text}" for name, text in _form_fields(reader)]
    title = reader.metadata.title if reader.metadata else None
    why = ""
    if scans:
        listed = ", ".join(map(str, scans[:10])) + (", ..." if len(scans) > 10 else "")
        why = (
            f"page {listed} holds a picture and no text, probably a scan. Run OCR on it first, for "
            "instance `ocrmypdf --skip-text in.pdf out.pdf`."
        )
    text = collapse_blank_lines("\n\n".join([*pages, "\n".join(filled)]))
    dropped = len(scans)
    return ExtractedText((title or "").strip(), text, dropped, len(pages) - dropped, "pages", why)


def _annotations(page: PageObject) -> Iterator[str]:
    """Texts of the free-text annotations of a page."""
    annotations = page.get("/Annots")
    for one in annotations.get_object() or () if annotations is not None else ():
        annotation = one.get_object()
        if annotation.get("/Subtype") == "/FreeText" and annotation.get("/Contents"):
            yield str(annotation["/Contents"])


def _has_pictures(page: PageObject) -> bool:
    resources = page.get("/Resources")
    drawn = resources.get_object().get("/XObject") if resources is not None else None
    return bool(drawn and drawn.get_object())


def _form_fields(reader: PdfReader) -> Iterator[tuple[str, str]]:
    """Label, or else name, and value of every form field that has a value."""
    for name, field in (reader.get_fields() or {}).items():
        value = field.get("/V")
        values = value if isinstance(value, list) else [value]
        text = ", ".join(str(v).removeprefix("/") for v in values if v not in (None, "", "/Off"))
        if text.strip():
            yield str(field.get("/TU") or name), text
