"""What chat model and retriever ask of what answers: a store in this process, or the service."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from langchain_core.documents import Document

from ragcache.langchain.chunk_parsing import Given, KnownTexts
from ragcache.settings import Ratio


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A question over given chunks. What is None is left to the other side's settings."""

    question: str
    chunks: tuple[Given, ...] = ()
    model: str = ""  # the one that is asked for; empty: whichever answers there
    mode: str | None = None
    ratio: Ratio | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    timeout: float | None = None  # seconds until TimeoutError


@dataclass(frozen=True, slots=True)
class Finished:
    """What is known of an answer when its last piece is through."""

    model: str
    finish_reason: Literal["stop", "length"]
    input_tokens: int
    cached_tokens: int  # of these, taken from the store and not computed
    output_tokens: int
    report: dict[str, Any]  # as ragcache.api.serialize.report_json


class Backend(Protocol):
    """Where questions are answered. Any number of threads and event loops may ask at once."""

    def known(self) -> KnownTexts:
        """Texts of the chunks that are stored there."""
        ...

    async def aknown(self) -> KnownTexts: ...

    def model_name(self) -> str:
        """What the model is called that answers there; empty where nobody says."""
        ...

    async def amodel_name(self) -> str: ...

    def token_ids(self, text: str) -> list[int]:
        """A text's tokens, by the tokenizer of the model that answers."""
        ...

    def count(self, question: str, chunks: Sequence[Given]) -> int:
        """Tokens of the prompt that these make; a blank question has none."""
        ...

    def search(self, question: str, k: int | None, neighbours: int | None) -> list[Document]:
        """The chunks that are nearest to a question, as :meth:`RagCache.retrieve` finds them."""
        ...

    async def asearch(self, question: str, k: int | None, neighbours: int | None) -> list[Document]:
        """The same; the event loop is never blocked."""
        ...

    def ask(self, request: ChatRequest) -> tuple[str, Finished]:
        """The answer's text, and what became of it."""
        ...

    async def aask(self, request: ChatRequest) -> tuple[str, Finished]:
        """The same; the event loop is never blocked."""
        ...

    def stream(self, request: ChatRequest) -> Generator[str | Finished, None, None]:
        """Pieces of the answer's text, then what became of it. Closed early, it is given up."""
        ...

    def astream(self, request: ChatRequest) -> AsyncGenerator[str | Finished, None]:
        """The same; the event loop is never blocked."""
        ...
