"""First tokens from a remote over a slow link, codec by codec: ``python -m bench.slow_link``.

A prompt of the shipped articles, in chunks of 200 tokens, whose KV is only in a remote: a folder
with a simulated link (:mod:`bench.remote`). Time is measured from when the chunks are known until
the logits of the first token, and is a median over rounds, in which all take turns; nothing is
stored locally between them. Full prefill loads nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from bench.remote import At, Paced
from bench.results import machine, table
from bench.serving import medians, prepare, serve
from ragcache.blend import blender
from ragcache.core.fit_basis import codec_with_basis
from ragcache.core.generate import LocalGenerator
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.models import ARTICLES, SMOLLM2, model_path
from ragcache.planning.context import DEFAULT_CONTEXT, encoding_context
from ragcache.store.base import StoredChunk
from ragcache.store.disk.quota import Quota
from ragcache.store.disk.store import DiskStore
from ragcache.store.format.codecs.kvtc import RECENT
from ragcache.store.remote.chunk_objects import ChunkObjects
from ragcache.store.remote.object_store import Bucket
from ragcache.store.remote.store import RemoteStore
from ragcache.types import Prompt

CHUNK = 200
OWN = "bfloat16"
COPIES = "int8", "cachegen", "kvtc8", "kvtc16"
MODES = "reuse", "fused"
QUESTION = "In which year was the bridge built, and by whom?"


def asked(engine: TransformersEngine, tokens: int) -> Prompt:
    ids: list[int] = []
    for path in sorted(ARTICLES.glob("*.md")):
        ids += engine.tokenize(path.read_text(encoding="utf-8"))
    chunks = [tuple(ids[at : at + CHUNK]) for at in range(0, tokens, CHUNK)]
    template = engine.template
    return Prompt.of(template.prefix, chunks, template.prompt(["x"], QUESTION).question)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--tokens", type=int, default=4000, help="of all chunks")
    parser.add_argument("--mbit", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    engine = TransformersEngine.load(model_path(given.model), dtype="float32", codec=OWN)
    prompt, encoding = asked(engine, given.tokens), encoding_context(DEFAULT_CONTEXT, engine)
    with ExitStack() as opened:
        folder = Path(opened.enter_context(TemporaryDirectory(prefix="ragcache-")))
        names = [
            codec_with_basis(engine, one, folder) if one.startswith("kvtc") else one
            for one in COPIES
        ]
        (folder / "remote").mkdir()
        objects = ChunkObjects(Bucket((folder / "remote").as_uri()))
        full = opened.enter_context(
            RemoteStore(DiskStore(folder / "full"), objects, remote_codecs=names)
        )
        keys = prepare(LocalGenerator(engine, full, encoding), prompt)
        full.flush()
        bucket = Paced((folder / "remote").as_uri())
        bucket.byte_s = 8e-6 / given.mbit
        disk = DiskStore(folder / "machine", quota=Quota(0))
        store = opened.enter_context(RemoteStore(disk, ChunkObjects(bucket), remote_codecs=names))

        def taken(mode: str, name: str = OWN) -> float:
            RECENT.clear()  # what the last round has decoded
            answering = LocalGenerator(engine, At(store, name), encoding, store_misses=False)
            return serve(answering, prompt, blender(mode)).ttft_s

        works: dict[str, Callable[[], float]] = {"full": partial(taken, "full")}
        for name in (OWN, *names):
            for mode in MODES:
                works[f"{mode}, {name.partition(':')[0]}"] = partial(taken, mode, name)
        seconds = medians(works, given.rounds)
        sizes: dict[str, int] = {}
        for name in (OWN, *names):
            found = At(store, name).get_headers(keys, count=False)
            there = [one for one in found if isinstance(one, StoredChunk)]
            sizes[name.partition(":")[0]] = sum(chunk.payload_bytes for chunk in there)
    print(
        f"{machine()}; {given.model}, {len(prompt):,} tokens, {given.mbit} Mbit/s, medians of "
        f"{given.rounds} rounds. Full prefill: {seconds['full']:.2f} s.\n"
    )
    rows = [
        [
            name,
            f"{size / 2**20:.1f} MiB",
            *(f"{seconds[f'{mode}, {name}']:.2f} s" for mode in MODES),
            *(f"{seconds['full'] / seconds[f'{mode}, {name}']:.1f}" for mode in MODES),
        ]
        for name, size in sizes.items()
    ]
    sooner = [f"`{mode}` sooner than full" for mode in MODES]
    print(table(["codec", "KV", *(f"`{mode}`" for mode in MODES), *sooner], rows), end="")


if __name__ == "__main__":
    main()
