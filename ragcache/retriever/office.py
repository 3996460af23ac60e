"""Extract the text of Office files as Markdown: Word (mammoth), PowerPoint (python-pptx).

Headings, lists and tables keep their marks, as those of Markdown files do. Each function raises
what its library raises, which for damaged files is almost any built-in error, and LimitExceeded
once the time of ``clock`` is over.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import IO, TYPE_CHECKING, Any

from ragcache.retriever.extraction import ExtractedText, TimeLimit
from ragcache.retriever.formats import extract_markdown
from ragcache.retriever.webpage import collapse_blank_lines

if TYPE_CHECKING:
    from pptx.shapes.base import BaseShape
    from pptx.slide import Slide

#: Word's styles that mammoth does not know as headings.
_STYLES = "p[style-name='Title'] => h1:fresh\np[style-name='Subtitle'] => h2:fresh"


def extract_docx(stream: IO[bytes], clock: TimeLimit) -> ExtractedText:
    """The body, footnotes and text boxes of a Word file; the title is that of its first heading.

    Changes that are tracked count as accepted. Headers, footers and comments are left out, and of
    pictures all but their descriptions.
    """
    import mammoth
    from markdownify import markdownify

    def describe(picture: Any) -> dict[str, str]:
        clock.check()
        return {"src": ""}

    page = mammoth.convert_to_html(
        stream,
        style_map=_STYLES,
        convert_image=mammoth.images.img_element(describe),
        include_embedded_style_map=False,
    )
    clock.check()
    marked = markdownify(
        page.value, heading_style="ATX", bullets="-", table_infer_header=True, escape_misc=True
    )
    return extract_markdown(marked, clock)


def extract_pptx(stream: IO[bytes], clock: TimeLimit) -> ExtractedText:
    """The slides in order: the title as a heading, the texts, the tables, and the speaker's notes.

    The title is that of the first slide with one. ``dropped`` counts charts and diagrams.
    """
    from pptx import Presentation

    slides, title = list[str](), ""
    dropped = kept = 0
    for slide in Presentation(stream).slides:
        heading = slide.shapes.title
        named = " ".join(heading.text_frame.text.split()) if heading is not None else ""
        title = title or named
        pieces = [f"## {named}"] if named else []
        for shape in _shapes(slide.shapes):
            clock.check()
            if heading is not None and shape.shape_id == heading.shape_id:
                continue
            drawn = getattr(shape, "has_chart", False) or _is_diagram(shape)
            dropped, kept = dropped + drawn, kept + (not drawn)
            pieces += _text_of(shape)
        pieces += _notes(slide)
        slides.append("\n\n".join(pieces))
    why = (
        "charts and diagrams. Export the file as PDF if their texts matter, and index that."
        if dropped
        else ""
    )
    text = collapse_blank_lines("\n\n".join(slides))
    return ExtractedText(title, text, dropped, kept, "shapes", why)


def _shapes(shapes: Iterable[BaseShape]) -> Iterator[BaseShape]:
    """The shapes, with those of groups in place of their group."""
    waiting = list(shapes)[::-1]
    while waiting:
        shape = waiting.pop()
        inner = getattr(shape, "shapes", None)
        if inner is None:
            yield shape
        else:
            waiting += list(inner)[::-1]


def _is_diagram(shape: BaseShape) -> bool:
    return any(
        "/diagram" in str(one.get("uri", "")) for one in shape.element.iter("{*}graphicData")
    )


def _text_of(shape: Any) -> Iterator[str]:
    if shape.has_text_frame:
        lines = (
            "  " * paragraph.level + ("- " if paragraph.level else "") + text
            for paragraph in shape.text_frame.paragraphs
            if (text := " ".join(paragraph.text.split()))
        )
        yield "\n".join(lines)
    elif shape.has_table:
        rows = (
            " | ".join(" ".join(cell.text.split()) for cell in row.cells)
            for row in shape.table.rows
        )
        yield "\n".join(rows)


def _notes(slide: Slide) -> Iterator[str]:
    if slide.has_notes_slide:
        frame = slide.notes_slide.notes_text_frame
        if frame is not None and (text := frame.text.strip()):
            yield f"Notes: {text}"
