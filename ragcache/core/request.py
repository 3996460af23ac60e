"""Requests: a question with its options. CLI, REST API and library make them, and pass them on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypedDict, Unpack

from ragcache.blend import Blender
from ragcache.planning.cost_model import Speeds
from ragcache.settings import Ratio
from ragcache.types import Chunk, Passage, Prompt, Sampling, Tokens
from ragcache.util.option_names import check_options

__all__ = ["Misses", "PromptRequest", "Request", "RequestOptions"]


#: How chunks and texts are computed whose KV is not stored:
#:
#: - ``exact``: in the prompt, as full prefill does;
#: - ``consistent``: alone, as they would be stored, and then fused like stored ones. The ratio is
#:   not changed by measured speeds. The answer then does not depend on what is stored.
Misses = Literal["exact", "consistent"]


class RequestOptions(TypedDict, total=False):
    """Options of a :class:`Request`. Absent and None options are taken from the settings."""

    #: Chunks to use instead of retrieval, in this order. An empty list: answer without chunks.
    chunks: Sequence[str | Chunk | Passage] | None
    #: Text between the chunks and the question, such as instructions or earlier turns. It is
    #: computed for every prompt, and not used for retrieval.
    lead: str
    mode: str | Blender | None  # the fusion method
    ratio: Ratio | None  # share of rows to recompute; "auto": chosen by measured speeds
    misses: Misses | None  # how missing chunks are computed, see :data:`Misses`
    top_k: int | None  # number of chunks to retrieve
    neighbours: int | None  # number of chunks to add before and after each retrieved chunk
    require_chunks: bool | None  # raise NoChunksError if there are no chunks
    sampling: Sampling | None
    #: Called before every layer and token. An exception that it raises ends the answer, for
    #: instance after a deadline, or when the client has disconnected.
    check: Callable[[], None] | None
    #: Whether missing chunks are computed and stored at the end of the answer. If not, call
    #: :meth:`ragcache.core.generate.GenerationStream.keep`.
    keep: bool


@dataclass(frozen=True, slots=True)
class Request:
    """A question, with the options of :class:`RequestOptions`."""

    question: str
    chunks: Sequence[str | Chunk | Passage] | None = None
    lead: str = ""
    mode: str | Blender | None = None
    ratio: Ratio | None = None
    misses: Misses | None = None
    top_k: int | None = None
    neighbours: int | None = None
    require_chunks: bool | None = None
    sampling: Sampling | None = None
    check: Callable[[], None] | None = None
    keep: bool = True

    @classmethod
    def of(cls, question: str, **options: Unpack[RequestOptions]) -> Request:
        """A request with these options. TypeError for unknown ones."""
        check_options(options, RequestOptions.__annotations__, "a question")
        return cls(question, **options)


@dataclass(frozen=True, slots=True)
class PromptRequest:
    """A request with its prompt, after retrieval, and with all settings resolved."""

    prompt: Prompt
    blender: Blender
    sampling: Sampling = field(default_factory=Sampling)
    passages: tuple[Passage, ...] = ()  # of the prompt's chunks, for the report
    retrieval_s: float = 0.0
    no_chunks: str | None = None  # why the prompt has no chunks; None where it has some
    #: With speeds, :mod:`ragcache.planning.controller` chooses which chunks are loaded, and the
    #: ratio. ``blender`` must then be one that the controller can set; its own ratio is the
    #: minimum. None: all stored chunks are loaded.
    speeds: Speeds | None = None
    misses: Misses = "exact"
    check: Callable[[], None] | None = None
    keep: bool = True
    #: Called with the answer's text so far; True ends the answer, as a stop string does.
    until: Callable[[str], bool] | None = None
    #: For greedy decoding by an engine of this process: tokens whose logits are computed by teacher
    #: forcing, after the first token of the answer. The answer is decoded with them as a draft.
    #: Empty: those of the answer itself. None: no logits but those of the prompt are kept.
    forced: Tokens | None = None
