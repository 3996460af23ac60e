"""Settings of a :class:`RagCache`: its store, its model, and how it answers questions."""

from __future__ import annotations

import warnings
from datetime import date
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import ByteSize, Field, SecretStr, field_validator

from ragcache.settings.renamed import RenamedWarning
from ragcache.settings.sources import SourcedSettings

#: A share of the chunk tokens; or auto, which depends on the speeds of model and store.
Ratio = Annotated[float, Field(ge=0, le=1)] | Literal["auto"]


class Settings(SourcedSettings):
    """What :meth:`RagCache.open` takes. A key that is not a setting is an error."""

    subject: ClassVar[str] = "a store"

    store: Path = Field(Path("ragcache-store"), description="Folder of the store.")
    model: str = Field(
        "",
        description="Folder or GGUF file of the model, its name on a model hub, tiny or smollm2. "
        "Default: the model that the store was built with; for a new store, tiny.",
    )
    device: str = Field("auto", description="Device of the model: auto, cpu or cuda.")
    dtype: str = Field(
        "auto",
        description="Data type that the model computes in: auto, float32, bfloat16 or float16.",
    )
    kernels: Literal["auto", "torch", "triton"] = Field(
        "auto",
        description="Kernels that place KV and compute attention on a GPU: auto, torch or triton.",
    )
    embedder: str = Field(
        "",
        description="Sentence-transformers model that embeds documents and questions. Default: "
        "the store's own.",
    )
    index: str = Field(
        "auto",
        description="Vector index: flat (exact), hnsw or ivfpq (approximate), auto (by the number "
        "of vectors), numpy (exact and slow), or a string for FAISS's index factory.",
    )
    index_recall: float = Field(
        0.98,
        gt=0,
        le=1,
        description="Least share of the ten nearest vectors that an approximate index is to find, "
        "0 to 1. It is searched as widely as that takes.",
    )
    chunk_tokens: int | None = Field(
        None,
        ge=8,
        description="Maximum tokens of a chunk. Default: the store's own; for a new store, the "
        "smaller of 256 and 1/32 of the model's context.",
    )
    encoding_context: str = Field(
        "",
        description="Tokens that precede a chunk while its KV is computed: prose, prefix, bos or "
        "link0. Default: the store's own.",
    )
    prompt_date: date | Literal["", "today"] = Field(
        "",
        description="Date in the prompt, where the chat template puts one there: today, or a date "
        "such as 2026-11-30. Default: the store's own, which is the date of its first use.",
    )
    codec: str = Field(
        "",
        description="Codec that KV is stored with, such as bfloat16, int8, cachegen or kvtc16. "
        "Default: the store's own; for a new store, the precision that the model is published in.",
    )
    layout: Literal["auto", "records", "files"] = Field(
        "auto",
        description="Where KV is stored: in LMDB (records), in a file per chunk (files), or as "
        "suits the size of a layer (auto).",
    )
    max_bytes: ByteSize | None = Field(
        None,
        description="Maximum KV in the store, such as 50GB. A full store evicts chunks. Default: "
        "no limit.",
    )
    tenant_bytes: ByteSize | None = Field(
        None, description="Maximum KV of each tenant. Default: no limit."
    )
    ram_bytes: ByteSize = Field(
        ByteSize(0), description="Maximum KV that is cached in RAM, such as 4GB. 0 caches none."
    )
    remote: str = Field(
        "",
        description="Object store that machines share: s3://bucket/prefix, gs://bucket/prefix, "
        "az://container/prefix or file:///folder. Default: none.",
    )
    remote_codecs: str = Field(
        "",
        description="Further codecs in which chunks are stored in the remote, for slow links: "
        "separated by commas, the most accurate first, such as int8,kvtc16.",
    )
    chat_bytes: ByteSize = Field(
        ByteSize(512 << 20),
        description="Maximum KV of chats that is kept in the model's memory for their next turns. "
        "0 keeps none.",
    )
    eviction: Literal["lru", "pgdsf", "craft"] = Field(
        "pgdsf", description="Eviction policy of a full store: lru, pgdsf or craft."
    )
    engine: Literal["embedded", "vllm"] = Field(
        "embedded",
        description="What runs the model: this process (embedded) or vLLM servers (vllm).",
    )
    vllm_url: str = Field("", description="URLs of the vLLM servers, separated by commas.")
    vllm_key: SecretStr | None = Field(
        None,
        description="API key of the vLLM servers. Set it as a variable, not in the file.",
    )
    mode: str = Field(
        "fused", description="Fusion method and its parameters, such as full, reuse or cacheblend."
    )
    ratio: Ratio = Field(
        "auto",
        description="Share of the chunk tokens that are recomputed, 0 to 1. With auto, it is at "
        "least the store's calibrated ratio, or else the method's default, and grows while "
        "recomputing takes no longer than loading (a method that probes keeps its ratio).",
    )
    misses: Literal["exact", "consistent"] = Field(
        "exact",
        description="How chunks are computed whose KV is not stored: in the prompt, as full "
        "prefill does (exact), or alone as they would be stored, so that the answer does not "
        "depend on what is stored (consistent).",
    )
    instructions: str | None = Field(
        None,
        description="System message of prompts that have none. Default: for questions, ragcache's "
        "own; for chats, none.",
    )
    template: Path | None = Field(
        None,
        description="File with a chat template in Jinja, to use in place of the model's own.",
    )
    documents_in: Literal["user", "system"] = Field(
        "user",
        description="Message that chunks are placed in, if the chat template has no place for "
        "documents: the last user's, before its text (user), or the system message (system).",
    )
    find_chars: int = Field(
        1000,
        ge=0,
        description="Length in characters from which the texts of messages are searched for "
        "chunks whose KV can be reused. 0: never.",
    )
    top_k: int | None = Field(
        None,
        ge=1,
        le=1000,
        description="Chunks to retrieve, at most 1000. Default: 4, or as many as top_tokens has "
        "room for.",
    )
    top_tokens: int | None = Field(
        None,
        ge=1,
        description="Maximum tokens of the retrieved chunks and their neighbours: the best ones "
        "that fit are used. Default: no limit.",
    )
    neighbours: int = Field(
        1,
        ge=0,
        description="Chunks before and after each retrieved chunk that are added to the prompt.",
    )
    retrieval: Literal["dense", "bm25", "hybrid"] = Field(
        "dense",
        description="What chunks are found by: vectors (dense), words (bm25) or both (hybrid).",
    )
    min_score: float | None = Field(
        None, ge=-1, le=1, description="Least cosine similarity of a retrieved chunk. Default: any."
    )
    mmr: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Choose chunks by maximal marginal relevance: 1 for relevance alone, 0 for "
        "chunks that are unlike one another. Default: off, the most similar ones.",
    )
    reranker: str = Field(
        "",
        description="Cross-encoder of sentence-transformers that puts the chunks that were found "
        "in a better order: a name or folder. Default: none.",
    )
    rerank: int | None = Field(
        None,
        ge=0,
        le=1000,
        description="How many of the best chunks the reranker puts in a new order, at most 1000. "
        "Default: 50 with a reranker, else 0.",
    )
    require_chunks: bool = Field(
        False,
        description="Whether a question is refused if there are no chunks to answer it from.",
    )
    max_tokens: int = Field(64, ge=1, description="Maximum tokens of an answer.")
    temperature: float = Field(0.0, ge=0, description="Sampling temperature. 0 is greedy decoding.")
    top_p: float = Field(1.0, gt=0, le=1, description="Probability mass of nucleus sampling.")

    @field_validator("index")
    @classmethod
    def _by_new_name(cls, index: str) -> str:
        if index != "faiss":
            return index
        warnings.warn(
            "index faiss is now called flat: use that name, because the next release will not "
            "accept faiss",
            RenamedWarning,
            stacklevel=2,
        )
        return "flat"
