"""Precompute a corpus from Python: ``python -m examples.precompute``.

The same from the command line, here and on all GPUs of a cluster:

    ragcache precompute documents.jsonl --store my-store
    ragcache precompute documents.jsonl --store my-store \\
        --engine ray --workers 8 --gpus-per-worker 1
"""

from ragcache import RagCache
from ragcache.batch.plan import make_plan
from ragcache.batch.run import compute_locally, run
from ragcache.models import world_file
from ragcache.retriever.source import read

with RagCache.open("my-store") as cache:
    documents = list(read([world_file("documents.jsonl")]))  # or from_documents(loader.lazy_load())

    work = make_plan(cache, documents)
    print(f"{work.missing.chunks} of {work.wanted.chunks} chunks to compute,", end=" ")
    print(f"{work.missing.payload_bytes / 1e6:.0f} MB, {work.missing.flops:.1e} FLOPs")

    # A run that is stopped, even by kill -9, loses no finished batch and continues after it.
    run(cache.store, work, compute_locally(cache.engine), limit=40)
    left = make_plan(cache, documents)
    print(f"{left.stored.chunks} are there, {left.missing.chunks} are left")

    done = run(cache.store, left, compute_locally(cache.engine))
    print(
        f"{done.computed.chunks} more computed: {done.computed.tokens / done.seconds:.0f} tokens/s"
    )

    added = cache.add(documents)  # embeds and indexes: their KV is there
    print(f"{added.documents} documents indexed, KV of {added.precomputed.encoded} chunks computed")
