"""Every format is read as a person would read it, and every fault is told with its fix."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pypdf import PdfReader, PdfWriter
from pypdf.errors import DependencyError

from ragcache.errors import SourceError
from ragcache.retriever import readers
from ragcache.retriever.source import read
from ragcache.types import Document
from tests.retriever.conftest import pdf

Write = Callable[[str, str | bytes], Path]


def one(path: Path) -> Document:
    (document,) = read([path])
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
        ("<div>" * 3000 + "deep", "deep"),
        ("", ""),
    ],
    ids=range(10),
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
    first, second, third = read([path])
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
    read_back = list(read([path]))
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
    found = list(read([path]))
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
    assert [d.id for d in read([tmp_path / "docs"])] == ["a-b.txt", "a/z.txt", "b.txt"]
    rooted = read([tmp_path / "docs" / "b.txt", tmp_path / "docs"], root=tmp_path)
    assert [d.id for d in rooted] == ["docs/b.txt", "docs/a-b.txt", "docs/a/z.txt"]


def test_ids_do_not_depend_on_the_working_directory(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("docs/a/b.txt", "x")
    monkeypatch.chdir(tmp_path / "docs")
    assert [d.id for d in read([Path(".")])] == [d.id for d in read([tmp_path / "docs"])]


def test_two_documents_of_one_id_are_an_error(write: Write) -> None:
    paths = [write("a/readme.txt", "1").parent, write("b/readme.txt", "2").parent]
    with pytest.raises(SourceError, match=r"both be document 'readme.txt'.*root"):
        list(read(paths))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xe9", r"a.txt is not UTF-8 \(byte 0xe9 at offset 3\).*iconv"),
        ("a.md", b"\xff\xfea", r"a.md is not UTF-8"),
        ("a.docx", b"x", r"a.docx is of no known format.*\.pdf"),
        ("a.pdf", b"", r"a.pdf is not a readable PDF"),
        ("a.pdf", b"%PDF-1.4 nothing", r"a.pdf is not a readable PDF.*qpdf"),
        ("a.pdf", pdf("Cut off")[:150], r"a.pdf is not a readable PDF"),
        ("a.pdf", pdf("", ""), r"a.pdf holds no text.*OCR"),
        ("a.pdf", encrypted("secret"), r"a.pdf is encrypted.*qpdf --decrypt"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a.jsonl:2 is not valid JSON"),
        ("a.jsonl", b'{"text": "\xe9"}\n', r"a.jsonl:1 is not UTF-8"),
        ("a.jsonl", b'["x"]\n', r'a.jsonl:1 has no string "text"'),
        ("a.jsonl", b'{"text": 3}\n', r'a.jsonl:1 has no string "text"'),
        ("a.jsonl", b'{"text": "x", "id": [1]}\n', r'a.jsonl:1: "id" or "title" is not'),
        ("a.jsonl", b'{"text": "x", "metadata": 1}\n', r'a.jsonl:1: "metadata" is not'),
        ("a.jsonl", b'{"text":"x","id":1}\n{"text":"y","id":"1"}\n', r"'a.jsonl#1' twice"),
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
    def refuse(stream: object) -> tuple[str, str]:
        raise DependencyError("cryptography>=3.1 is required for AES algorithm")

    monkeypatch.setattr(readers, "pdf_text", refuse)
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
    write("d/a.txt", b"\xff")
    write("d/b.jsonl", '{"text": "one"}\nno\n{"text": "two"}\n')
    write("d/c.pdf", b"no")
    write("d/e.txt", "three")
    errors: list[SourceError] = []
    documents = read([tmp_path / "gone", tmp_path / "d"], on_error=errors.append)
    assert [d.text for d in documents] == ["one", "two", "three"]
    assert [str(e).split(str(tmp_path))[1].split()[0] for e in errors] == [
        *("/gone", "/d/a.txt", "/d/b.jsonl:2", "/d/c.pdf"),
    ]
