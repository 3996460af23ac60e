"""Every format is read as a person would read it, and every error message has a fix."""

from __future__ import annotations

import codecs
import io
import json
import os
import random
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pypdf import PdfReader, PdfWriter
from pypdf.errors import DependencyError
from pypdf.generic import ArrayObject, DictionaryObject, NameObject, TextStringObject

from ragcache.errors import SourceError
from ragcache.retriever import extraction, readers, record_readers
from ragcache.retriever.extraction import ExtractedText, Omitted
from ragcache.retriever.source import read
from ragcache.types import Document
from tests.retriever.conftest import pdf

Write = Callable[[str, str | bytes], Path]


def one(path: Path) -> Document:
    (document,) = read([path], root=path.parent)
    return document


def encrypted(password: str) -> bytes:
    writer, out = PdfWriter(PdfReader(io.BytesIO(pdf("Not for you")))), io.BytesIO()
    writer.encrypt(user_password=password, owner_password="owner", algorithm="RC4-128")
    writer.write(out)
    return out.getvalue()


def test_text(write: Write) -> None:
    path = write("a.txt", b"\xef\xbb\xbfOne\r\ntwo\rthree \x00 caf\xc3\xa9\n")
    document = one(path)
    assert document.text == "One\ntwo\nthree  café\n"
    assert (document.id, document.metadata) == ("a.txt", {"source": "a.txt", "format": "text"})


def test_empty_text_is_a_document(write: Write) -> None:
    assert one(write("a.txt", "")).text == ""


def test_markdown(write: Write) -> None:
    document = one(
        write(
            "a.md",
            "---\ndate: today\n---\n# The *lower* bridge\n\nIt **fell** in the [night](http://x.y "
            '"t").\nSee ![a boat](b.png) <!-- no --> `x * y`.\n\n- one\n- two\n  - deep\n\n'
            "3. three\n4. four\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n```py\nx = [1]\n```\n\n"
            "> quoted\n\n<div><b>bold</b></div>\n\nend &amp; \\*star\\*\n",
        )
    )
    assert document.text == (
        "# The lower bridge\n\nIt fell in the night. See a boat  `x * y`.\n\n"
        "- one\n- two\n  - deep\n\n3. three\n4. four\n\na | b\n1 | 2\n\n```py\nx = [1]\n```\n\n"
        "quoted\n\nbold\n\nend & *star*"
    )
    assert document.metadata["title"] == "The lower bridge"


def test_html_main_text(write: Write) -> None:
    document = one(
        write(
            "a.html",
            "<!doctype html><html><head><title>The\n mill</title><style>p{}</style></head><body>"
            "<header>Site</header><nav><ul><li>Home<nav>in</nav></li></ul></nav><main><h1>Apples"
            "</h1><p>Dry\n and <b>full</b><br>of apples.</p><!-- no --><script>x()</script>"
            "<ul><li>red</li><li>green</li></ul><table><tr><td>1</td><td>2</td></tr><tr><td>3</td>"
            "</tr></table><pre>a\n  b</pre><p hidden>secret</p></main><footer>(c)</footer></body>",
        )
    )
    assert document.text == (
        "The mill\n\nApples\n\nDry and full\nof apples.\n\n- red\n- green\n\n1 | 2\n3\n\na\n  b"
    )
    assert document.metadata["title"] == "The mill"


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("<p>only &eacute;</p>", "only é"),
        ("<title>T</title><p>x</p>", "T\n\nx"),
        ("<title>T</title><body><h1>T</h1><p>x</p></body>", "T\n\nx"),
        (
            "<body><header>h</header><article><header><h1>A</h1></header>x</article></body>",
            "A\n\nx",
        ),
        ("<body><article>a</article><article>b</article><footer>f</footer></body>", "a\n\nb"),
        ("<p>unclosed <b>bold <p>next", "unclosed bold\n\nnext"),
        ('<?xml version="1.0"?><html><body><p>x<br/>y</p></body></html>', "x\ny"),
        ("https://example.org", "https://example.org"),
        ("<p>a <![b</p><p>c", "a <![b\n\nc"),
        ("<div>" * 3000 + "deep", "deep"),
        ("", ""),
    ],
    ids=range(11),
)
def test_html_of_other_shapes(write: Write, page: str, text: str) -> None:
    assert one(write("a.htm", page)).text == text


def test_pdf(write: Write) -> None:
    document = one(write("a.PDF", pdf("First page.", "Second page.")))
    assert document.text == "First page.\n\nSecond page."
    assert document.metadata == {"source": "a.PDF", "format": "pdf"}


def test_pdf_with_an_empty_password_opens(write: Write) -> None:
    assert one(write("a.pdf", encrypted(""))).text == "Not for you"


def test_jsonl(write: Write) -> None:
    path = write(
        "a.jsonl",
        '\ufeff{"text": "one", "id": "x", "title": "T", "metadata": {"year": 1998, "by": "M"}}\n\n'
        '{"text": "two", "id": 7}\n{"text": "three \\ud800"}\n',
    )
    first, second, third = read([path], root=path.parent)
    assert (first.id, first.text) == ("a.jsonl#x", "T\n\none")
    assert first.metadata == {
        **{"source": "a.jsonl", "format": "jsonl"},
        **{"year": "1998", "by": "M", "title": "T"},
    }
    assert (second.id, second.text) == ("a.jsonl#7", "two")
    assert (third.id, third.text) == ("a.jsonl:4", "three \ufffd")


def test_langchain_documents_as_they_are_dumped(write: Write) -> None:
    from langchain_core.documents import Document
    from langchain_core.load import dumps

    given = Document("one", metadata={"source": "x.txt", "page": 3}, id="a")
    other = given.model_copy(update={"id": None, "page_content": "two"})
    lines = given.model_dump_json(), dumps(given.model_copy(update={"id": "b"}))
    path = write("a.jsonl", "\n".join([*lines, other.model_dump_json()]))
    read_back = list(read([path], root=path.parent))
    assert [d.id for d in read_back] == ["a.jsonl#a", "a.jsonl#b", "a.jsonl:3"]
    assert [d.text for d in read_back] == ["one", "one", "two"]
    assert read_back[0].metadata == {"source": "x.txt", "page": "3", "format": "jsonl"}


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = b'{"text": "one", "id": "a"}\nno\n{"text": "two"}\n'
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines)))
    errors: list[SourceError] = []
    found = list(read(["-"], on_error=errors.append))
    assert [(d.id, d.text) for d in found] == [("stdin#a", "one"), ("stdin:3", "two")]
    assert "standard input:2 is not valid JSON" in str(errors[0])


@pytest.fixture
def rows() -> list[dict[str, object]]:
    return [
        {"text": "one", "id": "a", "metadata": {"year": 1998}, "vector": [0.5]},
        {"text": "two", "id": "b", "metadata": {"year": 2001}, "vector": [0.25]},
    ]


@pytest.mark.parametrize("kind", ["stream", "file", "parquet"])
def test_arrow(tmp_path: Path, kind: str, rows: list[dict[str, object]]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.Table.from_pylist(rows)
    path = tmp_path / ("a.parquet" if kind == "parquet" else "a.arrow")
    if kind == "parquet":
        parquet.write_table(table, path)
    else:
        new = pyarrow.ipc.new_stream if kind == "stream" else pyarrow.ipc.new_file
        with new(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=1)
    found = list(read([path], root=tmp_path))
    assert [(d.id, d.text) for d in found] == [(f"{path.name}#a", "one"), (f"{path.name}#b", "two")]
    assert found[0].metadata["year"] == "1998" and "vector" not in found[0].metadata
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(SourceError, match="is not a readable"):
        list(read([path]))
    bare = tmp_path / "bare.parquet"
    parquet.write_table(pyarrow.table({"content": ["x"]}), bare)
    with pytest.raises(SourceError, match="no column text, only content"):
        list(read([bare]))


@pytest.mark.parametrize("split", [False, True])
def test_a_data_set_on_disk(tmp_path: Path, split: bool, rows: list[dict[str, object]]) -> None:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list(rows)
    whole = datasets.DatasetDict({"train": made, "test": made}) if split else made
    whole.save_to_disk(str(tmp_path / "set"))
    found = list(read([tmp_path / "set"]))
    assert [d.text for d in found] == ["one", "two"] * (2 if split else 1)


def test_without_pyarrow(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(SourceError, match=r'pip install "ragcache-fusion\[arrow\]"'):
        list(read([write("a.parquet", "")]))


def test_evaluation_set_holds_every_passage_once(write: Write) -> None:
    a, b = {"title": "A", "text": "one"}, {"title": "", "text": "two"}
    path = write("e.json", json.dumps([{"ctxs": [a, b], "question": "?"}, {"ctxs": [b, a, b]}]))
    first, second = read([path])
    assert (first.text, second.text) == ("A\n\none", "two")
    again = write("e.json", json.dumps([{"ctxs": [b, a]}]))
    assert [d.id for d in read([again])] == [second.id, first.id]  # order does not name them


def test_folder_is_read_sorted_without_hidden_and_foreign(write: Write, tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/.hidden.txt", ".git/c.txt", "a/x.bin", "a-b.txt"):
        write(f"docs/{name}", name)
    left: list[Omitted] = []
    found = read([tmp_path / "docs"], on_omitted=left.append)
    assert [d.id for d in found] == ["docs/a-b.txt", "docs/a/z.txt", "docs/b.txt"]
    assert len(left) == 1 and "1 of 4 files left out: 1 .bin. Only" in str(left[0])
    rooted = read(
        [tmp_path / "docs" / "b.txt", tmp_path / "docs"],
        root=tmp_path / "docs",
        on_omitted=left.append,
    )
    assert [d.id for d in rooted] == ["b.txt", "a-b.txt", "a/z.txt"]


def test_a_file_has_one_id_however_it_is_named(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write("docs/a.txt", "x")
    monkeypatch.chdir(tmp_path / "docs")
    ways: list[Path | str] = [
        tmp_path / "docs",
        ".",
        "../docs/",
        "./",
        file,
        "a.txt",
        "../docs/a.txt",
    ]
    assert {tuple(d.id for d in read([way])) for way in ways} == {("docs/a.txt",)}


def test_same_named_files_of_two_folders_are_two_documents(write: Write) -> None:
    paths = [write("a/readme.txt", "1").parent, write("b/readme.txt", "2").parent]
    assert [d.id for d in read(paths)] == ["a/readme.txt", "b/readme.txt"]


def test_two_documents_of_one_id_are_an_error(write: Write) -> None:
    paths = [write("a/docs/readme.txt", "1").parent, write("b/docs/readme.txt", "2").parent]
    with pytest.raises(SourceError, match=r"both name their documents docs/.*root"):
        read(paths)


def test_a_record_and_a_file_of_one_id_are_an_error(write: Write, tmp_path: Path) -> None:
    write("d/a.jsonl", '{"text": "x", "id": "b.txt"}')
    write("d/a.jsonl#b.txt", "y")
    with pytest.raises(SourceError, match=r"both be document 'd/a.jsonl#b.txt'"):
        list(read([tmp_path / "d"]))


def test_a_link_is_named_by_where_it_stands(write: Write, tmp_path: Path) -> None:
    """A mounted ConfigMap: its files are links into a folder that is switched by a link."""
    mount = tmp_path / "mount"
    for version in ("one", "two"):
        write(f"mount/..{version}/guide.txt", version)
    (mount / "..data").symlink_to("..one")
    (mount / "guide.txt").symlink_to("..data/guide.txt")
    (mount / "again.txt").symlink_to("guide.txt")  # the same file: read once
    before = [(d.id, d.text) for d in read([mount])]
    (mount / "..data").unlink()
    (mount / "..data").symlink_to("..two")
    after = [(d.id, d.text) for d in read([mount])]
    assert before == [("mount/again.txt", "one")] and after == [("mount/again.txt", "two")]
    (tmp_path / "current").symlink_to(mount)
    assert [d.id for d in read([tmp_path / "current"])] == ["current/again.txt"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xe9\x01", r"a.txt is not UTF-8 \(byte 0xe9 at offset 3\), and its enc"),
        ("a.md", b"\xff\xfea", r"a.md is not UTF-16-LE .*it is damaged. Get it"),
        ("a.doc", b"x", r"a.doc has no known format.*\.pdf"),
        ("a.pdf", b"", r"a.pdf is not a readable PDF"),
        ("a.pdf", b"%PDF-1.4 nothing", r"a.pdf is not a readable PDF.*qpdf"),
        ("a.pdf", pdf("Cut off")[:150], r"a.pdf is not a readable PDF"),
        ("a.pdf", pdf("", ""), r"a.pdf holds no text.*OCR"),
        ("a.pdf", encrypted("secret"), r"a.pdf is encrypted.*qpdf --decrypt"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a.jsonl:2 is not valid JSON"),
        ("a.jsonl", b'{"text": "\xe9"}\n', r"a.jsonl:1 is not UTF-8"),
        ("a.jsonl", '{"text": "très Café"}'.encode("cp1252"), "may be WINDOWS-1252: convert it"),
        ("a.jsonl", b'["x"]\n', r'a.jsonl:1 has no string "text"'),
        ("a.jsonl", b'{"text": 3}\n', r'a.jsonl:1 has no string "text"'),
        ("a.jsonl", b'{"text": "x", "id": [1]}\n', r'a.jsonl:1: "id" or "title" is not'),
        ("a.jsonl", b'{"text": "x", "metadata": 1}\n', r'a.jsonl:1: "metadata" is not'),
        ("a.jsonl", b'{"text":"x","id":1}\n{"text":"y","id":"1"}\n', r"a.jsonl#1' twice"),
        ("a.jsonl", b"[" * 100_000, r"a.jsonl:1 is not valid JSON"),
        ("a.json", b'{"name": "package"}', r"a.json is not an evaluation set.*\.jsonl"),
        ("a.json", b'[{"ctxs": [{"text": 1}]}]', r"a.json: question 0 has a malformed passage"),
        ("a.json", b'[{"ctxs": 5}]', r"a.json: question 0 has a malformed passage"),
        ("a.json", b"[", r"a.json is not valid JSON"),
    ],
)
def test_errors_say_what_and_where(write: Write, name: str, content: bytes, message: str) -> None:
    path = write(name, content)
    with pytest.raises(SourceError, match=message):
        list(read([path]))
    # and says the same when it is collected
    errors: list[SourceError] = []
    list(read([path], on_error=errors.append))
    assert len(errors) == 1 and re.search(message, str(errors[0]))


def test_aes_without_its_library_is_an_encrypted_file(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(stream: object) -> ExtractedText:
        raise DependencyError("cryptography>=3.1 is required for AES algorithm")

    monkeypatch.setattr(readers, "extract_pdf", refuse)
    with pytest.raises(SourceError, match="encrypted.*pip install cryptography"):
        one(write("a.pdf", pdf("x")))


def test_damaged_pdfs_never_raise_anything_else(write: Write) -> None:
    whole = pdf("Some page.", "Another page.")
    for at in range(0, len(whole), 7):
        path = write("a.pdf", whole[:at] + b"\xff(" + whole[at + 2 :])
        errors: list[SourceError] = []
        list(read([path], on_error=errors.append))
        assert len(errors) <= 1


def test_missing_path_is_noticed_before_anything_is_read(write: Write, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"gone.txt does not exist"):
        read([write("a.txt", "x"), tmp_path / "gone.txt"])  # not even iterated


def test_folder_without_documents_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="holds no document"):
        read([tmp_path])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_forbidden_file(write: Write) -> None:
    path = write("a.txt", "x")
    path.chmod(0)
    with pytest.raises(SourceError, match="cannot be read: Permission denied"):
        one(path)


def test_errors_can_be_collected(write: Write, tmp_path: Path) -> None:
    write("d/a.txt", b"\xff\x01")
    write("d/b.jsonl", '{"text": "one"}\nno\n{"text": "two"}\n')
    write("d/c.pdf", b"no")
    write("d/e.txt", "three")
    errors: list[SourceError] = []
    documents = read([tmp_path / "gone", tmp_path / "d"], on_error=errors.append)
    assert [d.text for d in documents] == ["one", "two", "three"]
    assert [str(e).split(str(tmp_path))[1].split()[0] for e in errors] == [
        *("/gone", "/d/a.txt", "/d/b.jsonl:2", "/d/c.pdf"),
    ]


def told(path: Path) -> tuple[Document, list[Omitted]]:
    """The document of a file, and what is said to be left out of it."""
    left: list[Omitted] = []
    (document,) = read([path], root=path.parent, on_omitted=left.append)
    return document, left


@pytest.mark.parametrize(
    ("source", "title", "text"),
    [
        ("---\n\nThe mill stands.\n\n---\n\nAnd more.\n", "", "The mill stands.\n\nAnd more."),
        ("---\n- one\n- two\n\n---\nx\n", "", "- one\n- two\n\nx"),
        ("---\ntitle: The mill\n---\nIt stands.\n", "The mill", "The mill\n\nIt stands."),
        ("---\ntitle: The mill\n---\n# The mill\n\nx\n", "The mill", "# The mill\n\nx"),
        ("---\ntitle: A\n---\n# B\n\nx\n", "A", "A\n\n# B\n\nx"),
        ('+++\ntitle = "The mill"\n+++\nIt stands.\n', "The mill", "The mill\n\nIt stands."),
        ("+++\nno toml\n+++\nx\n", "", "+++ no toml +++ x"),
        ("---\n---\nx\n", "", "x"),
    ],
    ids=range(8),
)
def test_front_matter_is_fields_and_nothing_else(
    write: Write, source: str, title: str, text: str
) -> None:
    document = one(write("a.md", source))
    assert document.metadata.get("title", "") == title
    assert document.text == text


def test_fields_of_front_matter_are_metadata(write: Write) -> None:
    fields = (
        "date: 2026-03-14\ntags: [mill, river]\nsource: x\nragcache: whole\ndeep: {a: [b, {c: d}]}"
    )
    document = one(write("a.md", f"---\n{fields}\n---\nx\n"))
    assert document.metadata == {
        **{"date": "2026-03-14", "tags": "mill, river", "source": "a.md", "format": "markdown"},
        "deep": '{"a": ["b", {"c": "d"}]}',
    }


def test_front_matter_of_aliases_is_text(write: Write) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    document = one(write("a.md", "\n".join(["---", *lines, "---", "The body."])))
    assert document.text.endswith("The body.") and "a0: &a0" in document.text
    assert set(document.metadata) == {"source", "format", "title"}


GUIDE = "<h1>The guide</h1>" + "<p>Turn the wheel until the water runs, then wait.</p>" * 20


@pytest.mark.parametrize(
    ("page", "wanted"),
    [
        (f"<body><form action=x>{GUIDE}</form></body>", "Turn the wheel"),
        ("<dl><dt><button>Who owns it?</button></dt><dd>Mira.</dd></dl>", "Who owns it?\n\nMira."),
        (
            "<button aria-controls=p1>Who owns it?</button><div id=p1 hidden>Mira.</div>",
            "Who owns it?\n\nMira.",
        ),
        (
            "<h3><button aria-expanded=false>Who owns it?</button></h3><div hidden>Mira.</div>",
            "Who owns it?\n\nMira.",
        ),
        (
            "<button aria-expanded=false>Who owns it?</button> <div hidden>Mira.</div>",
            "Who owns it?\n\nMira.",
        ),
        (f"<body><article>Buy a mill!</article><div>{GUIDE}</div></body>", "Turn the wheel"),
        (f"<body><main hidden>Sign in</main><div>{GUIDE}</div></body>", "Turn the wheel"),
        (f'<main style="display: none">Wait. {GUIDE}</main><p>Oil it.</p>', "Oil it."),
        (f"<div aria-hidden=true><article>{GUIDE}</article></div><p>Oil it.</p>", "Oil it."),
        (f'<main>{GUIDE}<div style="display:none">Oil it.</div></main>', "Oil it."),
        ("<p><button>Linux</button><button>macOS</button></p>", "Linux macOS"),
        (f"<main>{GUIDE}<aside>Mind the sluice.</aside></main>", "Mind the sluice."),
        ("<header><h1>All there is</h1></header>", "All there is"),
    ],
    ids=range(13),
)
def test_what_a_page_holds_is_not_lost_by_its_tags(write: Write, page: str, wanted: str) -> None:
    document, left = told(write("a.html", page))
    assert wanted in document.text and left == []


def test_what_only_serves_a_page_is_left_out(write: Write) -> None:
    page = (
        f"<form>{GUIDE}<select><option>Paris</select><button>Send</button></form>"
        "<aside><a href=x>Other mills</a> <a href=y>More mills</a></aside>"
    )
    document, left = told(write("a.html", page))
    assert not {"Paris", "Send", "mills"} & set(document.text.split()) and left == []


def test_a_page_of_which_most_is_left_out_is_told(write: Write) -> None:
    document, (left,) = told(write("a.html", f"<p>Short.</p><nav>{GUIDE}</nav>"))
    assert document.text == "Short."
    assert (left.kept, left.unit) == (6, "characters") and left.dropped > 500
    assert "nav. Check that the page's text is complete" in str(left)
    _, (left,) = told(write("a.md", f"text\n\n<div hidden>{GUIDE}</div>\n"))
    assert "hidden" in left.why


def filled(*, scan: bool) -> bytes:
    """A PDF of a form that is filled in, with a page that is a picture or none."""
    writer = PdfWriter(PdfReader(io.BytesIO(pdf("First page.", "", "Last page."))))
    field = DictionaryObject(
        {
            NameObject("/FT"): NameObject("/Tx"),
            NameObject("/T"): TextStringObject("owner"),
            NameObject("/TU"): TextStringObject("Who owns the mill"),
            NameObject("/V"): TextStringObject("Mira Holt"),
        }
    )
    form = DictionaryObject({NameObject("/Fields"): ArrayObject([writer._add_object(field)])})
    writer.root_object[NameObject("/AcroForm")] = form
    if scan:
        drawn = DictionaryObject({NameObject("/Im0"): DictionaryObject()})
        resources = DictionaryObject({NameObject("/XObject"): drawn})
        writer.pages[1][NameObject("/Resources")] = resources
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


def test_forms_and_scans_of_a_pdf(write: Write) -> None:
    document, (left,) = told(write("a.pdf", filled(scan=True)))
    assert document.text == "First page.\n\nLast page.\n\nWho owns the mill: Mira Holt"
    assert (left.dropped, left.kept, left.unit) == (1, 2, "pages")
    assert "page 2 holds a picture and no text" in left.why and "ocrmypdf" in left.why
    assert told(write("a.pdf", filled(scan=False)))[1] == []


def test_text_that_was_put_onto_a_page_of_a_pdf(write: Write) -> None:
    writer = PdfWriter(PdfReader(io.BytesIO(pdf("First page.", "Last page."))))
    put = {kind: TextStringObject(f"A {kind} note.") for kind in ("FreeText", "Text")}
    notes = [
        writer._add_object(
            DictionaryObject(
                {NameObject("/Subtype"): NameObject(f"/{kind}"), NameObject("/Contents"): text}
            )
        )
        for kind, text in put.items()
    ]
    writer.pages[0][NameObject("/Annots")] = ArrayObject(notes)
    writer.write(out := io.BytesIO())
    document = one(write("a.pdf", out.getvalue()))
    assert document.text == "First page.\nA FreeText note.\n\nLast page."


def test_json_of_other_kinds_in_a_folder_is_told(write: Write, tmp_path: Path) -> None:
    write("d/a.txt", "x")
    write("d/package.json", '{"name": "x"}')
    write("d/tsconfig.json", "{ // no JSON\n}")
    left: list[Omitted] = []
    assert [d.text for d in read([tmp_path / "d"], on_omitted=left.append)] == ["x"]
    assert [str(o.place).rsplit("/")[-1] for o in left] == ["package.json", "tsconfig.json"]
    with pytest.raises(SourceError, match="is not an evaluation set"):
        list(read([tmp_path / "d" / "package.json"]))


def test_without_a_listener_it_is_logged(
    write: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write("d/a.txt", "x")
    write("d/b.doc", "x")
    assert len(list(read([tmp_path / "d"]))) == 1
    assert "1 of 2 files left out: 1 .doc" in caplog.text


JAPANESE = "日本語のテキストです。東京は大きい都市です。"


@pytest.mark.parametrize(
    ("name", "raw", "text"),
    [
        ("a.txt", JAPANESE.encode("utf-16"), JAPANESE),
        ("a.md", codecs.BOM_UTF16_BE + JAPANESE.encode("utf-16-be"), JAPANESE),
        ("a.txt", JAPANESE.encode("utf-32"), JAPANESE),
        ("a.html", b"<meta charset=Shift_JIS><p>" + JAPANESE.encode("cp932"), JAPANESE),
        ("a.html", b"<meta charset=iso-2022-jp><p>" + JAPANESE.encode("iso2022_jp"), JAPANESE),
        ("a.html", b"<meta charset=iso-8859-1><p>caf\xe9 \x80", "café €"),
        ("a.html", "<meta charset=iso-8859-1><p>café".encode(), "café"),
        ("a.html", b"<meta charset=utf-16><p>caf\xc3\xa9", "café"),
        ("a.html", b"<meta charset=rot13><p>x", "x"),
        ("a.jsonl", '{"text": "日本"}\n{"text": "x"}'.encode("utf-16"), "日本"),
    ],
    ids=range(10),
)
def test_encodings_that_a_file_names(write: Write, name: str, raw: bytes, text: str) -> None:
    path = write(name, raw)
    assert next(iter(read([path]))).text == text


@pytest.mark.parametrize(
    ("raw", "guess"),
    [
        (JAPANESE.encode("cp932"), "CP932"),
        (JAPANESE.encode("euc_jp"), "EUC-JP"),
        ("Привет, как дела? Это текст".encode("cp1251"), "WINDOWS-1251"),
        ("Café au lait, un très bon déjeuner à la crème".encode("cp1252"), "WINDOWS-1252"),
        ("Die Straße ist für Fußgänger mäßig früh geöffnet".encode("cp1252"), "WINDOWS-1252"),
        ("Zażółć gęślą jaźń, a potem źle śpij w łódce".encode("cp1250"), "WINDOWS-1250"),
        ("Привет, как дела? Это текст".encode("koi8_r"), "KOI8-R"),
        (f"{JAPANESE}\n{JAPANESE} a b\n".encode("utf-16-le"), "UTF-16LE"),
    ],
    ids=range(8),
)
def test_other_encodings_are_guessed(write: Write, raw: bytes, guess: str) -> None:
    document = one(write("a.txt", raw))
    assert document.text == raw.decode(guess) and document.metadata["encoding"] == guess
    record = b'{"text": "' + raw.replace(b"\n", b" ") + b'"}'
    with pytest.raises(SourceError, match="is not UTF-8|is not valid JSON"):  # of one line: none
        one(write("a.jsonl", record))


def test_what_is_no_text_is_not_guessed(write: Write) -> None:
    raw = random.Random(0).randbytes(4096).replace(b"\0", b"\xff")
    with pytest.raises(
        SourceError, match="is not UTF-8 .*its encoding cannot be guessed. Save it as UTF-8"
    ):
        one(write("a.txt", raw))


def test_any_metadata_of_a_record_is_read(write: Write) -> None:
    keys = "title", "name", "text", "id", "heading", "source"
    lines = [json.dumps({"text": "one", "metadata": {key: key}}) for key in keys]
    found = list(read([write("a.jsonl", "\n".join(lines))]))
    assert [document.metadata[key] for document, key in zip(found, keys, strict=True)] == list(keys)
    assert {document.text for document in found} == {"one"}


HOSTILE = {
    "li": "<li>x" * 20_000,
    "br": "<br>" * 30_000,
    "pre": "<pre>" + " " * 100_000 + "x</pre>",
    "b": "<b>" * 10_000 + "x",
    "td": "<td>x" * 10_000,
    "cells": "<table><tr>" + "<td>x</td>" * 10_000,
    "asides": "<aside>x" * 10_000,
    "open tags": "<a " * 30_000,
}


@pytest.mark.parametrize("page", HOSTILE.values(), ids=HOSTILE)
def test_pages_take_time_by_their_length(write: Write, page: str) -> None:
    path = write("a.html", page)
    began = time.process_time()
    one(path)
    assert (
        time.process_time() - began < 6
    )  # below one on an idle machine; far more where it was quadratic


@pytest.mark.parametrize("source", ["```\n" + " " * 100_000 + "x\n```", " " * 100_000 + "x"])
def test_markdown_takes_time_by_its_length(write: Write, source: str) -> None:
    path = write("a.md", source)
    began = time.process_time()
    assert "x" in one(path).text
    assert time.process_time() - began < 3


@pytest.mark.parametrize(
    "fields",
    [
        "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{f'*a{n - 1}, ' * 9}]\n" for n in range(1, 30)),
        "a0: &a0 {x: y}\n"
        + "".join(f"a{n}: &a{n}\n  <<: [{f'*a{n - 1}, ' * 9}]\n" for n in range(1, 30)),
        f"a: 0x{'F' * 10_000}\n",
        f"a: {'[' * 5000}\n",
    ],
    ids=["aliases", "merged aliases", "digits", "brackets"],
)
def test_front_matter_that_becomes_far_more_is_text(write: Write, fields: str) -> None:
    path = write("a.md", f"---\n{fields}---\n# A heading\n")
    began = time.process_time()
    found = one(path)
    assert time.process_time() - began < 3
    assert "a" not in found.metadata and fields[:2] in found.text and "A heading" in found.text


def test_front_matter_takes_its_documents_time(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extraction, "MAX_SECONDS", 0.05)
    with pytest.raises(SourceError, match="takes more than 0.05 s"):
        one(write("a.md", "---\n" + "a: b\n" * 20_000 + "---\nText.\n"))


@pytest.mark.parametrize("name", ["a.html", "a.md", "a.pdf"])
def test_time_is_bounded(write: Write, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(extraction, "MAX_SECONDS", -1.0)
    path = write(name, pdf("One page.") if name == "a.pdf" else "one <b>two</b>\n")
    with pytest.raises(SourceError, match="is too much to read: it takes more than -1 s"):
        one(path)


def test_size_is_bounded(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (readers, record_readers):
        monkeypatch.setattr(module, "MAX_BYTES", 20)
    with pytest.raises(SourceError, match="is too much to read: it has more than"):
        one(write("a.txt", "x" * 21))
    with pytest.raises(SourceError, match="is too much to read: a line of it has more"):
        one(write("a.jsonl", json.dumps({"text": "x" * 21})))


@pytest.mark.parametrize("column", ["text", "id"])
def test_a_parquet_file_that_becomes_far_more_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, column: str
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    monkeypatch.setattr(record_readers, "MAX_BYTES", 1 << 20)
    texts = ["x" * 10_000] * 20_000  # 200 MB of what is some KiB
    table = pyarrow.table({"text": texts if column == "text" else ["y"] * 20_000, "id": texts})
    parquet.write_table(table, tmp_path / "a.parquet", compression="zstd")
    errors: list[SourceError] = []
    found = list(read([tmp_path / "a.parquet"], on_error=errors.append))
    assert len(found) < 2000
    assert "is too much to read: its rows have more than 100 times" in str(errors[-1])


def test_links_that_lead_to_nothing_are_told_of(tmp_path: Path) -> None:
    (tmp_path / "a.md").symlink_to("gone.md")
    with pytest.raises(SourceError, match=r"a\.md is a broken link"):
        list(read([tmp_path]))
    (tmp_path / "b.md").write_text("Mira Holt paints.")
    (tmp_path / ".c.md").symlink_to("gone.md")
    left: list[Omitted] = []
    assert [one.text for one in read([tmp_path], on_omitted=left.append)] == ["Mira Holt paints."]
    assert (left[0].dropped, left[0].kept) == (1, 1) and "a.md" in left[0].why


def test_files_outside_the_root_or_without_permission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(SourceError, match="Set root above it"):
        list(read([tmp_path / "a.txt"], root=tmp_path / "below"))

    def refuse(self: Path, *_: Any, **__: Any) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(SourceError, match="Permission denied. Check its permissions"):
        list(read([tmp_path / "a.txt"]))
