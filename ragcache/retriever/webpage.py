"""Extract the readable text of a web page, and count what is left out."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ragcache.retriever.extraction import ExtractedText, TimeLimit

if TYPE_CHECKING:
    from bs4 import BeautifulSoup, Tag

#: Elements without readable text.
_NO_TEXT = {
    *("head", "title", "script", "style", "template", "svg", "iframe", "object", "canvas"),
}
#: Elements for using a page, not for reading it.
_CONTROLS = {"nav", "noscript", "select", "datalist", "textarea"}
#: Block-level elements, which start on a new line.
_BLOCKS = {
    *("address", "article", "aside", "blockquote", "dd", "details", "dialog", "div", "dl", "dt"),
    *("fieldset", "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6"),
    *("header", "hr", "legend", "main", "ol", "p", "pre", "section", "summary", "table", "ul"),
}
#: An inline style that hides an element until a script changes it.
_HIDING_STYLE = re.compile(
    r"(?:^|;)\s*(?:display\s*:\s*none|visibility\s*:\s*hidden)\b", re.IGNORECASE
)


@dataclass(eq=False, slots=True)
class _Place:
    """The context of a piece of text: which kinds of elements it is in."""

    hidden: bool = False
    aside: _LinkCount | None = None  # of the outermost ``<aside>``
    chrome: str = ""  # the element that makes it navigation or controls, if any
    unshown: bool = False  # by its style or ``aria-hidden``, perhaps only at first
    main: bool = False
    article: int = 0  # number of its ``<article>``; 0 if it is in none
    inner: bool = False  # in an ``<article>`` or a ``<section>``
    form: bool = False
    link: bool = False
    pre: bool = False

    @property
    def left_out(self) -> bool:
        return bool(self.chrome) or (self.aside is not None and self.aside.mostly_links)


@dataclass(eq=False, slots=True)
class _LinkCount:
    """Characters of an ``<aside>``, and how many of them are in links."""

    all: int = 0
    links: int = 0

    @property
    def mostly_links(self) -> bool:
        return self.links > self.all / 2


def extract_html(source: str, clock: TimeLimit | None = None) -> ExtractedText:
    """The main text of a page, one line per block element; the title is its ``<title>``.

    The main text is that of the visible ``<main>``, else of the only visible ``<article>``, if that
    is most of the page's text; else that of the whole page. Scripts, navigation, controls, asides
    of mostly links, hidden elements that no control shows, and the page's own header and footer are
    left out, unless the page has no other text. ``why`` is set if more is left out than kept.
    """
    clock = clock or TimeLimit()
    soup = _parsed(source, clock)
    title = " ".join(soup.title.get_text().split()) if soup.title else ""
    pieces = _pieces(soup, clock)
    sizes = Counter[int]()  # characters by place
    for text, place in pieces:
        sizes[id(place)] += _size(text)
    places = {id(place): place for _, place in pieces}
    shown = {key for key, place in places.items() if not place.hidden}
    body = {key for key in shown if not places[key].left_out}
    chosen = _main_part(body, places, sizes) or body
    if not _sum(chosen, sizes):
        chosen = shown
    kept, dropped = _sum(chosen, sizes), _sum(places.keys() - chosen, sizes)
    text = collapse_blank_lines("".join(text for text, place in pieces if id(place) in chosen))
    why = _describe_omitted(places, chosen, sizes) if dropped > kept else ""
    return ExtractedText(title, text, dropped, kept, why=why)


def collapse_blank_lines(text: str) -> str:
    """Reduce runs of blank lines to one, and strip spaces at line ends and around the text."""
    text = "\n".join(line.rstrip(" \t") for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _parsed(source: str, clock: TimeLimit) -> BeautifulSoup:
    from bs4 import BeautifulSoup, UnusualUsageWarning
    from bs4.exceptions import ParserRejectedMarkup

    class Timed(BeautifulSoup):
        """Checks the clock at every tag and text that the parser finds."""

        def handle_starttag(self, *given: Any, **named: Any) -> Tag | None:
            clock.check()
            return super().handle_starttag(*given, **named)

        def handle_data(self, data: str) -> None:
            clock.check()
            super().handle_data(data)

    # After the last ">" no tag can end, and the parser would search for one from every "<".
    end = source.rfind(">") + 1
    source = source[:end] + source[end:].replace("<", "&lt;")
    with warnings.catch_warnings():  # about XHTML and pages without tags, which are read correctly
        warnings.simplefilter("ignore", UnusualUsageWarning)
        try:
            return Timed(source, "html.parser")
        except ParserRejectedMarkup:  # an invalid declaration: treat it as text
            return Timed(source.replace("<![", "&lt;!["), "html.parser")


def _pieces(soup: BeautifulSoup, clock: TimeLimit) -> list[tuple[str, _Place]]:
    """Pieces of text in document order, with a browser's line breaks, and their contexts."""
    from bs4.element import NavigableString, Tag

    controlled = _controlled(soup)
    pieces: list[tuple[str, _Place]] = []
    cells: dict[int, int] = {}  # by table row: index in pieces of the end of its last cell
    articles = 0
    place = _Place()
    waiting: list[tuple[Any, _Place, bool]] = [(soup, place, False)]
    while waiting:
        node, place, left = waiting.pop()
        if not isinstance(node, Tag):
            # Comments and declarations are subclasses of NavigableString, and not text.
            if type(node) is NavigableString:
                text = str(node) if place.pre else re.sub(r"\s+", " ", node)
                pieces.append((text, place))
                if place.aside is not None:
                    place.aside.all += (size := _size(text))
                    place.aside.links += size if place.link else 0
            continue
        name = node.name
        if left:
            if name in _BLOCKS:
                pieces.append(("\n\n", place))
            elif name in ("td", "th"):
                cells[id(node.parent)] = len(pieces)
                pieces.append(("", place))
            continue
        clock.check()
        if name in _NO_TEXT:
            continue
        articles += name == "article"
        place = _entered(node, place, articles, controlled)
        if name in ("td", "th") and (at := cells.get(id(node.parent))) is not None:
            pieces[at] = (" | ", pieces[at][1])
        before = {"br": "\n", "li": "\n- ", "tr": "\n"}.get(name)
        if before or name in _BLOCKS:
            pieces.append((before or "\n\n", place))
        elif name == "button" and pieces and pieces[-1][0][-1:].strip():
            pieces.append((" ", place))  # adjacent buttons are separate words
        waiting.append((node, place, True))
        waiting += [(child, place, False) for child in reversed(node.contents)]
    return pieces


def _controlled(soup: BeautifulSoup) -> set[int]:
    """The ``id()`` of elements that a control of the page can show.

    These are the elements that a control names (``aria-controls``), else the next sibling of the
    control or of its parent.
    """
    from bs4.element import Tag

    named, found = set[str](), set[int]()
    for control in soup.find_all(True, {"aria-controls": True}):
        named.update(str(control["aria-controls"]).split())
    for panel in soup.find_all(True, {"hidden": True, "id": True}):
        if panel["id"] in named:
            found.add(id(panel))
    for control in soup.find_all(True, {"aria-expanded": True, "aria-controls": False}):
        for tag in (control, control.parent):
            sibling = tag and next((t for t in tag.next_siblings if isinstance(t, Tag)), None)
            if sibling is not None:
                found.add(id(sibling))
                break
    return found


def _entered(tag: Tag, place: _Place, articles: int, controlled: set[int]) -> _Place:
    """The context inside of ``tag``, which itself is in the context ``place``."""
    changes: dict[str, Any] = {}
    hidden = tag.get("hidden")
    if hidden is not None and hidden != "until-found" and id(tag) not in controlled:
        changes["hidden"] = True
    unshown = (
        place.unshown
        or tag.get("aria-hidden") == "true"
        or _HIDING_STYLE.search(str(tag.get("style", ""))) is not None
    )
    changes["unshown"] = unshown
    match tag.name:
        case "dialog" if tag.get("open") is None:
            changes["hidden"] = True
        case "main":
            changes["main"] = place.main or not unshown
        case "article":
            article = place.article or (0 if unshown else articles)
            changes |= {"article": article, "inner": True}
        case "section":
            changes["inner"] = True
        case "form":
            changes["form"] = True
        case "pre":
            changes["pre"] = True
        case "a":
            changes["link"] = True
        case "aside" if place.aside is None:
            changes["aside"] = _LinkCount()
        case "header" | "footer" if not (place.inner or place.main):
            changes["chrome"] = tag.name
        case "button" if place.form and tag.get("type") != "button":
            changes["chrome"] = "button"
        case name if name in _CONTROLS:
            changes["chrome"] = name
    changes = {key: value for key, value in changes.items() if getattr(place, key) != value}
    return replace(place, **changes) if changes else place


def _main_part(body: set[int], places: dict[int, _Place], sizes: Counter[int]) -> set[int]:
    """Contexts in ``<main>`` or the only ``<article>``, if that is most of the text; else none."""
    part = {key for key in body if places[key].main}
    if not part:
        articles = {places[key].article for key in body} - {0}
        part = {key for key in body if places[key].article} if len(articles) == 1 else set()
    return part if 2 * _sum(part, sizes) >= _sum(body, sizes) else set()


def _describe_omitted(places: dict[int, _Place], chosen: set[int], sizes: Counter[int]) -> str:
    parts = Counter[str]()
    for key in places.keys() - chosen:
        place = places[key]
        aside = "aside" if place.left_out else "beside its main part"
        parts["hidden" if place.hidden else place.chrome or aside] += sizes[key]
    named = ", ".join(f"{size:,} {name}" for name, size in parts.most_common() if size)
    return f"{named}. Check that the page's text is complete, or save it as text."


def _size(text: str) -> int:
    return sum(map(len, text.split()))


def _sum(keys: set[int], sizes: Counter[int]) -> int:
    return sum(sizes[key] for key in keys)
