"""FAISS indexes written to files and read from them, in pieces."""

from __future__ import annotations

from importlib import import_module
from typing import Any, BinaryIO

from ragcache.retriever.index_file import UnusableFile

_PIECE = 1 << 20  # bytes


def write_faiss(index: Any, file: BinaryIO) -> None:
    """Append a FAISS index to a file. Raises the OSError of a write that fails."""
    faiss: Any = import_module("faiss")  # whose annotations lack what is made by SWIG
    failed: list[OSError] = []

    def write(data: bytes) -> None:
        try:
            file.write(data)
        except OSError as error:
            failed.append(error)
            raise

    try:
        faiss.write_index(index, faiss.PyCallbackIOWriter(write, _PIECE))
    except Exception as error:  # what FAISS makes of an exception of the callback
        raise failed[0] if failed else error from None


def read_faiss(file: BinaryIO) -> Any:
    """The FAISS index from here to the end of a file. Raises UnusableFile if there is none, or more
    than that."""
    faiss: Any = import_module("faiss")
    try:
        index = faiss.read_index(faiss.PyCallbackIOReader(file.read, _PIECE))
    except RuntimeError as error:  # another version of FAISS may not know the format
        raise UnusableFile("its payload is not what it says") from error
    if file.read(1):
        raise UnusableFile("its payload is not what it says")
    return index
