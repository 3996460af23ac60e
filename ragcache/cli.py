"""The command line."""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ragcache import bulk, show
from ragcache.errors import ConfigError, RagCacheError, StoreError
from ragcache.options import (
    Codec,
    Compile,
    Device,
    Dtype,
    Levels,
    Model,
    Ratio,
    Remote,
    Store,
    check_exists,
    err,
    opened,
    out,
)
from ragcache.settings import Settings, seconds

if TYPE_CHECKING:
    from ragcache.store import DiskStore
    from ragcache.store.remote import RemoteStore

app = typer.Typer(
    help="Reuse the KV of retrieved chunks in any RAG prompt.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point. What goes wrong on purpose is one message and exit code 1, not a traceback."""
    if not sys.stderr.isatty():  # keep other libraries' progress bars out of logs and pipes
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except RagCacheError as error:
        err.print(f"[bold red]error:[/] {error}", highlight=False, soft_wrap=True)
        sys.exit(1)


@app.command()
def index(
    paths: Annotated[list[Path], typer.Argument(help="Files and folders of documents.")],
    store: Store = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    embedder: Annotated[str | None, typer.Option(help="sentence-transformers model.")] = None,
    chunk_tokens: Annotated[int | None, typer.Option(help="Longest chunk.")] = None,
    compile_mode: Compile = None,
    codec: Codec = None,
    ttl: Annotated[
        str | None, typer.Option(help="Delete the documents after this long: 90s, 12h, 30d.")
    ] = None,
    pin: Annotated[
        bool | None, typer.Option("--pin/--unpin", help="Whether their KV may not be evicted.")
    ] = None,
    max_bytes: Annotated[
        str | None, typer.Option(help="KV that the store may hold, such as 50GB.")
    ] = None,
    skip_errors: Annotated[
        bool, typer.Option(help="Report documents that cannot be read, and go on.")
    ] = False,
    remote: Remote = None,
    levels: Levels = None,
) -> None:
    """Split, embed and precompute documents. Run again, it does only what is missing."""
    from ragcache.retriever.source import read

    ttl_s = None if ttl is None else seconds(ttl)
    errors: list[Any] = []
    documents = list(read(paths, on_error=errors.append if skip_errors else None))
    for error in errors:
        err.print(f"[yellow]skipped:[/] {error}", highlight=False, soft_wrap=True)
    settings = Settings.load(
        store=store,
        model=model,
        device=device,
        dtype=dtype,
        embedder=embedder,
        chunk_tokens=chunk_tokens,
        compile=compile_mode,
        codec=codec,
        max_bytes=max_bytes,
        remote=remote,
        levels=levels,
    )
    with opened(settings) as cache, show.progress(err) as told:
        added = cache.add(documents, ttl_s=ttl_s, pinned=pin, progress=told)
        if cache.remote is not None:
            cache.remote.flush(partial(told, "send"))
    done = added.precomputed
    out.print(
        f"{added.documents} documents indexed ({added.chunks} chunks), {added.unchanged} "
        f"unchanged; KV of {done.encoded} chunks computed ({done.tokens} tokens, "
        f"{show.size(done.payload_bytes)}), {done.stored} were there; {done.seconds:.1f} s",
        highlight=False,
    )


@app.command()
def query(
    question: str,
    store: Store = None,
    model: Model = None,
    mode: Annotated[
        str | None, typer.Option(help="A fusion method, such as full, reuse or cacheblend.")
    ] = None,
    ratio: Ratio = None,
    top_k: Annotated[int | None, typer.Option(help="Chunks to retrieve.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling, in (0, 1].")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    explain: Annotated[bool, typer.Option(help="Show what was reused, and the cost.")] = False,
    report: Annotated[
        Path | None, typer.Option(help="Write a page (.html) that shows it, with all text used.")
    ] = None,
    compare: Annotated[
        list[str] | None, typer.Option(help="Ask in this mode too, with its own ratio.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    remote: Remote = None,
    levels: Levels = None,
) -> None:
    """Answer a question from the indexed documents; the answer streams.

    --compare may be given several times.
    """
    from ragcache.api import page
    from ragcache.blend import blender
    from ragcache.types import Sampling

    settings = Settings.load(
        store=store,
        model=model,
        mode=mode,
        ratio=ratio,
        top_k=top_k,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        device=device,
        dtype=dtype,
        remote=remote,
        levels=levels,
    )
    sampling = Sampling(
        settings.max_tokens, settings.temperature, settings.top_p, tuple(stop or ()), seed
    )
    ratio = None if settings.ratio == "auto" else settings.ratio
    blender(settings.mode, ratio)  # before the model is loaded
    for other in compare or ():
        blender(other)
    if report is not None:
        page.check(report)
    with opened(settings, must_exist=True) as cache:
        stream = cache.stream(question, sampling=sampling)
        for piece in stream:
            out.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
        out.print()
        answer = stream.answer
        answers = {settings.mode: answer}
        for other in compare or ():
            answers[other] = cache.ask(question, mode=other, sampling=sampling)
        if report is not None:
            page.write(report, question, answers, cache)
    if compare:
        out.print(show.answer_table(answers))
    for note in answer.report.fallbacks:
        err.print(f"[yellow]note:[/] {note}", highlight=False, soft_wrap=True)
    if explain:
        out.print(show.summary(answer), highlight=False)
        for line in show.explanation(answer):
            out.print(line, highlight=False, soft_wrap=True)
        out.print(show.chunk_table(answer))
        out.print(show.layer_table(answer.report))


@app.command("eval")
def evaluate(
    dataset: Annotated[
        list[Path] | None,
        typer.Option(help="prompts.jsonl or CacheBlend's JSON; default: the small world."),
    ] = None,
    mode: Annotated[list[str] | None, typer.Option(help="Modes; default: all.")] = None,
    ratio: Annotated[
        list[float] | None, typer.Option(help="Shares of chunk tokens to recompute, 0 to 1.")
    ] = None,
    against: Annotated[str | None, typer.Option(help="Also show differences to this mode.")] = None,
    limit: Annotated[int | None, typer.Option(help="Questions per dataset; default: all.")] = None,
    compile_mode: Compile = None,
    codec: Codec = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 32,
    processes: Annotated[
        int, typer.Option(help="Share the questions out; each process loads the model.")
    ] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write figures here.")] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="Draw quality against budget: .png or .svg.")
    ] = None,
) -> None:
    """Quality and cost of every mode over questions with given chunks.

    --dataset, --mode and --ratio may be given several times.
    """
    from ragcache import plot
    from ragcache.dataset import load_all
    from ragcache.evaluate import compare, modes
    from ragcache.models import world

    settings = Settings.load(
        model=model, device=device, dtype=dtype, compile=compile_mode, codec=codec
    )
    chosen = modes(mode or (), ratio or ())
    datasets = load_all(dataset or [world("prompts.jsonl")], limit)
    if plot_file is not None:
        plot.check(plot_file)
    for file in filter(None, (json_file, plot_file)):
        if not file.absolute().parent.is_dir():
            raise ConfigError(f"cannot write {file}: there is no folder {file.parent}")
    with show.progress(err) as told:
        done = dict(
            compare(
                settings,
                datasets,
                chosen,
                against=against,
                max_tokens=max_tokens,
                processes=processes,
                progress=told,
            )
        )
    for name, figures in done.items():
        for table in show.score_tables(figures, name):
            out.print(table)
    if json_file is not None:
        rows = [{"dataset": name} | f.as_json() for name, figures in done.items() for f in figures]
        json_file.write_text(json.dumps(rows, indent=2) + "\n")
    if plot_file is not None:
        plot.draw(done, plot_file)


@app.command()
def calibrate(
    questions: Annotated[
        Path | None,
        typer.Argument(
            help="Your questions: a text file, one a line, asked over the store; or a file of "
            "prompts with chunks (.jsonl, .json). Default: the small world's."
        ),
    ] = None,
    store: Store = None,
    mode: Annotated[
        list[str] | None, typer.Option(help="Modes to try, at several ratios; default: fused.")
    ] = None,
    keep: Annotated[
        float, typer.Option(help="Share of full prefill's answers to keep, 0 to 1.")
    ] = 0.95,
    limit: Annotated[int, typer.Option(help="Questions.")] = 50,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 32,
    processes: Annotated[
        int, typer.Option(help="Share the questions out; each process loads the model.")
    ] = 1,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Find the least ratio that keeps full prefill's answers: needs questions, no answers.

    --mode may be given several times.
    """
    from ragcache import calibrate as choosing
    from ragcache.dataset import load
    from ragcache.models import world

    settings = Settings.load(store=store, model=model, device=device, dtype=dtype)
    choosing.candidates(mode or ())  # before anything is loaded
    path = questions or world("prompts.jsonl")
    if path.suffix in {".jsonl", ".json"}:
        contexts = load(path)
    else:
        with opened(settings, must_exist=True) as cache:
            contexts = choosing.retrieved(path, cache)
            settings = choosing.of_store(settings, cache)
    with show.progress(err) as told:
        found = choosing.calibrate(
            settings,
            contexts,
            mode or ["fused"],
            limit=limit,
            max_tokens=max_tokens,
            processes=processes,
            progress=told,
        )
    out.print(show.curve_table(found))
    out.print(show.choice(choosing.least(found, keep), keep), highlight=False, soft_wrap=True)


@app.command()
def demo(
    questions: Annotated[int, typer.Option(help="Held-out questions in the table.")] = 200,
) -> None:
    """Index, precompute, ask in every mode, compare: no GPU, no model hub."""
    from ragcache.demo import run

    run(out, err, questions)


@app.command()
def serve(
    store: Store = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    host: Annotated[str | None, typer.Option(help="Address; other than loopback: keys.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0: any that is free.")] = None,
    keys: Annotated[
        Path | None, typer.Option(help="File of API keys: name:key, one a line.")
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="embedded, or vllm: servers at --base-url.")
    ] = None,
    base_url: Annotated[
        list[str] | None, typer.Option(help="A vLLM server; again for each one more.")
    ] = None,
    queue: Annotated[int | None, typer.Option(help="Questions of a tenant that may wait.")] = None,
    streams: Annotated[int | None, typer.Option(help="Answers under way at a time.")] = None,
    timeout: Annotated[
        str | None, typer.Option(help="How long an answer may take: 90s, 5m.")
    ] = None,
    mode: Annotated[
        str | None, typer.Option(help="A fusion method, such as full, reuse or cacheblend.")
    ] = None,
    ratio: Ratio = None,
    ram_bytes: Annotated[
        str | None, typer.Option(help="KV of each tenant held in RAM, such as 4GB.")
    ] = None,
    remote: Remote = None,
    levels: Levels = None,
) -> None:
    """Serve over HTTP, OpenAI's chat completions among others; docs/serving.md has the routes."""
    from ragcache.api.serve import serve as run

    run(
        Settings.load(
            store=store,
            model=model,
            device=device,
            dtype=dtype,
            host=host,
            port=port,
            keys=keys,
            engine=engine,
            vllm_url=",".join(base_url) if base_url else None,
            queue=queue,
            streams=streams,
            timeout_s=None if timeout is None else seconds(timeout),
            mode=mode,
            ratio=ratio,
            ram_bytes=ram_bytes,
            remote=remote,
            levels=levels,
        )
    )


@app.command()
def documents(store: Store = None) -> None:
    """List the documents of a store."""
    from ragcache.store import Catalog

    with _store(store, readonly=True) as chunks:
        out.print(show.document_table(Catalog(chunks).entries()))


@app.command()
def delete(
    ids: Annotated[list[str], typer.Argument(help="Documents, as `ragcache documents` has them.")],
    store: Store = None,
    remote: Remote = None,
) -> None:
    """Delete documents, their chunks, and the KV that no other document uses, there and here."""
    from ragcache.store import Catalog

    has_remote = Settings.load(remote=remote).remote
    with _shared(store, remote) if has_remote else _store(store) as chunks:
        catalog = Catalog(chunks)
        missing = [name for name in ids if not catalog.delete_document(name)]
    out.print(f"{len(ids) - len(missing)} documents deleted", highlight=False)
    if missing:
        raise StoreError(
            f"there is no document {', '.join(map(repr, missing))}: `ragcache documents` lists them"
        )


@app.command()
def verify(
    store: Store = None,
    repair: Annotated[
        bool, typer.Option(help="Drop what is damaged: it is computed anew.")
    ] = False,
) -> None:
    """Read every record of a store and report what is damaged; exit code 1 if anything is left."""
    with _store(store, readonly=not repair) as chunks:
        with show.progress(err) as told:
            bad = chunks.verify(repair=repair, progress=partial(told, "verify"))
        count = chunks.stats().chunks
    for digest, wrong in bad.items():
        out.print(f"{digest[:16]}  {wrong}", highlight=False)
    done = "dropped" if repair else "damaged"
    out.print(f"{count} chunks, {len(bad)} records {done}", highlight=False)
    if bad and not repair:
        raise typer.Exit(1)


@app.command()
def convert(
    layout: Annotated[str, typer.Argument(help="records, files, or auto: by the layers' size.")],
    store: Store = None,
) -> None:
    """Move every chunk into LMDB, or into a file of its own; what is there stays usable."""
    from ragcache.store.disk import as_layout

    wanted = as_layout(layout)
    with _store(store) as chunks, show.progress(err) as told:
        moved = chunks.convert(wanted, progress=partial(told, "convert"))
    out.print(f"{moved} chunks moved", highlight=False)


@app.command()
def compact(store: Store = None) -> None:
    """Give unused space in a store back to the file system; readers may go on meanwhile."""
    with _store(store) as chunks:
        before, after = chunks.compact()
    out.print(f"{show.size(before)} before, {show.size(after)} now", highlight=False)


@app.command()
def push(
    store: Store = None, remote: Remote = None, levels: Levels = None, model: Model = None
) -> None:
    """Write chunks that are in the store and not in the remote there.

    With --levels, for which the model is loaded, those of documents also in these codecs.
    """
    settings = Settings.load(store=store, remote=remote, levels=levels, model=model)
    from ragcache.store.transfer import push as run

    with ExitStack() as stack:
        told = stack.enter_context(show.progress(err))
        if settings.levels:
            cache = stack.enter_context(opened(settings, must_exist=True))
            both, wanted = cache.remote, cache.levels()
        else:
            both, wanted = stack.enter_context(_shared(store, remote)), {}
        both.flush(partial(told, "send"))
        done = run(both.disk, both.objects, levels=wanted, told=partial(told, "push"))
        out.print(show.moved(done, "pushed"), highlight=False)


@app.command()
def pull(
    store: Store = None,
    remote: Remote = None,
    every: Annotated[
        bool, typer.Option("--all", help="Of all texts, not of this store's documents alone.")
    ] = False,
) -> None:
    """Bring chunks of the store's documents from the remote, as many as the store may hold."""
    from ragcache.store import Catalog
    from ragcache.store.transfer import pull as run

    with _shared(store, remote, bounded=True) as both, show.progress(err) as told:
        catalog = Catalog(both.disk)
        limit = both.disk.quota.total
        done = run(
            both.disk,
            both.objects,
            contents=None if every else catalog.contents(),
            codec=catalog.get_setting("codec") or "raw",
            room=None if limit is None else limit - both.stats().payload_bytes,
            told=partial(told, "pull"),
        )
    out.print(show.moved(done, "pulled"), highlight=False)


@app.command()
def stats(store: Store = None, remote: Remote = None) -> None:
    """What a store holds, and what its remote does."""
    with _store(store, readonly=True) as chunks:
        out.print(show.store_table(chunks))
    if url := Settings.load(remote=remote).remote:
        from ragcache.store.bucket import Bucket
        from ragcache.store.objects import ChunkObjects

        sizes = [size for _, size in ChunkObjects(Bucket(url)).names()]
        out.print(f"{url}: {len(sizes)} chunks, {show.size(sum(sizes))}", highlight=False)


@app.command()
def doctor(store: Store = None, model: Model = None) -> None:
    """Look at a store and the machine under it; exit code 1 if something is bad."""
    from ragcache.doctor import examine
    from ragcache.engine.transformers import TransformersEngine
    from ragcache.models import model_path
    from ragcache.store import Catalog

    with _store(store) as chunks:
        name = model or Catalog(chunks).get_setting("model")
        codec = Catalog(chunks).get_setting("codec") or "raw"
        engine = TransformersEngine.load(model_path(name), codec=codec) if name else None
        found = list(examine(chunks, engine))
    out.print(show.finding_table(found))
    if any(finding.state == "bad" for finding in found):
        raise typer.Exit(1)


@app.command()
def profile(
    store: Store = None, model: Model = None, device: Device = None, dtype: Dtype = None
) -> None:
    """Measure anew how fast the model computes and its KV loads: what `--ratio auto` goes by."""
    settings = Settings.load(store=store, model=model, device=device, dtype=dtype)
    with opened(settings, must_exist=True) as cache:
        speeds = cache.speeds(anew=True)
    if speeds is None:
        raise StoreError(
            f"{settings.store} holds no KV that this model can use, so there is no loading to "
            "measure. Run `ragcache index` first."
        )
    out.print(show.speed_table(speeds))


@app.command()
def simulate(
    trace: Annotated[
        str, typer.Argument(help="A file of requests (JSON Lines), or made up: zipf or scans.")
    ],
    capacity: Annotated[
        list[str] | None,
        typer.Option(help="Sizes of the store; default: 5, 10 and 25 % of what is asked for twice"),
    ] = None,
    replicas: Annotated[
        list[int] | None,
        typer.Option(help="Instead: the trace over so many replicas, each with this much RAM."),
    ] = None,
    model: Model = None,
) -> None:
    """What stores of some sizes would save, under every eviction policy and at best.

    A line of a trace: {"chunks": [{"id": "a#0", "tokens": 123}, ...]}
    """
    from ragcache.engine.transformers import TransformersEngine
    from ragcache.figures import routing_table
    from ragcache.models import TINY, model_path
    from ragcache.offline.routing import POLICIES, route
    from ragcache.settings import size
    from ragcache.simulate import Model as Costs
    from ragcache.simulate import report, working_set
    from ragcache.trace import MADE_UP, load

    asked = MADE_UP[trace]() if trace in MADE_UP else load(Path(trace))
    given = [size(text) for text in capacity or ()]
    engine = TransformersEngine.load(model_path(Settings.load(model=model).model or TINY))
    costs = Costs(engine.spec, engine.parameters, engine.heads)
    whole = working_set(asked, costs)
    sizes = given or [max(1, whole * share // 100) for share in (5, 10, 25)]
    if replicas:
        for ram in sizes:
            held = ram // costs.size(1)
            routed = [route(asked, p, count, held) for count in replicas for p in POLICIES]
            out.print(f"{show.size(ram)} in RAM each")
            out.print(routing_table(routed))
        return
    out.print(show.simulation_table(report(asked, costs, sizes), whole))


@app.command()
def models(model: Model = None, store: Store = None, device: Device = None) -> None:
    """What a model's KV depends on, what it costs, and how much of a store it can use."""
    from ragcache.engine.transformers import TransformersEngine
    from ragcache.models import TINY, model_path
    from ragcache.store.disk import DiskStore

    settings = Settings.load(model=model, store=store, device=device)
    name = settings.model or TINY
    engine = TransformersEngine.load(model_path(name), device=settings.device)
    spec = engine.spec
    out.print(f"[bold]{engine.fingerprint}[/]", highlight=False)
    out.print(
        f"{spec.layers} layers, {spec.kv_heads} KV heads of {spec.head_dim}, {spec.dtype}; "
        f"{show.size(spec.chunk_bytes(1))} per token; context of {engine.context_tokens} tokens",
        highlight=False,
    )
    for key, value in engine.fingerprint.fields:
        out.print(f"  {key:10} {value}", highlight=False, soft_wrap=True)
    if settings.store.exists():
        with DiskStore(settings.store, readonly=True) as chunks:
            for built, count in chunks.stats().fingerprints.items():
                out.print(f"{settings.store}: {count} chunks built for {built}", highlight=False)


app.command()(bulk.precompute)
app.command()(bulk.batch)
app.command("plan")(bulk.plan_)


def _store(path: Path | None, *, readonly: bool = False, bounded: bool = False) -> DiskStore:
    """A store without a model, perhaps with its quota; StoreError if there is none."""
    from ragcache.store import DiskStore
    from ragcache.store.capacity import UNBOUNDED, Quota

    settings = Settings.load(store=path)
    check_exists(settings.store)
    quota = Quota(settings.max_bytes, settings.tenant_bytes) if bounded else UNBOUNDED
    return DiskStore(
        settings.store,
        readonly=readonly,
        layout=settings.layout,
        quota=quota,
        policy=settings.eviction,
    )


def _shared(path: Path | None, remote: str | None, *, bounded: bool = False) -> RemoteStore:
    """A store over its remote, without a model; ConfigError where none is set."""
    url = Settings.load(remote=remote).remote
    if not url:
        raise ConfigError("no remote is set: give --remote, or set RAGCACHE_REMOTE")
    from ragcache.store.remote import shared

    chunks = _store(path, bounded=bounded)
    try:
        return shared(chunks, url)
    except BaseException:
        chunks.close()
        raise
