"""``/v1/documents``, ``/v1/chunks``, ``/v1/texts`` and ``/v1/jobs``: stored data, and background
jobs that add to it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from ragcache.api.bridge import wait_for_future
from ragcache.api.errors import ApiError
from ragcache.api.example_questions import example_questions
from ragcache.api.jobs import Job
from ragcache.api.requests import NewChunks, NewDocuments, NewJob
from ragcache.api.routes import StateDep, TenantDep, open_cache, run_in_thread
from ragcache.api.serialize import store_json
from ragcache.core.indexing import check_documents
from ragcache.store.catalog.documents import DocumentEntry
from ragcache.types import Chunk, Document

router = APIRouter()

_Limit = Annotated[int, Query(ge=1, le=1000)]
_Row = Annotated[int, Query(ge=-1, lt=1 << 63)]
_DIGEST = re.compile("[0-9a-f]{64}")


def _documents(body: NewDocuments) -> list[Document]:
    return [Document(one.id, one.text, one.metadata) for one in body.documents]


@router.get("/v1/examples", tags=["documents"])
async def list_examples(state: StateDep, tenant: TenantDep) -> dict[str, Any]:
    """A few example questions about the stored documents."""
    cache = await open_cache(state, tenant)
    found = await run_in_thread(example_questions, cache)
    data = [{"object": "ragcache.example", "question": question} for question in found]
    return {"object": "list", "data": data}


@router.post("/v1/documents", tags=["documents"])
async def add_documents(
    body: NewDocuments, http_request: Request, state: StateDep, tenant: TenantDep
) -> dict[str, Any]:
    """Split, embed and store documents, and compute their KV; responds when all is done. A document
    replaces one with the same id. For many documents, create a job."""
    documents = _documents(body)
    check_documents(documents, body.ttl_s)
    future = state.service.add(
        tenant,
        documents,
        ttl_s=body.ttl_s,
        pinned=body.pinned,
        seconds=state.service.settings.timeout_s,
    )
    added = await wait_for_future(http_request.receive, future)
    return {"object": "ragcache.added", **asdict(added)}


@router.get("/v1/documents", tags=["documents"])
async def list_documents(
    state: StateDep, tenant: TenantDep, limit: _Limit = 100, after: str = ""
) -> dict[str, Any]:
    """Documents in the order of their ids, those after the id ``after``."""
    cache = await open_cache(state, tenant)
    found = [entry for entry in await run_in_thread(cache.documents) if entry.id > after]
    data = [_entry(entry) for entry in found[:limit]]
    return {"object": "list", "data": data, "has_more": len(found) > limit}


@router.get("/v1/documents/{id:path}", tags=["documents"])
async def get_document(id: str, state: StateDep, tenant: TenantDep) -> dict[str, Any]:
    cache = await open_cache(state, tenant)
    entry = await run_in_thread(cache.catalog.entry, id)
    if entry is None:
        raise _missing("document", id)
    return _entry(entry)


@router.delete("/v1/documents/{id:path}", tags=["documents"])
async def delete_document(id: str, state: StateDep, tenant: TenantDep) -> dict[str, Any]:
    """Delete a document, its chunks, and KV that no other document uses."""
    cache = await open_cache(state, tenant)
    if not await run_in_thread(cache.delete, [id]):
        raise _missing("document", id)
    return {"id": id, "object": "ragcache.document", "deleted": True}


@router.get("/v1/stats", tags=["chunks"])
async def stats(state: StateDep, tenant: TenantDep) -> dict[str, Any]:
    """The store's size, its hits and misses since it was opened, and its vector index."""
    cache = await open_cache(state, tenant)
    return await run_in_thread(
        lambda: store_json(cache.chunks, cache.traffic()) | {"index": asdict(cache.retriever.index)}
    )


@router.post("/v1/chunks", tags=["chunks"])
async def add_chunks(
    body: NewChunks, http_request: Request, state: StateDep, tenant: TenantDep
) -> dict[str, Any]:
    """Compute and store the KV of texts, each as one chunk, for requests that bring these texts.
    Retrieval does not find them: it finds documents' chunks."""
    chunks = [Chunk("chunks", number, text) for number, text in enumerate(body.chunks)]
    future = state.service.precompute(tenant, chunks, seconds=state.service.settings.timeout_s)
    keys, done = await wait_for_future(http_request.receive, future)
    data = [{"id": key.digest.hex(), "tokens": len(key.tokens)} for key in keys]
    return {"object": "list", "data": data, "encoded": done.encoded, "stored": done.stored}


@router.get("/v1/chunks", tags=["chunks"])
async def list_chunks(
    state: StateDep, tenant: TenantDep, limit: _Limit = 100, after: str = ""
) -> dict[str, Any]:
    """Chunks whose KV is stored, in the order of their ids, those after the id ``after``."""
    digest = bytes.fromhex(_digest(after)) if after else b""
    cache = await open_cache(state, tenant)
    found = await run_in_thread(cache.store.headers, after=digest, most=limit + 1)
    data = [
        {
            "id": header.key.hex(),
            "object": "ragcache.chunk",
            "tokens": len(header.tokens),
            "bytes": sum(payload.length for payload in header.payloads),
            "encoding_context": header.mode,
            "compiled": header.mode,  # the former name, for one more release
            "model": header.name,
        }
        for header in found[:limit]
    ]
    return {"object": "list", "data": data, "has_more": len(found) > limit}


@router.get("/v1/texts", tags=["chunks"])
async def list_texts(
    state: StateDep, tenant: TenantDep, limit: _Limit = 100, after: _Row = -1
) -> dict[str, Any]:
    """The documents' chunks with their texts, in row order, those after row ``after``."""
    cache = await open_cache(state, tenant)
    found = await run_in_thread(cache.catalog.page, after, limit + 1)
    data = [
        {"object": "ragcache.text", "row": row, "id": chunk.id, "text": chunk.text}
        for row, chunk in found[:limit]
    ]
    return {"object": "list", "data": data, "has_more": len(found) > limit}


@router.delete("/v1/chunks/{id}", tags=["chunks"])
async def delete_chunk(id: str, state: StateDep, tenant: TenantDep) -> dict[str, Any]:
    """Delete a chunk's KV alone: it is computed again when it is needed."""
    digest = bytes.fromhex(_digest(id))
    cache = await open_cache(state, tenant)
    if not await run_in_thread(cache.store.delete_digest, digest):
        raise _missing("chunk", id)
    return {"id": id, "object": "ragcache.chunk", "deleted": True}


@router.post("/v1/jobs", tags=["jobs"], status_code=202)
async def add_job(body: NewJob, state: StateDep, tenant: TenantDep) -> dict[str, Any]:
    """Add documents in the background. With ``index`` false, only compute their chunks' KV, for
    requests that bring these texts."""
    add = partial(state.jobs.add, index=body.index)
    return _job(await run_in_thread(add, tenant, _documents(body), body.ttl_s, body.pinned))


@router.get("/v1/jobs", tags=["jobs"])
async def list_jobs(state: StateDep, tenant: TenantDep) -> dict[str, Any]:
    return {
        "object": "list",
        "data": [_job(job) for job in await run_in_thread(state.jobs.list, tenant)],
    }


@router.get("/v1/jobs/{id}", tags=["jobs"])
async def get_job(id: str, state: StateDep, tenant: TenantDep) -> dict[str, Any]:
    return await _call_job(state.jobs.get, tenant, id)


@router.post("/v1/jobs/{id}/cancel", tags=["jobs"])
async def cancel_job(id: str, state: StateDep, tenant: TenantDep) -> dict[str, Any]:
    """Stop a job at its next batch; what it has done is kept."""
    return await _call_job(state.jobs.cancel, tenant, id)


@router.post("/v1/jobs/{id}/resume", tags=["jobs"])
async def resume_job(id: str, state: StateDep, tenant: TenantDep) -> dict[str, Any]:
    """Continue a job that was cancelled, has failed or was parked."""
    return await _call_job(state.jobs.resume, tenant, id)


async def _call_job(method: Callable[[str, str], Job], tenant: str, id: str) -> dict[str, Any]:
    try:
        return _job(await run_in_thread(method, tenant, id))
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
        raise ApiError(
            400, f"{text!r} is not a chunk's id: give 64 hexadecimal digits, in lower case"
        )
    return text


def _missing(what: str, id: str) -> ApiError:
    return ApiError(404, f"there is no {what} {id!r}: GET /v1/{what}s lists them", code="not_found")
