"""ragcache as a method of KVShareArena.

Written against version 0.1.0 of the board's package (github.com/xishi404/KVShareArena), which has
two contracts. Its harness runs :class:`RagCacheRepair`, and results of that can be submitted: one
``setup``, then for each question ``build_cache`` of every source without the question, and
``answer``. The older one, :class:`RagCacheSharing`, is in the package, but none of its commands
runs it, and it does not say what a sample is: here, a line of the board's question sets.
"""

from __future__ import annotations

import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, takewhile
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field, PositiveInt, StringConstraints

import ragcache
from ragcache import Answer, ConfigError, PromptError, Sampling
from ragcache.core.generate import LocalGenerator
from ragcache.core.precompute import Batch, compute_batch
from ragcache.core.request import PromptRequest
from ragcache.engine.chat_message import ChatMessage
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.engine.template import PromptTemplate, text_tokens
from ragcache.eval.evaluate import make_blenders
from ragcache.models import model_path
from ragcache.planning.context import DEFAULT_CONTEXT, encoding_context
from ragcache.store.key import ChunkKey
from ragcache.store.memory import MemoryStore
from ragcache.types import ChunkKV, Part, Prompt, Segment

try:
    from kvsharearena import AnswerResult, BaseRepairMethod, BaseSharingMethod, ShareResult
except ImportError as error:
    raise ImportError(
        "the board's package is not installed. Clone github.com/xishi404/KVShareArena and run "
        "`pip install ./KVShareArena`."
    ) from error

_load = lru_cache(maxsize=1)(TransformersEngine.load)  # runs of one process share the model
_Text = Annotated[str, StringConstraints(pattern=r"\S")]


class Exam(BaseModel):
    """The board's frozen texts around the sources and the question; other keys are not read."""

    system_prompt: str
    pre_ctx: str
    mid_q: str
    tail: str
    max_new_tokens: PositiveInt


class Config(BaseModel, extra="forbid"):
    """What the board passes: its exam, and the options of a method."""

    exam: Exam
    mode: str = "fused"  # a fusion method, full, or none: without the sources
    ratio: float | None = None  # None: that of the mode
    encoding_context: str = DEFAULT_CONTEXT
    device: str = "auto"
    dtype: str = "auto"


class Sample(BaseModel):
    """A line of the board's question sets; other keys, such as the answers, are not read."""

    input: _Text  # the question
    chunks: Annotated[list[_Text], Field(min_length=1)]


@dataclass(frozen=True, slots=True)
class Source:
    """One source, and its KV, computed without the others; None if the mode reuses none."""

    text: str
    key: ChunkKey
    kv: ChunkKV | None


class RagCacheRepair(BaseRepairMethod):  # type: ignore[misc]  # the board has no types
    """Answers from sources whose KV is computed one by one."""

    name = "ragcache"
    track = frozenset({"re"})
    backend = "ragcache"
    training_data = None

    def setup(self, model_id: str, config: Mapping[str, Any]) -> None:
        """Load the model. Raises ConfigError, or pydantic's ValidationError (both ValueErrors),
        for a wrong config, and ModelError."""
        self.config = given = Config.model_validate(config)
        ratios = [] if given.ratio is None else [given.ratio]
        (self.mode,) = make_blenders([given.mode], ratios).values()
        if self.mode.reuses == "variant":
            raise ConfigError(
                f"mode {given.mode} loads KV from other prompts, but the board gives every source "
                "alone: use another mode"
            )
        self.engine = _load(model_path(model_id), device=given.device, dtype=given.dtype)
        own = getattr(self.engine.tokenizer, "chat_template", None) or ""
        # As the board does: a model that can think answers at once.
        quick = "{%- set enable_thinking = false %}" + own if "enable_thinking" in own else None
        self.chat = self.engine.chat_template(quick)
        before = takewhile(lambda s: s.kind != "chunk", self._segments("a question", ["a source"]))
        template = PromptTemplate("".join(s.text for s in before), "", self.engine.tokenize)
        self.encoding = encoding_context(given.encoding_context, self.engine, template)
        self.mechanism_class = _MECHANISMS.get(self.mode.name, 1)
        self.provenance = _PROVENANCE.get(self.mode.name, "port")
        self.cost_notes = (
            f"ragcache {ragcache.__version__}, mode {given.mode}, parameters "
            f"{dict(self.mode.parameters)}, encoding context {given.encoding_context}, dtype "
            f"{self.engine.spec.dtype}; recomputed_layer_tokens: rows of sources computed for the "
            "answer, summed over layers, with those of probes; kv_bytes: KV of the sources in the "
            "prompt's cache; ttft_ms: from when the sources are known to the first token, with "
            "loading KV from host memory and computing all other text of the prompt"
        )

    def build_cache(self, source_text: str) -> Source:
        """The KV of a source. Raises PromptError for a blank one."""
        if not source_text.strip():
            raise PromptError("a source is empty: leave it out, or give it text")
        key = self.encoding.key(self.engine.fingerprint, self.engine.tokenize(source_text))
        if self.mode.reuses == "nothing":
            return Source(source_text, key, None)
        (kv,) = compute_batch(self.engine, Batch(key.context, (key,)))
        return Source(source_text, key, kv)

    def answer(self, question: str, caches: Sequence[Source], config: object) -> Any:
        """The board's AnswerResult. ``config`` is that of :meth:`setup`."""
        answer = self.reply(question, caches)
        report, spec = answer.report, self.engine.spec
        dense = report.chunk_tokens * spec.layers
        return AnswerResult(
            text=answer.text,
            recomputed_layer_tokens=round(report.charged_share * dense),
            dense_payload_layer_tokens=dense,
            kv_bytes=spec.chunk_bytes(report.chunk_tokens),
            ttft_ms=1000 * report.ttft_s,
            aux=measures(answer),
        )

    def reply(self, question: str, sources: Sequence[Source]) -> Answer:
        """Greedily decoded, from sources in this order.

        Raises PromptError without any, ContextError if they do not fit, and ConfigError for those
        of another model or encoding context.
        """
        if not sources:
            raise PromptError("there are no sources to answer from: give at least one")
        for source in sources:
            if source.key != self.encoding.key(self.engine.fingerprint, source.key.tokens):
                raise ConfigError(
                    f"the KV of a source is of {source.key.fingerprint}, mode {source.key.mode}: "
                    f"build it with {self.engine.fingerprint}, mode {self.encoding.mode}"
                )
        store = MemoryStore()
        store.put_all((source.key, source.kv) for source in sources if source.kv is not None)
        prompt = self.prompt(question, [source.text for source in sources])
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        generator = LocalGenerator(self.engine, store, self.encoding, store_misses=False)
        sampling = Sampling(max_tokens=self.config.exam.max_new_tokens)
        return generator.stream(PromptRequest(prompt, self.mode, sampling)).answer

    def prompt(self, question: str, sources: Sequence[str]) -> Prompt:
        """The board's prompt: every source tokenised alone, and all other text between them."""
        tokenize, parts = self.engine.tokenize, list[Part]()
        segments = self._segments(question, sources)
        for is_chunk, run in groupby(segments, key=lambda segment: segment.kind == "chunk"):
            if not is_chunk:
                parts.append(Part(text_tokens(tokenize, list(run))))
            elif self.mode.name != "none":
                parts += [Part(tokenize(segment.text), True) for segment in run]
        return Prompt(tuple(parts))

    def _segments(self, question: str, sources: Sequence[str]) -> tuple[Segment, ...]:
        exam = self.config.exam
        chunks = (Segment(text, "chunk", str(n)) for n, text in enumerate(sources))
        asked = Segment(f"{exam.mid_q}{question}{exam.tail}")
        user = ChatMessage("user", (Segment(exam.pre_ctx), *chunks, asked))
        return self.chat.render([user], instructions=exam.system_prompt).segments


class RagCacheSharing(BaseSharingMethod):  # type: ignore[misc]
    """The older contract: ``prepare`` once, then ``run`` for every sample."""

    name = "ragcache"
    track = "C"  # across contexts

    def prepare(self, producer: str, consumer: str, config: Mapping[str, Any]) -> None:
        """Load the model. Raises ConfigError if producer and consumer differ; else as
        :meth:`RagCacheRepair.setup`."""
        if producer != consumer:
            raise ConfigError(
                f"the producer is {producer}, the consumer {consumer}: a model cannot use the KV "
                "of another. Name the same model for both."
            )
        self.method = RagCacheRepair()
        self.method.setup(consumer, config)

    def run(self, sample: Mapping[str, Any]) -> Any:
        """The board's ShareResult. Raises pydantic's ValidationError for a wrong sample."""
        given = Sample.model_validate(sample)
        answer = self.method.reply(given.input, [*map(self.method.build_cache, given.chunks)])
        found = measures(answer)
        return ShareResult(
            output=answer.text,
            reuse_rate=found["reuse_rate"],
            ttft_ms=1000 * answer.report.ttft_s,
            transfer_ms=found["transfer_ms"],
            peak_mem_mb=found["peak_gpu_mb"] or found["peak_rss_mb"],
            input_tokens=answer.report.prompt_tokens,
            gen_tokens=len(answer.tokens),
            aux=found,
        )


def measures(answer: Answer) -> dict[str, Any]:
    """What was reused for an answer, and the memory that was used at most: of the GPU by this
    answer, and of the process (RSS) until now."""
    report = answer.report
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {
        "reuse_rate": report.cached_tokens / report.prompt_tokens,  # of the prompt's tokens
        "charged": report.charged_share,  # share of the sources' rows that was computed
        "bytes_loaded": report.bytes_loaded,
        "transfer_ms": 1000 * sum(layer.read_s for layer in report.layers),
        "peak_gpu_mb": gpu / 1e6,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
        "fallbacks": list(report.fallbacks),
    }


#: The board's numbers: 1 selective recomputation, 2 attention calibration, 3 position alignment.
_MECHANISMS = {"none": 0, "full": 0, "prefix": 0, "ape": 2, "reuse": 3}
_PROVENANCE = {"none": "reference", "full": "reference", "prefix": "reference", "fused": "official"}
