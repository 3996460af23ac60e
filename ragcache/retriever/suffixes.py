"""Which reader reads a file, by the suffix of its name, and what must be installed for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

from ragcache.retriever.epub import read_epub
from ragcache.retriever.mail import read_mail
from ragcache.retriever.office_readers import read_docx, read_pptx, read_xlsx
from ragcache.retriever.readers import (
    Found,
    read_code,
    read_html,
    read_markdown,
    read_pdf,
    read_text,
)
from ragcache.retriever.record_readers import read_arrow, read_cacheblend, read_jsonl
from ragcache.retriever.tables import read_csv

Reader = Callable[[str, Path], Iterator[Found]]  # raises SourceError about a whole file

#: Suffixes of source code, configuration and markup, which are read as they are.
CODE = (
    *(".py", ".pyi", ".js", ".mjs", ".jsx", ".ts", ".tsx", ".vue", ".java", ".kt", ".scala", ".c"),
    *(".h", ".cc", ".cpp", ".hpp", ".cs", ".go", ".rs", ".rb", ".php", ".swift", ".lua", ".pl"),
    *(".r", ".jl", ".sh", ".bash", ".ps1", ".sql", ".proto", ".tf", ".yaml", ".yml", ".toml"),
    *(".ini", ".cfg", ".conf", ".xml", ".css", ".scss", ".tex"),
)

#: The reader for each suffix.
READERS: dict[str, Reader] = {
    **dict.fromkeys((".txt", ".rst", ".log"), read_text),
    **dict.fromkeys((".md", ".markdown"), read_markdown),
    **dict.fromkeys((".html", ".htm", ".xhtml"), read_html),
    ".pdf": read_pdf,
    ".docx": read_docx,
    ".pptx": read_pptx,
    **dict.fromkeys((".xlsx", ".xlsm"), read_xlsx),
    ".epub": read_epub,
    ".eml": read_mail,
    **dict.fromkeys((".csv", ".tsv"), read_csv),
    ".jsonl": read_jsonl,
    **dict.fromkeys((".arrow", ".parquet"), read_arrow),
    ".json": read_cacheblend,
    **dict.fromkeys(CODE, read_code),
}
#: What is read, in words.
KNOWN = (
    "text (.txt, .rst, .log), .md, .html, .pdf, .docx, .pptx, .xlsx, .csv, .tsv, .epub, .eml, "
    ".jsonl, .arrow, .parquet, evaluation sets (.json) and source code"
)
#: Packages that a reader imports and that come with the extra ``formats``.
_PACKAGES = {
    ".docx": ("mammoth", "markdownify"),
    ".pptx": ("pptx",),
    ".xlsx": ("openpyxl",),
    ".xlsm": ("openpyxl",),
}


def missing_packages(suffix: str) -> list[str]:
    """The packages that files of this suffix need and that are not installed."""
    return [name for name in _PACKAGES.get(suffix, ()) if find_spec(name) is None]
