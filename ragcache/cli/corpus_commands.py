"""Commands for whole corpora and files of questions, and for their costs."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from pydantic import ByteSize

from ragcache.cli import render
from ragcache.cli.options import (
    NO_CHUNKS,
    Codec,
    Device,
    Dtype,
    EncodingContext,
    Model,
    PromptDate,
    Ratio,
    Remote,
    RemoteCodecs,
    RequireChunks,
    Reranker,
    Retrieval,
    Store,
    Tenant,
    named_if_blank,
    note_prompt_date,
    opened,
    smaller,
)
from ragcache.cli.output import INTERRUPTED, as_json, figures, out, print_note, progress
from ragcache.cli.render import corpora
from ragcache.cli.render.stages import COMPUTING
from ragcache.errors import ConfigError, SourceError
from ragcache.settings import Settings
from ragcache.util.private_file import open_private

if TYPE_CHECKING:
    from ragcache.batch.plan import PrecomputePlan
    from ragcache.batch.ray import RayCluster
    from ragcache.batch.run import BatchComputer, RunProgress
    from ragcache.rag import RagCache

SKIPPED = 3  # exit code: some documents or requests were skipped


def precompute(
    sources: Annotated[
        list[Path],
        typer.Argument(help="Files, folders and data sets on disk; - reads JSON Lines from stdin."),
    ],
    store: Store = None,
    tenant: Tenant = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    chunk_tokens: Annotated[int | None, typer.Option(help="Maximum tokens per chunk.")] = None,
    encoding_context: EncodingContext = None,
    codec: Codec = None,
    prompt_date: PromptDate = None,
    remote: Remote = None,
    remote_codecs: RemoteCodecs = None,
    batch_tokens: Annotated[
        int, typer.Option(min=1, help="Maximum tokens that one forward pass computes.")
    ] = 2048,
    shard: Annotated[str, typer.Option(help="Do the i-th of n parts of the work: i/n.")] = "1/1",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many chunks, at the end of a batch.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option(help="Print what there is to do, without doing it.")
    ] = False,
    report: Annotated[
        Path | None, typer.Option(help="Write plan and result into this file (JSON).")
    ] = None,
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="Compute in this process, or on Ray.")
    ] = "local",
    address: Annotated[
        str | None,
        typer.Option(help="Address of a Ray cluster; default: start one on this machine."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Ray workers.")] = 1,
    gpus_per_worker: Annotated[float, typer.Option(min=0, help="GPUs of each Ray worker.")] = 0,
) -> None:
    """Compute the KV of documents, without indexing them.

    A second run computes only what is missing, and a run that is killed loses only the batches in
    progress. Exit code 3: some documents were skipped; 130: interrupted.
    """
    from ragcache.batch.plan import Shard, WorkSize, make_plan
    from ragcache.batch.ray import RayCluster
    from ragcache.batch.run import RunProgress
    from ragcache.retriever.source import read

    part = Shard.parse(shard)
    if dry_run and prompt_date:
        raise ConfigError(
            "--dry-run changes nothing, but --prompt-date does: leave one of them out"
        )
    if report is not None and not report.absolute().parent.is_dir():
        raise ConfigError(f"cannot write {report}: there is no folder {report.parent}")
    on_gpus = engine == "ray" and gpus_per_worker > 0
    settings = Settings.load(
        store=store,
        model=model,
        device="cpu" if on_gpus else device,  # the driver computes nothing
        dtype=dtype or ("bfloat16" if on_gpus else None),
        chunk_tokens=chunk_tokens,
        encoding_context=encoding_context,
        codec=codec,
        prompt_date=prompt_date,
        remote=remote,
        remote_codecs=remote_codecs,
    )
    cluster = RayCluster(address, workers, gpus_per_worker) if engine == "ray" else None
    unread: list[SourceError] = []
    with _there(settings, dry_run) as here, opened(here, tenant=tenant) as cache:
        note_prompt_date(cache)
        computing = _computing(cache, here, cluster, batch_tokens)
        each = read(sources, on_error=unread.append, on_omitted=partial(print_note, "left out"))
        documents = named_if_blank(each)
        with progress() as reporter:
            work = make_plan(
                cache, documents, shard=part, batch_tokens=batch_tokens, progress=reporter
            )
        skipped = [str(e) for e in unread] + [f"{one.document}: {one.why}" for one in work.skipped]
        for line in skipped:
            print_note("skipped", line)
        rate = _rate(cache, work, cluster)
        out.print(corpora.plan_text(work, rate) + smaller(cache), highlight=False, soft_wrap=True)
        if cache.remote is None:
            _check_room(here, work)
        done, state = RunProgress(WorkSize(), work.missing, 0.0), "planned"
        if not dry_run:
            done, state = _run(cache, work, computing, limit)
            out.print(corpora.result_text(done, state), highlight=False, soft_wrap=True)
    found = corpora.precompute_json(work, rate, done, state, skipped)
    if report is not None:
        with open_private(report, "wb") as file:
            file.write((as_json(found) + "\n").encode())
    figures(found)
    if state == "interrupted":
        raise typer.Exit(INTERRUPTED)
    if skipped:
        raise typer.Exit(SKIPPED)


def batch(
    questions: Annotated[
        Path,
        typer.Argument(
            help="File of requests (JSON Lines) in the batch format of OpenAI and vLLM."
        ),
    ],
    to: Annotated[
        Path, typer.Option("--out", help="File for the results, in the order of the requests.")
    ],
    store: Store = None,
    tenant: Tenant = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    mode: Annotated[str | None, typer.Option(help="Fusion method of requests without one.")] = None,
    ratio: Ratio = None,
    top_k: Annotated[int | None, typer.Option(help="Chunks to retrieve.")] = None,
    retrieval: Retrieval = None,
    reranker: Reranker = None,
    max_tokens: Annotated[int | None, typer.Option(help="Maximum tokens of an answer.")] = None,
    require_chunks: RequireChunks = None,
    ram_bytes: Annotated[
        str | None, typer.Option(help="KV that is cached in RAM, such as 4GB; default: 1GiB.")
    ] = None,
    reorder: Annotated[
        bool, typer.Option(help="Answer questions about the same chunks one after another.")
    ] = True,
) -> None:
    """Answer a file of questions. A second run answers those that are left.

    Exit code 3: some requests failed; their results say why. 4: all are answered, but some without
    chunks.
    """
    from ragcache.api.batch_file import iter_answer_batch, read_batch
    from ragcache.core.precompute import drive

    if not to.absolute().parent.is_dir():
        raise ConfigError(f"cannot write {to}: there is no folder {to.parent}")
    settings = Settings.load(
        store=store,
        model=model,
        device=device,
        dtype=dtype,
        mode=mode,
        ratio=ratio,
        top_k=top_k,
        retrieval=retrieval,
        reranker=reranker,
        max_tokens=max_tokens,
        require_chunks=require_chunks,
        ram_bytes=ram_bytes,
    )
    if not settings.ram_bytes:
        settings = settings.model_copy(update={"ram_bytes": ByteSize(1 << 30)})
    requests = read_batch(questions)
    began = time.perf_counter()
    with opened(settings, lazy=True, tenant=tenant) as cache, progress() as reporter:
        done = drive(iter_answer_batch(cache, requests, to, reorder=reorder), reporter)
    seconds = time.perf_counter() - began
    out.print(
        f"{done.requests - done.failed:,} of {render.counted(done.requests, 'request')} answered "
        f"in {render.duration(seconds)}, {done.failed:,} failed, {done.resumed:,} were answered "
        f"before; results in {to}",
        highlight=False,
        soft_wrap=True,
    )
    if done.without:
        print_note(
            "nothing to answer from",
            f"{done.without} of {done.requests} answers are from the model alone: there were no "
            "chunks for them. The field ragcache.no_chunks of their results says why.",
        )
    figures({**asdict(done), "seconds": seconds, "out": to})
    if done.failed or done.without:
        raise typer.Exit(SKIPPED if done.failed else NO_CHUNKS)


def plan_corpora(
    model: Annotated[
        str,
        typer.Option(
            help="Model: a folder, a name on the model hub, or a shape such as llama-3.1-8b."
        ),
    ] = "llama-3.1-8b",
    chunks: Annotated[
        list[float] | None, typer.Option(help="Number of chunks; default: 1e4 to 1e9.")
    ] = None,
    chunk_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each chunk.")] = 256,
    codec: Annotated[
        list[str] | None,
        typer.Option(help="Codec of stored KV; default: raw, cachegen, kvtc16."),
    ] = None,
    link: Annotated[
        str, typer.Option(help="Bandwidth from the store to a GPU, such as 10Gbit/s or 3GB/s.")
    ] = "10Gbit/s",
    ratio: Annotated[
        float, typer.Option(help="Share of the loaded tokens that is recomputed.")
    ] = 0.15,
    tflops: Annotated[float, typer.Option(help="Speed of a GPU in TFLOP/s.")] = 400,
    gpu_hour: Annotated[float, typer.Option(help="Price of a GPU per hour.")] = 2.5,
    gb_month: Annotated[float, typer.Option(help="Price of storage per GB and month.")] = 0.023,
) -> None:
    """Estimate what corpora cost: bytes, prices, GPU hours, and when storing KV pays off.

    --chunks and --codec may be repeated. Nothing is measured.
    """
    from ragcache.sim.sizing import HardwarePrices, estimate_corpus, model_shape, parse_bandwidth

    prices = HardwarePrices(tflops * 1e12, gpu_hour, gb_month, parse_bandwidth(link))
    found = model_shape(model)
    counts = [round(count) for count in chunks or [10**power for power in range(4, 10)]]
    table: list[dict[str, object]] = []
    for name in codec or ("raw", "cachegen", "kvtc16"):
        rows = [
            estimate_corpus(found, count, prices, tokens=chunk_tokens, codec_name=name, ratio=ratio)
            for count in counts
        ]
        said = corpora.sizing_text(rows[0], model, name, chunk_tokens, ratio)
        out.print(said, highlight=False, soft_wrap=True)
        out.print(corpora.sizing_table(rows))
        table += [{"codec": name, **asdict(row)} for row in rows]
    figures({"model": model, "chunk_tokens": chunk_tokens, "ratio": ratio, "corpora": table})


@contextmanager
def _there(settings: Settings, dry_run: bool) -> Iterator[Settings]:
    """``settings``; for a dry run without a store, with a temporary one."""
    if not dry_run or settings.store.exists():
        yield settings
        return
    with tempfile.TemporaryDirectory(prefix="ragcache-") as folder:
        yield settings.model_copy(update={"store": Path(folder) / "store"})


def _computing(
    cache: RagCache, settings: Settings, cluster: RayCluster | None, batch_tokens: int
) -> BatchComputer:
    from ragcache.batch.ray import compute_on_ray
    from ragcache.batch.run import compute_locally
    from ragcache.models.trusted_names import absolute_name

    engine = cache.engine
    if cluster is None:
        return compute_locally(engine)
    return compute_on_ray(
        cluster,
        model=absolute_name(settings.model or cache.catalog.get_setting("model") or ""),
        options={
            "device": "cuda" if cluster.gpus else "cpu",
            "dtype": engine.spec.dtype,
            "codec": dict(engine.fingerprint.fields)["codec"],
        },
        fingerprint=engine.fingerprint,
        spec=engine.spec,
        batch_tokens=batch_tokens,
    )


def _run(
    cache: RagCache, work: PrecomputePlan, computing: BatchComputer, limit: int | None
) -> tuple[RunProgress, Literal["done", "limited", "interrupted"]]:
    """Compute what is missing. Returns what was done, and how it ended."""
    from ragcache.batch.plan import WorkSize
    from ragcache.batch.run import RunProgress, iter_run

    done = RunProgress(WorkSize(), work.missing, 0.0)
    try:
        with progress() as reporter:
            reporter.tokens(0, work.missing.tokens)
            reporter(COMPUTING, 0, work.missing.chunks)
            for (done,) in iter_run(cache.chunks, work, computing, limit=limit):
                reporter.tokens(done.computed.tokens, work.missing.tokens)
                reporter(COMPUTING, done.computed.chunks, work.missing.chunks)
            if cache.remote is not None:
                cache.remote.flush(partial(reporter, "send"))
    except KeyboardInterrupt:
        return done, "interrupted"
    cut = limit is not None and done.computed.chunks >= limit and done.computed != work.missing
    return done, "limited" if cut else "done"


def _rate(cache: RagCache, work: PrecomputePlan, cluster: RayCluster | None) -> float | None:
    """Expected tokens per second; None if only a run can tell."""
    from ragcache.batch.run import measure_tokens_per_second

    if cluster is not None and cluster.gpus:
        return None
    rate = measure_tokens_per_second(cache.engine, work)
    return rate if cluster is None or rate is None else rate * cluster.workers


def _check_room(settings: Settings, work: PrecomputePlan) -> None:
    """Raise ConfigError if the corpus exceeds ``max_bytes``: the store would evict what has just
    been computed."""
    most = settings.max_bytes
    if most is not None and work.wanted.payload_bytes > most:
        raise ConfigError(
            f"the corpus needs {render.size(work.wanted.payload_bytes)} but max_bytes is "
            f"{render.size(most)}: raise it, choose a smaller codec, or a part with --shard"
        )
