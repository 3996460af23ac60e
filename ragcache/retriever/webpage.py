"""The readable text of a web page: one walk over its tags, and a count of what is left out."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ragcache.retriever.extraction import ExtractedText, TimeLimit

if TYPE_CHECKING:
    from bs4 import BeautifulSoup, Tag

#: Elements that hold no text of a page.
_UNREAD = {
    *("head", "title", "script", "style", "template", "svg", "iframe", "object", "canvas"),
}
#: Elements that serve the use of a page, not its reading.
_CONTROLS = {"nav", "noscript", "select", "datalist", "textarea"}
#: Elements that stand on lines of their own.
_BLOCKS = {
    *("address", "article", "aside", "blockquote", "dd", "details", "dialog", "div", "dl", "dt"),
    *("fieldset", "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6"),
    *("header", "hr", "legend", "main", "ol", "p", "pre", "section", "summary", "table", "ul"),
}
#: A style that shows nothing, until a script changes it.
_UNSHOWN = re.compile(r"(?:^|;)\s*(?:display\s*:\s*none|visibility\s*:\s*hidden)\b", re.IGNORECASE)


@dataclass(eq=False, slots=True)
class _Place:
    """Where in a page a piece of text stands."""

    hidden: bool = False
    aside: _Share | None = None  # the outermost
    furniture: str = ""  # the element that says so
    unshown: bool = False  # by its style, or for who has it read out: perhaps for now alone
    main: bool = False
    article: int = 0  # 0: in none; else which
    inner: bool = False  # in an article or a section
    form: bool = False
    link: bool = False
    pre: bool = False

    @property
    def left_out(self) -> bool:
        return bool(self.furniture) or (self.aside is not None and self.aside.of_links)


@dataclass(eq=False, slots=True)
class _Share:
    """How many characters an aside holds, and how many of them are links."""

    all: int = 0
    links: int = 0

    @property
    def of_links(self) -> bool:
        return self.links > self.all / 2


def extract_html(source: str, clock: TimeLimit | None = None) -> ExtractedText:
    """The main text of a page, a line per block; the title is its ``<title>``.

    The main text is that of the ``<main>`` that is shown, else of the only ``<article>`` that is,
    where that is most of the page's text; else that of all of the page. Left out are scripts,
    navigation, controls, asides of links, hidden elements that no control shows, and the page's
    own header and footer; all of that is text where there is no other. Who reads it is told where
    more is left out than kept.
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
    chosen = _chosen(body, places, sizes) or body
    if not _sum(chosen, sizes):
        chosen = shown
    kept, dropped = _sum(chosen, sizes), _sum(places.keys() - chosen, sizes)
    text = collapse_blank_lines("".join(text for text, place in pieces if id(place) in chosen))
    why = _why(places, chosen, sizes) if dropped > kept else ""
    return ExtractedText(title, text, dropped, kept, why=why)


def collapse_blank_lines(text: str) -> str:
    """At most one blank line in a row, no spaces at line ends, nothing around the whole."""
    text = "\n".join(line.rstrip(" \t") for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _parsed(source: str, clock: TimeLimit) -> BeautifulSoup:
    from bs4 import BeautifulSoup, UnusualUsageWarning
    from bs4.exceptions import ParserRejectedMarkup

    class Timed(BeautifulSoup):
        """Looks at the clock wherever the parser has found something."""

        def handle_starttag(self, *given: Any, **named: Any) -> Tag | None:
            clock.check()
            return super().handle_starttag(*given, **named)

        def handle_data(self, data: str) -> None:
            clock.check()
            super().handle_data(data)

    # Behind the last ">" no tag can end, and the parser would look for that from every "<".
    end = source.rfind(">") + 1
    source = source[:end] + source[end:].replace("<", "&lt;")
    with warnings.catch_warnings():  # about XHTML, and pages without a tag: both are read well
        warnings.simplefilter("ignore", UnusualUsageWarning)
        try:
            return Timed(source, "html.parser")
        except ParserRejectedMarkup:  # a declaration that is none: it is text
            return Timed(source.replace("<![", "&lt;!["), "html.parser")


def _pieces(soup: BeautifulSoup, clock: TimeLimit) -> list[tuple[str, _Place]]:
    """Text in its order, with line ends where a browser would show them, and where it stands."""
    from bs4.element import NavigableString, Tag

    controlled = _controlled(soup)
    pieces: list[tuple[str, _Place]] = []
    cells: dict[int, int] = {}  # by their row: where the last cell's end is in pieces
    articles = 0
    place = _Place()
    waiting: list[tuple[Any, _Place, bool]] = [(soup, place, False)]
    while waiting:
        node, place, left = waiting.pop()
        if not isinstance(node, Tag):
            # Comments and the like are subclasses of the plain string: they are no text.
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
        if name in _UNREAD:
            continue
        articles += name == "article"
        place = _entered(node, place, articles, controlled)
        if name in ("td", "th") and (at := cells.get(id(node.parent))) is not None:
            pieces[at] = (" | ", pieces[at][1])
        before = {"br": "\n", "li": "\n- ", "tr": "\n"}.get(name)
        if before or name in _BLOCKS:
            pieces.append((before or "\n\n", place))
        elif name == "button" and pieces and pieces[-1][0][-1:].strip():
            pieces.append((" ", place))  # buttons in a row are words in a row
        waiting.append((node, place, True))
        waiting += [(child, place, False) for child in reversed(node.contents)]
    return pieces


def _controlled(soup: BeautifulSoup) -> set[int]:
    """The elements, by ``id()``, that a control of the page shows: those that it names, and where
    it names none, the one behind it, or behind the heading that it is in."""
    from bs4.element import Tag

    named, found = set[str](), set[int]()
    for control in soup.find_all(True, {"aria-controls": True}):
        named.update(str(control["aria-controls"]).split())
    for panel in soup.find_all(True, {"hidden": True, "id": True}):
        if panel["id"] in named:
            found.add(id(panel))
    for control in soup.find_all(True, {"aria-expanded": True, "aria-controls": False}):
        for tag in (control, control.parent):
            behind = tag and next((one for one in tag.next_siblings if isinstance(one, Tag)), None)
            if behind is not None:
                found.add(id(behind))
                break
    return found


def _entered(tag: Tag, place: _Place, articles: int, controlled: set[int]) -> _Place:
    """The place inside of a tag that stands at ``place``: the same one, or one that differs."""
    changes: dict[str, Any] = {}
    hidden = tag.get("hidden")
    if hidden is not None and hidden != "until-found" and id(tag) not in controlled:
        changes["hidden"] = True
    unshown = (
        place.unshown
        or tag.get("aria-hidden") == "true"
        or _UNSHOWN.search(str(tag.get("style", ""))) is not None
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
            changes["aside"] = _Share()
        case "header" | "footer" if not (place.inner or place.main):
            changes["furniture"] = tag.name
        case "button" if place.form and tag.get("type") != "button":
            changes["furniture"] = "button"
        case name if name in _CONTROLS:
            changes["furniture"] = name
    changes = {key: value for key, value in changes.items() if getattr(place, key) != value}
    return replace(place, **changes) if changes else place


def _chosen(body: set[int], places: dict[int, _Place], sizes: Counter[int]) -> set[int]:
    """The part that the page says is its main one, where it is most of its text; else nothing."""
    part = {key for key in body if places[key].main}
    if not part:
        articles = {places[key].article for key in body} - {0}
        part = {key for key in body if places[key].article} if len(articles) == 1 else set()
    return part if 2 * _sum(part, sizes) >= _sum(body, sizes) else set()


def _why(places: dict[int, _Place], chosen: set[int], sizes: Counter[int]) -> str:
    parts = Counter[str]()
    for key in places.keys() - chosen:
        place = places[key]
        aside = "aside" if place.left_out else "beside its main part"
        parts["hidden" if place.hidden else place.furniture or aside] += sizes[key]
    named = ", ".join(f"{size:,} {name}" for name, size in parts.most_common() if size)
    return f"{named}. Look whether the page's text is all there, or save it as text."


def _size(text: str) -> int:
    return sum(map(len, text.split()))


def _sum(keys: set[int], sizes: Counter[int]) -> int:
    return sum(sizes[key] for key in keys)
