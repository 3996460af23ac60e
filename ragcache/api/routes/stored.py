"""``/v1/documents``, ``/v1/chunks`` and ``/v1/jobs``: what is stored, and what is on its way."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from ragcache.api.bridge import awaited
from ragcache.api.errors import Problem
from ragcache.api.examples import examples
from ragcache.api.jobs import Job
from ragcache.api.requests import NewChunks, NewDocuments, NewJob
from ragcache.api.routes import Served, Tenant, in_thread, opened
from ragcache.api.serialize import store_json
from ragcache.core.indexing import check_documents
from ragcache.store.catalog.documents import DocumentEntry
from ragcache.types import Chunk, Document

router = APIRouter()

Limit = Annotated[int, Query(ge=1, le=1000)]
Row = Annotated[int, Query(ge=-1, lt=1 << 63)]
_DIGEST = re.compile("[0-9a-f]{64}")


def _documents(given: NewDocuments) -> list[Document]:
    return [Document(one.id, one.text, one.metadata) for one in given.documents]


@router.get("/v1/examples", tags=["documents"])
async def list_examples(state: Served, tenant: Tenant) -> dict[str, Any]:
    """A few questions that one may ask of what is stored, for somebody who is new to it."""
    cache = await opened(state, tenant)
    found = await in_thread(examples, cache)
    data = [{"object": "ragcache.example", "question": question} for question in found]
    return {"object": "list", "data": data}


@router.post("/v1/documents", tags=["documents"])
async def add_documents(
    given: NewDocuments, request: Request, state: Served, tenant: Tenant
) -> dict[str, Any]:
    """Split, embed and store documents, and compute their KV; answers when it is done. The same id
    replaces. For many documents, make a job."""
    documents = _documents(given)
    check_documents(documents, given.ttl_s)
    work = state.service.add(
        tenant,
        documents,
        ttl_s=given.ttl_s,
        pinned=given.pinned,
        seconds=state.service.settings.timeout_s,
    )
    added = await awaited(request.receive, work)
    return {"object": "ragcache.added", **asdict(added)}


@router.get("/v1/documents", tags=["documents"])
async def list_documents(
    state: Served, tenant: Tenant, limit: Limit = 100, after: str = ""
) -> dict[str, Any]:
    """By id, those behind ``after``."""
    cache = await opened(state, tenant)
    found = [entry for entry in await in_thread(cache.documents) if entry.id > after]
    data = [_entry(entry) for entry in found[:limit]]
    return {"object": "list", "data": data, "has_more": len(found) > limit}


@router.get("/v1/documents/{id:path}", tags=["documents"])
async def get_document(id: str, state: Served, tenant: Tenant) -> dict[str, Any]:
    cache = await opened(state, tenant)
    entry = await in_thread(cache.catalog.entry, id)
    if entry is None:
        raise _missing("document", id)
    return _entry(entry)


@router.delete("/v1/documents/{id:path}", tags=["documents"])
async def delete_document(id: str, state: Served, tenant: Tenant) -> dict[str, Any]:
    """With its chunks and all KV that no other document uses."""
    cache = await opened(state, tenant)
    if not await in_thread(cache.delete, [id]):
        raise _missing("document", id)
    return {"id": id, "object": "ragcache.document", "deleted": True}


@router.get("/v1/stats", tags=["chunks"])
async def stats(state: Served, tenant: Tenant) -> dict[str, Any]:
    """What the store holds, and how often it had what was asked for since it was opened."""
    cache = await opened(state, tenant)
    return await in_thread(lambda: store_json(cache.chunks, cache.traffic()))


@router.post("/v1/chunks", tags=["chunks"])
async def add_chunks(
    given: NewChunks, request: Request, state: Served, tenant: Tenant
) -> dict[str, Any]:
    """Compute and store the KV of texts, each whole, for prompts that bring them. They are not
    found by retrieval: documents are."""
    chunks = [Chunk("chunks", number, text) for number, text in enumerate(given.chunks)]
    work = state.service.compute(tenant, chunks, seconds=state.service.settings.timeout_s)
    keys, done = await awaited(request.receive, work)
    data = [{"id": key.digest.hex(), "tokens": len(key.tokens)} for key in keys]
    return {"object": "list", "data": data, "encoded": done.encoded, "stored": done.stored}


@router.get("/v1/chunks", tags=["chunks"])
async def list_chunks(
    state: Served, tenant: Tenant, limit: Limit = 100, after: str = ""
) -> dict[str, Any]:
    """All whose KV is stored, by id, those behind ``after``."""
    digest = bytes.fromhex(_digest(after)) if after else b""
    cache = await opened(state, tenant)
    found = await in_thread(cache.store.headers, after=digest, most=limit + 1)
    data = [
        {
            "id": header.key.hex(),
            "object": "ragcache.chunk",
            "tokens": len(header.tokens),
            "bytes": sum(payload.length for payload in header.payloads),
            "encoding_context": header.mode,
            "compiled": header.mode,  # the name of before, for one more release
            "model": header.name,
        }
        for header in found[:limit]
    ]
    return {"object": "list", "data": data, "has_more": len(found) > limit}


@router.get("/v1/texts", tags=["chunks"])
async def list_texts(
    state: Served, tenant: Tenant, limit: Limit = 100, after: Row = -1
) -> dict[str, Any]:
    """The chunks of documents with their texts, in the order of their rows, those behind row
    ``after``."""
    cache = await opened(state, tenant)
    found = await in_thread(cache.catalog.page, after, limit + 1)
    data = [
        {"object": "ragcache.text", "row": row, "id": chunk.id, "text": chunk.text}
        for row, chunk in found[:limit]
    ]
    return {"object": "list", "data": data, "has_more": len(found) > limit}


@router.delete("/v1/chunks/{id}", tags=["chunks"])
async def delete_chunk(id: str, state: Served, tenant: Tenant) -> dict[str, Any]:
    """Its KV alone: it is computed anew where it is needed."""
    digest = bytes.fromhex(_digest(id))
    cache = await opened(state, tenant)
    if not await in_thread(cache.store.delete_digest, digest):
        raise _missing("chunk", id)
    return {"id": id, "object": "ragcache.chunk", "deleted": True}


@router.post("/v1/jobs", tags=["jobs"], status_code=202)
async def add_job(given: NewJob, state: Served, tenant: Tenant) -> dict[str, Any]:
    """Add documents in the background; or, with ``index`` false, compute their chunks' KV and no
    more, for prompts that bring them."""
    add = partial(state.jobs.add, index=given.index)
    return _job(await in_thread(add, tenant, _documents(given), given.ttl_s, given.pinned))


@router.get("/v1/jobs", tags=["jobs"])
async def list_jobs(state: Served, tenant: Tenant) -> dict[str, Any]:
    return {
        "object": "list",
        "data": [_job(job) for job in await in_thread(state.jobs.list, tenant)],
    }


@router.get("/v1/jobs/{id}", tags=["jobs"])
async def get_job(id: str, state: Served, tenant: Tenant) -> dict[str, Any]:
    return await _of_job(state.jobs.get, tenant, id)


@router.post("/v1/jobs/{id}/cancel", tags=["jobs"])
async def cancel_job(id: str, state: Served, tenant: Tenant) -> dict[str, Any]:
    """End it at the next batch; what is done stays."""
    return await _of_job(state.jobs.cancel, tenant, id)


@router.post("/v1/jobs/{id}/resume", tags=["jobs"])
async def resume_job(id: str, state: Served, tenant: Tenant) -> dict[str, Any]:
    """Go on with one that was cancelled, or has failed."""
    return await _of_job(state.jobs.resume, tenant, id)


async def _of_job(what: Callable[[str, str], Job], tenant: str, id: str) -> dict[str, Any]:
    try:
        return _job(await in_thread(what, tenant, id))
    except KeyError:
        raise _missing("job", id) from None


def _job(job: Job) -> dict[str, Any]:
    found = asdict(job)
    del found["tenant"]
    return {"object": "ragcache.job", **found}


def _entry(entry: DocumentEntry) -> dict[str, Any]:
    return {"object": "ragcache.document", **asdict(entry), "metadata": dict(entry.metadata)}


def _digest(text: str) -> str:
    if _DIGEST.fullmatch(text) is None:
        raise Problem(400, f"{text!r} is no chunk's id: 64 digits of 0-9 and a-f")
    return text


def _missing(what: str, id: str) -> Problem:
    return Problem(404, f"there is no {what} {id!r}: GET /v1/{what}s lists them", code="not_found")
