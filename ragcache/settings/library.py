"""Settings of a :class:`RagCache`: its store, its model, and how questions are answered."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import ByteSize, Field, SecretStr

from ragcache.settings.sources import SourcedSettings

#: A share of the chunk tokens, or as many as loading the others leaves time for.
Ratio = Annotated[float, Field(ge=0, le=1)] | Literal["auto"]


class Settings(SourcedSettings):
    """What :meth:`RagCache.open` takes. Unknown keys are errors wherever they stand."""

    subject: ClassVar[str] = "a store"

    store: Path = Field(Path("ragcache-store"), description="folder of the store")
    model: str = Field("", description="folder or hub name; empty: what the store was built with")
    device: str = Field("auto", description="auto, cpu or cuda")
    dtype: str = Field("auto", description="auto, float32, bfloat16 or float16")
    kernels: Literal["auto", "torch", "triton", "flex"] = Field(
        "auto", description="what a GPU places KV and attends with: auto, torch, triton or flex"
    )
    embedder: str = Field("", description="sentence-transformers model; empty: the store's own")
    index: Literal["faiss", "numpy"] = Field("faiss", description="vector index")
    chunk_tokens: int | None = Field(
        None,
        ge=8,
        description="longest chunk; default: the store's own, or the smaller of 256 "
        "and a 32nd of the model's context",
    )
    encoding_context: str = Field(
        "",
        description="what chunks are computed behind: prefix, bos, link0 or enriched(n); empty: "
        "the store's own",
    )
    prompt_date: date | Literal["", "today"] = Field(
        "",
        description="date in the prompt, for a chat template that puts one there: today, or such "
        "as 2026-11-30; empty: the store's own, that of its first use",
    )
    codec: str = Field(
        "",
        description="how KV is stored, such as raw, bfloat16, int8 or cachegen; empty: the store's "
        "own; a new one's is the model's published precision",
    )
    layout: Literal["auto", "records", "files"] = Field(
        "auto", description="where KV is stored: in LMDB, in a file per chunk, or by its size"
    )
    max_bytes: ByteSize | None = Field(
        None,
        description="KV that the store may hold, such as 50GB; a full one evicts; empty: no bound",
    )
    tenant_bytes: ByteSize | None = Field(
        None, description="KV that each tenant may hold; empty: no bound"
    )
    ram_bytes: ByteSize = Field(
        ByteSize(0), description="KV held in RAM in front of the store, such as 4GB; 0: none"
    )
    remote: str = Field(
        "",
        description="object store that machines share: s3://bucket/prefix, gs://bucket/prefix, "
        "az://container/prefix or file:///folder; empty: none",
    )
    remote_codecs: str = Field(
        "",
        description="codecs in which chunks are sent there too, for slow links, those that lose "
        "least first, separated by commas, such as int8,cachegen",
    )
    eviction: Literal["lru", "pgdsf", "craft"] = Field(
        "pgdsf", description="which chunks go first when the store is full"
    )
    engine: Literal["embedded", "vllm"] = Field(
        "embedded", description="what runs the model: this process, or vLLM servers"
    )
    vllm_url: str = Field("", description="addresses of vLLM servers, separated by commas")
    vllm_key: SecretStr | None = Field(None, description="their API key; for the environment")
    mode: str = Field("fused", description="fusion method and its parameters")
    ratio: Ratio = Field(
        "auto",
        description="share of chunk tokens recomputed; auto: at least the mode's own, and as many "
        "as loading the others leaves time for",
    )
    top_k: int = Field(4, ge=1, le=1000, description="chunks retrieved, at most 1000")
    neighbours: int = Field(1, ge=0, description="chunks before and after each that come along")
    require_chunks: bool = Field(
        False,
        description="whether a question is refused for which there are no chunks, and not "
        "answered from nothing",
    )
    max_tokens: int = Field(64, ge=1, description="longest answer")
    temperature: float = Field(0.0, ge=0, description="0 is greedy")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus sampling")
