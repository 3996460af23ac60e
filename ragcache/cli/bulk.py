"""Commands for whole corpora and lists of questions, and for what they will take."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from pydantic import ByteSize

from ragcache.cli import render
from ragcache.cli.options import (
    NO_CHUNKS,
    Codec,
    Compile,
    Device,
    Dtype,
    Levels,
    Model,
    PromptDate,
    Ratio,
    Remote,
    RequireChunks,
    Store,
    Tenant,
    figures,
    named_if_blank,
    opened,
    out,
    progress,
    smaller,
    tell,
    tell_date,
)
from ragcache.cli.output import INTERRUPTED, as_json
from ragcache.cli.render import corpora
from ragcache.cli.render.stages import COMPUTING
from ragcache.errors import ConfigError, SourceError
from ragcache.settings import Settings
from ragcache.util.private_file import private

if TYPE_CHECKING:
    from ragcache.batch.plan import Work
    from ragcache.batch.ray import Cluster
    from ragcache.batch.run import Computing, Done
    from ragcache.rag import RagCache

SKIPPED = 3  # exit code; 0: all that was to be is stored, 1: see the message


def precompute(
    sources: Annotated[
        list[Path],
        typer.Argument(help="Files, folders, data sets on disk; - is JSON Lines from stdin."),
    ],
    store: Store = None,
    tenant: Tenant = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    chunk_tokens: Annotated[int | None, typer.Option(help="Longest chunk.")] = None,
    compile_mode: Compile = None,
    codec: Codec = None,
    prompt_date: PromptDate = None,
    remote: Remote = None,
    levels: Levels = None,
    batch_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of chunks computed in one forward.")
    ] = 2048,
    shard: Annotated[str, typer.Option(help="i/n: the i-th of n parts of the work.")] = "1/1",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many chunks; no batch is cut.")
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Say what there is to do, and do nothing.")] = False,
    report: Annotated[Path | None, typer.Option(help="Write plan and outcome here (JSON).")] = None,
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="Compute in this process, or on Ray.")
    ] = "local",
    address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster; default: one on this machine.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Workers on Ray.")] = 1,
    gpus_per_worker: Annotated[float, typer.Option(min=0, help="GPUs of each.")] = 0,
) -> None:
    """Compute the KV of documents, without indexing them. Run again, it does only what is missing.

    Killed at any moment, nothing is lost but the batches under way. Exit code 3: all is done but
    documents that were skipped; 130: interrupted.
    """
    from ragcache.batch.plan import Shard, Size, plan
    from ragcache.batch.ray import Cluster
    from ragcache.batch.run import Done
    from ragcache.retriever.source import read

    part = Shard.parse(shard)
    if dry_run and prompt_date:
        raise ConfigError(
            "--dry-run changes nothing, and --prompt-date does: leave one of them out"
        )
    if report is not None and not report.absolute().parent.is_dir():
        raise ConfigError(f"cannot write {report}: there is no folder {report.parent}")
    on_gpus = engine == "ray" and gpus_per_worker > 0
    settings = Settings.load(
        store=store,
        model=model,
        device="cpu" if on_gpus else device,  # of the driver, which computes nothing
        dtype=dtype or ("bfloat16" if on_gpus else None),
        chunk_tokens=chunk_tokens,
        compile=compile_mode,
        codec=codec,
        prompt_date=prompt_date,
        remote=remote,
        levels=levels,
    )
    cluster = Cluster(address, workers, gpus_per_worker) if engine == "ray" else None
    unread: list[SourceError] = []
    with _there(settings, dry_run) as here, opened(here, tenant=tenant) as cache:
        tell_date(cache)
        computing = _computing(cache, here, cluster, batch_tokens)
        each = read(sources, on_error=unread.append, on_omitted=partial(tell, "left out"))
        documents = named_if_blank(each)
        with progress() as told:
            work = plan(cache, documents, shard=part, batch_tokens=batch_tokens, progress=told)
        skipped = [str(e) for e in unread] + [f"{one.document}: {one.why}" for one in work.skipped]
        for line in skipped:
            tell("skipped", line)
        rate = _rate(cache, work, cluster)
        out.print(corpora.plan_text(work, rate) + smaller(cache), highlight=False, soft_wrap=True)
        if cache.remote is None:
            _check_room(here, work)
        done, state = Done(Size(), work.missing, 0.0), "planned"
        if not dry_run:
            done, state = _run(cache, work, computing, limit)
            out.print(corpora.done_text(done, state), highlight=False, soft_wrap=True)
    found = corpora.report_json(work, rate, done, state, skipped)
    if report is not None:
        with private(report, "wb") as file:
            file.write((as_json(found) + "\n").encode())
    figures(found)
    if state == "interrupted":
        raise typer.Exit(INTERRUPTED)
    if skipped:
        raise typer.Exit(SKIPPED)


def batch(
    questions: Annotated[
        Path,
        typer.Argument(help="Requests (JSON Lines), as OpenAI's and vLLM's batches have them."),
    ],
    to: Annotated[Path, typer.Option("--out", help="File of the results, in the same order.")],
    store: Store = None,
    tenant: Tenant = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    mode: Annotated[str | None, typer.Option(help="A fusion method, where none is named.")] = None,
    ratio: Ratio = None,
    top_k: Annotated[int | None, typer.Option(help="Chunks to retrieve.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer.")] = None,
    require_chunks: RequireChunks = None,
    ram_bytes: Annotated[
        str | None, typer.Option(help="KV held in RAM between questions; default: 1GiB.")
    ] = None,
    reorder: Annotated[
        bool, typer.Option(help="Answer questions on the same chunks one after another.")
    ] = True,
) -> None:
    """Answer a file of questions. Run again after it was stopped, it answers those that are left.

    Exit code 3: some requests cannot be answered; their results say why. 4: all are answered, some
    of them from nothing.
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
        max_tokens=max_tokens,
        require_chunks=require_chunks,
        ram_bytes=ram_bytes,
    )
    if not settings.ram_bytes:
        settings = settings.model_copy(update={"ram_bytes": ByteSize(1 << 30)})
    requests = read_batch(questions)
    began = time.perf_counter()
    with opened(settings, lazy=True, tenant=tenant) as cache, progress() as told:
        done = drive(iter_answer_batch(cache, requests, to, reorder=reorder), told)
    seconds = time.perf_counter() - began
    out.print(
        f"{done.requests - done.failed:,} of {render.counted(done.requests, 'request')} answered "
        f"in {render.duration(seconds)}, {done.failed:,} failed, {done.resumed:,} were done before"
        f"; results in {to}",
        highlight=False,
        soft_wrap=True,
    )
    if done.without:
        tell(
            "nothing to answer from",
            f"{done.without} of {done.requests} answers are the model's own: no chunks were found "
            "for them, or given. Their results say why in ragcache.no_chunks.",
        )
    figures({**asdict(done), "seconds": seconds, "out": to})
    if done.failed or done.without:
        raise typer.Exit(SKIPPED if done.failed else NO_CHUNKS)


def plan_corpora(
    model: Annotated[
        str, typer.Option(help="Folder, name of a model hub, or a shape such as llama-3.1-8b.")
    ] = "llama-3.1-8b",
    chunks: Annotated[
        list[float] | None, typer.Option(help="How many; default: 1e4 to 1e9.")
    ] = None,
    chunk_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a chunk.")] = 256,
    codec: Annotated[
        list[str] | None, typer.Option(help="How KV is stored; default: raw and cachegen.")
    ] = None,
    link: Annotated[
        str, typer.Option(help="From the store to a GPU, such as 10Gbit/s or 3GB/s.")
    ] = "10Gbit/s",
    ratio: Annotated[
        float, typer.Option(help="Share that is recomputed of what is loaded.")
    ] = 0.15,
    tflops: Annotated[float, typer.Option(help="10^12 FLOPs a second that a GPU reaches.")] = 400,
    gpu_hour: Annotated[float, typer.Option(help="Price of a GPU for an hour.")] = 2.5,
    gb_month: Annotated[float, typer.Option(help="Price of 10^9 bytes for a month.")] = 0.023,
) -> None:
    """What corpora of some sizes take: bytes, prices, GPU hours, and when keeping KV pays.

    --chunks and --codec may be given several times. Nothing is measured here.
    """
    from ragcache.sim.sizing import Prices, rate, shape, sizing

    prices = Prices(tflops * 1e12, gpu_hour, gb_month, rate(link))
    found = shape(model)
    counts = [round(count) for count in chunks or [10**power for power in range(4, 10)]]
    table: list[dict[str, Any]] = []
    for name in codec or ("raw", "cachegen"):
        rows = [
            sizing(found, count, prices, tokens=chunk_tokens, codec_name=name, ratio=ratio)
            for count in counts
        ]
        said = corpora.sizing_text(rows[0], model, name, chunk_tokens, ratio)
        out.print(said, highlight=False, soft_wrap=True)
        out.print(corpora.sizing_table(rows))
        table += [{"codec": name, **asdict(row)} for row in rows]
    figures({"model": model, "chunk_tokens": chunk_tokens, "ratio": ratio, "corpora": table})


@contextmanager
def _there(settings: Settings, dry_run: bool) -> Iterator[Settings]:
    """The same, but for a store that is gone afterwards where there is none and shall be none."""
    if not dry_run or settings.store.exists():
        yield settings
        return
    with tempfile.TemporaryDirectory(prefix="ragcache-") as folder:
        yield settings.model_copy(update={"store": Path(folder) / "store"})


def _computing(
    cache: RagCache, settings: Settings, cluster: Cluster | None, batch_tokens: int
) -> Computing:
    from ragcache.batch.ray import on_ray
    from ragcache.batch.run import in_process
    from ragcache.models import model_path

    engine = cache.engine
    if cluster is None:
        return in_process(engine)
    name = settings.model or cache.catalog.get_setting("model") or ""
    path = Path(model_path(name))
    return on_ray(
        cluster,
        model=str(path.resolve()) if path.is_dir() else name,
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
    cache: RagCache, work: Work, computing: Computing, limit: int | None
) -> tuple[Done, Literal["done", "limited", "interrupted"]]:
    """What was done, and how it ended."""
    from ragcache.batch.plan import Size
    from ragcache.batch.run import Done, running

    done = Done(Size(), work.missing, 0.0)
    try:
        with progress() as told:
            told.tokens(0, work.missing.tokens)
            told(COMPUTING, 0, work.missing.chunks)
            for (done,) in running(cache.chunks, work, computing, limit=limit):
                told.tokens(done.computed.tokens, work.missing.tokens)
                told(COMPUTING, done.computed.chunks, work.missing.chunks)
            if cache.remote is not None:
                cache.remote.flush(partial(told, "send"))
    except KeyboardInterrupt:
        return done, "interrupted"
    cut = limit is not None and done.computed.chunks >= limit and done.computed != work.missing
    return done, "limited" if cut else "done"


def _rate(cache: RagCache, work: Work, cluster: Cluster | None) -> float | None:
    """Tokens per second to expect; None where that is not known before it runs."""
    from ragcache.batch.run import tokens_per_second

    if cluster is not None and cluster.gpus:
        return None
    rate = tokens_per_second(cache.engine, work)
    return rate if cluster is None or rate is None else rate * cluster.workers


def _check_room(settings: Settings, work: Work) -> None:
    """Raise ConfigError where the store may not hold what the corpus needs: it would evict what
    has just been computed."""
    most = settings.max_bytes
    if most is not None and work.wanted.payload_bytes > most:
        raise ConfigError(
            f"the corpus needs {render.size(work.wanted.payload_bytes)} and max_bytes is "
            f"{render.size(most)}: raise it, take a smaller codec, or a part with --shard"
        )
