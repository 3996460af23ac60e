"""One question with everything that was asked for, made once where it comes in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

from ragcache.blend import Blender
from ragcache.planning.cost_model import Speeds
from ragcache.settings import Ratio
from ragcache.types import Chunk, Passage, Prompt, Sampling


class RequestOptions(TypedDict, total=False):
    """What a :class:`Request` may ask for besides its question. What is left out, or None, comes
    from the settings."""

    #: Instead of retrieval, which goes by the question alone. An empty list: no chunks at all.
    chunks: Sequence[str | Chunk | Passage] | None
    #: Stands between the chunks and the question, such as instructions or earlier turns. It is
    #: computed for every prompt.
    lead: str
    mode: str | Blender | None  # the fusion method
    ratio: Ratio | None  # of the rows to recompute; "auto" suits the machine
    top_k: int | None  # chunks to retrieve
    neighbours: int | None  # chunks to add before and after each of these
    require_chunks: bool | None  # raise NoChunksError where there is no chunk to answer from
    sampling: Sampling | None
    #: Called before every layer and token. What it raises ends the answer there: a deadline that
    #: has passed, a client that has gone.
    check: Callable[[], None] | None
    #: Whether the chunks that were not stored are computed and stored at the end of the answer;
    #: else call :meth:`ragcache.core.generate.GenerationStream.keep`.
    keep: bool


@dataclass(frozen=True, slots=True)
class Request:
    """A question, and how it is to be answered: see :class:`RequestOptions`."""

    question: str
    chunks: Sequence[str | Chunk | Passage] | None = None
    lead: str = ""
    mode: str | Blender | None = None
    ratio: Ratio | None = None
    top_k: int | None = None
    neighbours: int | None = None
    require_chunks: bool | None = None
    sampling: Sampling | None = None
    check: Callable[[], None] | None = None
    keep: bool = True


@dataclass(frozen=True, slots=True)
class PromptRequest:
    """A request whose chunks were found and whose settings are known: what is generated from."""

    prompt: Prompt
    blender: Blender
    sampling: Sampling = field(default_factory=Sampling)
    passages: tuple[Passage, ...] = ()  # of the prompt's chunks, for the report
    retrieval_s: float = 0.0
    no_chunks: str | None = None  # why the prompt has no chunks; None where it has some
    #: What is loaded, and at what ratio the rest is recomputed, suits these (see
    #: :mod:`ragcache.planning.controller`). ``blender`` must then be one that the controller can
    #: set, and its own ratio is the least. None: all that is stored is loaded.
    speeds: Speeds | None = None
    check: Callable[[], None] | None = None
    keep: bool = True
