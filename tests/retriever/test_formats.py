"""Office files, tables, books, messages and source code are read by value, and bombs are not."""

from __future__ import annotations

import io
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import pytest

from ragcache.errors import SourceError
from ragcache.retriever import archive, extraction, office_readers, suffixes, tables
from ragcache.retriever.extraction import Omitted
from ragcache.retriever.source import read
from ragcache.types import Document
from tests.retriever.office_files import docx, epub, paragraph, table, xlsx, zipped

Write = Callable[[str, str | bytes], Path]
OLE = bytes.fromhex("d0cf11e0a1b11ae1") + bytes(504)


def told(path: Path) -> tuple[list[Document], list[Omitted]]:
    """The documents of a file, and what is said to be left out of it."""
    left: list[Omitted] = []
    return list(read([path], root=path.parent, on_omitted=left.append)), left


def one(path: Path) -> Document:
    (document,), left = told(path)
    assert not left
    return document


def test_word(write: Write) -> None:
    body = (
        paragraph("The mill", "Heading1")
        + paragraph("It *grinds* apples &amp; corn_flour. # Really")
        + table([["Name", "City"], ["Mira", "Oslo | N"]])
        + paragraph("The river", "Heading2")
        + paragraph("1. It rose.")
    )
    document = one(write("a.docx", docx(body)))
    assert document.text == (
        "# The mill\n\nIt *grinds* apples & corn_flour. # Really\n\nName | City\n"
        "Mira | Oslo | N\n\n## The river\n\n1. It rose."
    )
    assert document.metadata == {"source": "a.docx", "format": "docx", "title": "The mill"}


def test_tracked_changes_of_word_count_as_accepted(write: Write) -> None:
    body = (
        "<w:p><w:r><w:t>It has </w:t></w:r><w:del><w:r><w:delText>two</w:delText></w:r></w:del>"
        "<w:ins><w:r><w:t>three wheels.</w:t></w:r></w:ins></w:p>"
        f"<w:sdt><w:sdtContent>{paragraph('A control.')}</w:sdtContent></w:sdt>"
    )
    assert one(write("a.docx", docx(body))).text == "It has three wheels.\n\nA control."


def test_files_inside_of_a_file_are_counted(write: Write) -> None:
    inner = zipped({"a.txt": "never read"})
    raw = docx(paragraph("Text."), more={"word/embeddings/a.zip": inner})
    (document,), (left,) = told(write("a.docx", raw))
    assert document.text == "Text."
    assert (left.dropped, left.unit) == (1, "files") and "word/embeddings/a.zip" in left.why


def test_slides(write: Write) -> None:
    pptx = pytest.importorskip("pptx")
    from pptx.chart.data import CategoryChartData
    from pptx.enum.chart import XL_CHART_TYPE

    deck, out = pptx.Presentation(), io.BytesIO()
    slide = deck.slides.add_slide(deck.slide_layouts[1])
    slide.shapes.title.text = "The mill"
    slide.placeholders[1].text = "It grinds\nApples"
    slide.placeholders[1].text_frame.paragraphs[1].level = 1
    grid = slide.shapes.add_table(2, 2, 0, 0, 9, 9).table
    for number, text in enumerate(("Name", "City", "Mira", "Oslo")):
        grid.cell(number // 2, number % 2).text = text
    inner = slide.shapes.add_group_shape().shapes.add_textbox(0, 0, 9, 9)
    inner.text_frame.text = "in a group"
    slide.notes_slide.notes_text_frame.text = "Say hello."
    deck.slides.add_slide(deck.slide_layouts[6])
    data: Any = cast(Any, CategoryChartData)()
    data.categories = ["x"]
    data.add_series("s", (1,))
    slide.shapes.add_chart(XL_CHART_TYPE.PIE, 0, 0, 9, 9, data)
    deck.save(out)
    (document,), (left, sheet) = told(write("a.pptx", out.getvalue()))
    assert document.text == (
        "## The mill\n\nIt grinds\n  - Apples\n\nName | City\nMira | Oslo\n\nin a group\n\n"
        "Notes: Say hello."
    )
    assert document.metadata["title"] == "The mill"
    assert (left.dropped, left.unit) == (1, "shapes") and "embeddings" in sheet.why


def test_sheets(write: Write) -> None:
    sheets: dict[str, list[list[Any]]] = {
        "Prices": [
            *(["Prices of 2026"], ["Fruit", "Price", "Since"]),
            *(["Apple", 1.5, datetime(2026, 3, 14)], [], ["Pear", None, datetime(2026, 1, 2, 3)]),
        ],
        "Empty": [],
        "Numbers": [[1, 2], [3, None]],
    }
    found, left = told(write("a.xlsx", xlsx(sheets)))
    assert [(d.id, d.text) for d in found] == [
        (
            "a.xlsx#Prices",
            "Prices\n\nPrices of 2026\n\nFruit: Apple\nPrice: 1.5\nSince: 2026-03-14\n\n"
            "Fruit: Pear\nSince: 2026-01-02 03:00:00",
        ),
        ("a.xlsx#Numbers", "Numbers\n\n1 | 2\n\n3"),
    ]
    assert found[0].metadata["sheet"] == "Prices" and left == []


def test_formulas_without_results_are_counted(write: Write) -> None:
    (_,), (left,) = told(write("a.xlsx", xlsx({"S": [["a", "b"], ["x", "=1+1"]]})))
    assert (left.dropped, left.kept, left.unit) == (1, 3, "cells")
    assert "formulas have no stored results" in left.why


@pytest.mark.parametrize(
    ("name", "raw", "text"),
    [
        ("a.csv", "name,city\nMira,Oslo\nJon,\n", "name: Mira\ncity: Oslo\n\nname: Jon"),
        ("a.csv", "name;price\nApple;1,5\n;2,5\n", "name: Apple\nprice: 1,5\n\nprice: 2,5"),
        ("a.csv", "name|city\nMira|Oslo\n", "name: Mira\ncity: Oslo"),
        ("a.tsv", "name\tcity\nMira\tOslo, N\n", "name: Mira\ncity: Oslo, N"),
        ("a.csv", 'a,b\n"one\ntwo","say ""x"""\n', 'a: one two\nb: say "x"'),
        ("a.csv", "a,b\n1,2,3\n", "a | b\n\n1 | 2 | 3"),  # no names for all columns
        ("a.csv", "1,2\n3,4\n", "1 | 2\n\n3 | 4"),
        ("a.csv", "a,b\n", "a | b"),
        ("a.csv", "only\none\n", "only\n\none"),
        ("a.csv", "", ""),
        ("a.csv", b"\xef\xbb\xbfa,b\r\n1,2\r\n", "a: 1\nb: 2"),
        ("a.csv", "a,ü\n1,2\n".encode("utf-16"), "a: 1\nü: 2"),
        ("a.csv", "a,ü\n1,2\n".encode("utf-16-le"), "a: 1\nü: 2"),
        ("a.csv", "Name;Größe\nMüller;3 €\n".encode("cp1252"), "Name: Müller\nGröße: 3 €"),
    ],
    ids=range(14),
)  # fmt: skip
def test_tables(write: Write, name: str, raw: str | bytes, text: str) -> None:
    assert one(write(name, raw)).text == text


def test_a_table_of_any_length_is_read_in_parts(write: Write) -> None:
    rows = "".join(f"row {n},{n}\n" for n in range(100_000))
    path = write("a.csv", f"name,value\n{rows}")
    tracemalloc.start()
    try:
        found = [(d.id, d.text[-26:]) for d in read([path], root=path.parent)]
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert [label for label, _ in found[:2]] == ["a.csv", "a.csv:1001"] and len(found) == 100
    assert found[1][1] == "name: row 1999\nvalue: 1999"


def test_what_is_no_table(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SourceError, match=r"a\.csv:2 is not valid CSV: field larger .*quotes"):
        one(write("a.csv", 'a,b\n"' + "x" * 200_000))
    with pytest.raises(SourceError, match="is not UTF-8 .*cannot be guessed"):
        one(write("a.csv", bytes(range(128, 256)) * 99))
    monkeypatch.setattr(tables, "MAX_BYTES", 20)
    with pytest.raises(SourceError, match="too much to read: 2 rows of it have more than"):
        one(write("a.csv", "name,value\nsomething,1\nmore,2\n"))


def test_books(write: Write) -> None:
    pages = [
        "<html><body><h1>One</h1><p>First.</p></body></html>",
        '<?xml version="1.0"?><!DOCTYPE html><html><body><p>Zweites, schön.</p></body></html>',
    ]
    about = "<dc:title>The mill</dc:title><dc:creator>Mira</dc:creator><dc:creator>Jon</dc:creator>"
    document = one(write("a.epub", epub(pages, about + "<dc:language>en</dc:language>")))
    assert document.text == "The mill\n\nZweites, schön.\n\nOne\n\nFirst."  # in the spine's order
    assert document.metadata == {
        **{"source": "a.epub", "format": "epub", "title": "The mill"},
        **{"author": "Mira, Jon", "language": "en"},
    }


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (epub(["<img src=a.png>"]), "holds no text.*ocrmypdf"),
        (zipped({"a.txt": "x"}), "is not a readable EPUB: 'META-INF/container.xml'"),
        (
            epub(["<p>x"], more={"META-INF/encryption.xml": '<e><c URI="O/c%200.xhtml"/></e>'}),
            "is protected against copying",
        ),
        (
            epub(["<p>x"], more={"META-INF/container.xml": "<container/>"}),
            "is not a readable EPUB: it names no package",
        ),
    ],
    ids=range(4),
)
def test_books_without_text(write: Write, raw: bytes, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        one(write("a.epub", raw))


def test_chapters_that_are_missing_are_counted(write: Write) -> None:
    raw = epub(["<p>x", "<p>y"])
    with zipfile.ZipFile(io.BytesIO(raw)) as book:
        members = {n: book.read(n) for n in book.namelist() if n != "O/c 1.xhtml"}
    (document,), (left,) = told(write("a.epub", zipped(members)))
    assert document.text == "x" and (left.dropped, left.kept, left.unit) == (1, 1, "parts")


MAIL = """From: Mira Holt <mira@example.org>
To: jon@example.org
Subject: =?utf-8?q?The_M=C3=BChle?=
Date: Sat, 14 Mar 2026 10:00:00 +0100
MIME-Version: 1.0
Content-Type: multipart/mixed; boundary=b

--b
Content-Type: multipart/alternative; boundary=c

--c
Content-Type: text/plain; charset=iso-8859-1

Café at noon.
--c
Content-Type: text/html

<p>Something else</p>
--c--
--b
Content-Type: application/pdf
Content-Disposition: attachment; filename=a.pdf

x
--b--
"""


def test_messages(write: Write) -> None:
    (document,), (left,) = told(write("a.eml", MAIL.encode("latin-1")))
    assert document.text == "The Mühle\n\nCafé at noon."
    assert document.metadata == {
        **{"source": "a.eml", "format": "mail", "title": "The Mühle"},
        **{"from": "Mira Holt <mira@example.org>", "to": "jon@example.org"},
        "date": "2026-03-14T10:00:00+01:00",
    }
    assert (left.dropped, left.kept, left.unit) == (1, 1, "parts") and "a.pdf" in left.why


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"Subject: x\nContent-Type: text/html\n\n<p>only <b>html", "x\n\nonly html"),
        (b"Subject: x\nContent-Type: text/plain; charset=nope\n\ncaf\xc3\xa9", "x\n\ncafé"),
        (b"Date: never\n\nno subject", "no subject"),
        (b"Subject: x\nContent-Type: image/png\n\nx", "x"),
        (b"Subject: " + b"x" * 20_000 + b"\n\ny", "x" * 10_000 + "\n\ny"),
    ],
    ids=range(5),
)
def test_messages_of_other_shapes(write: Write, raw: bytes, text: str) -> None:
    assert told(write("a.eml", raw))[0][0].text.strip() == text


def test_a_damaged_message(write: Write) -> None:
    nested = b"".join(
        b"Content-Type: multipart/mixed; boundary=b%d\n\n--b%d\n" % (n, n) for n in range(3000)
    )
    with pytest.raises(SourceError, match="is not a readable message.*Save its text as .txt"):
        one(write("a.eml", nested))


def test_source_code_is_read_as_it_is(write: Write) -> None:
    code = "def f():\n\n\n    return 1  # é\n"
    document = one(write("a.py", code))
    assert document.text == code
    assert document.metadata == {"source": "a.py", "format": "code"}
    declared = '<?xml version="1.0" encoding="iso-8859-1"?><a>é</a>'
    assert one(write("a.xml", declared.encode("latin-1"))).text == declared


ENTITIES = '<!DOCTYPE d [<!ENTITY a "ha"><!ENTITY b "&a;&a;">]>'
OUTSIDE = '<!DOCTYPE d [<!ENTITY a SYSTEM "file:///etc/hostname">]>'


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("a.docx", b"x", r"is not a readable \.docx file: File is not a zip file.*get it again"),
        ("a.docx", docx("", "<no xml"), r"is not a readable \.docx file.*is not XML"),
        ("a.docx", docx("", '<?xml version="1.0" encoding="no"?>'), "unknown encoding: no"),
        ("a.docx", docx("")[:300], r"is not a readable \.docx file"),
        ("a.docx", zipped({"a.xml": "<a/>"}), r"is not a readable \.docx file.*save it again with"),
        ("a.pptx", docx(paragraph("x")), r"is not a readable \.pptx file"),
        ("a.xlsx", docx(paragraph("x")), r"is not a readable \.xlsx file"),
        ("a.xlsx", xlsx({"S": []}), "holds no text: all of its sheets are empty"),
        ("a.docx", docx("", more={"word/media/a.png": b"x"}), "holds no text, and 1 pic.*ocr"),
        ("a.docx", OLE + "EncryptedPackage".encode("utf-16-le"), "is encrypted. Save a copy"),
        ("a.xlsx", OLE, "has the format of Office before 2007.*Save it as .xlsx"),
        ("a.docx", docx(paragraph("&b;"), ENTITIES), "is refused: word/document.xml in it decl"),
        ("a.docx", docx(paragraph("&a;"), OUTSIDE), "is refused: word/document.xml in it decl"),
        ("a.docx", docx(paragraph("x" * 3_000_000)), "document.xml in it expands to more than 200"),
        ("a.docx", docx("<w:sdt><w:sdtContent>" * 3000), r"is not a readable \.docx file"),
    ],
    ids=range(15),
)  # fmt: skip
def test_hostile_and_damaged_files(write: Write, name: str, raw: bytes, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        one(write(name, raw))


def test_an_encrypted_member(write: Write) -> None:
    raw = bytearray(docx(paragraph("x")))
    at = raw.index(b"PK\x01\x02")
    raw[at + 8] |= 1  # the flag of its first member, in the directory
    with pytest.raises(SourceError, match="is encrypted. Save a copy of it without a password"):
        one(write("a.docx", bytes(raw)))


def test_what_an_archive_says_of_its_sizes_is_not_believed(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "_ANY_RATIO", 1000)
    raw = docx(paragraph("x" * 100_000))
    whole = zipfile.ZipFile(io.BytesIO(raw)).getinfo("word/document.xml").file_size
    false = raw.replace(whole.to_bytes(4, "little"), (16).to_bytes(4, "little"))
    assert false != raw
    with pytest.raises(SourceError):
        one(write("a.docx", false))


def test_archives_are_bounded(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    many = zipped({f"word/{n}.xml": "<a/>" for n in range(20)})
    monkeypatch.setattr(archive, "MAX_MEMBERS", 10)
    with pytest.raises(SourceError, match="it has more than 10 members"):
        one(write("a.docx", many))
    monkeypatch.setattr(office_readers, "MAX_BYTES", 50)
    with pytest.raises(SourceError, match="it expands to more than 0 MiB"):
        one(write("a.docx", docx(paragraph("x"))))
    with pytest.warns(UserWarning, match="Duplicate name"):
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as twice:
            twice.writestr("a.xml", "<a/>")
            twice.writestr("a.xml", "<b/>")
    with pytest.raises(SourceError, match="two of its members have one name"):
        one(write("a.docx", out.getvalue()))
    with zipfile.ZipFile(out := io.BytesIO(), "w", zipfile.ZIP_BZIP2) as other:
        other.writestr("a.xml", "<a/>")
    with pytest.raises(SourceError, match="is compressed by another method"):
        one(write("a.docx", out.getvalue()))


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("a.docx", docx(paragraph("x"))),
        ("a.xlsx", xlsx({"S": [["a"]]})),
        ("a.epub", epub(["<p>x"])),
        ("a.csv", b"a,b\n"),
        ("a.eml", b"Content-Type: text/html\n\n<p>x"),
    ],
)
def test_time_is_bounded(
    write: Write, monkeypatch: pytest.MonkeyPatch, name: str, raw: bytes
) -> None:
    monkeypatch.setattr(extraction, "MAX_SECONDS", -1.0)
    monkeypatch.setattr(extraction, "MAX_TABLE_SECONDS", -1.0)
    with pytest.raises(SourceError, match="is too much to read: it takes more than -1 s"):
        one(write(name, raw))


def test_without_their_libraries(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("d/a.txt", "x")
    file = write("d/a.docx", docx(paragraph("x")))
    write("only/a.docx", b"x")
    monkeypatch.setattr(suffixes, "find_spec", lambda name: None)
    with pytest.raises(
        SourceError,
        match=r'a\.docx needs mammoth and markdownify.*pip install "ragcache-fusion\[formats\]"',
    ):
        one(file)
    (document,), (left,) = told(tmp_path / "d")
    assert document.text == "x"
    assert "1 of 2 files left out: 1 .docx. Run `pip install" in str(left)
    with pytest.raises(SourceError, match=r"holds no document.*formats\]\"` to have 1 \.docx read"):
        told(tmp_path / "only")


def test_what_needs_no_library_imports_none() -> None:
    heavy = {"mammoth", "pptx", "openpyxl", "lxml", "PIL", "markdownify"}
    import subprocess

    code = f"import sys, ragcache.retriever.source; print(set(sys.modules) & {heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
