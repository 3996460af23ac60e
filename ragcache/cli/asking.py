"""Commands for documents and questions, and to serve them."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
    check_free,
    figures,
    loading,
    named_if_blank,
    opened,
    out,
    progress,
    tell,
    tell_date,
    tell_size,
)
from ragcache.cli.render.answers import answer_table, chunk_table, explanation, layer_table, summary
from ragcache.errors import SourceError
from ragcache.settings import Settings, seconds

if TYPE_CHECKING:
    from ragcache.core.origins import Renamed


def index(
    paths: Annotated[list[Path], typer.Argument(help="Files and folders of documents.")],
    store: Store = None,
    tenant: Tenant = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    embedder: Annotated[str | None, typer.Option(help="sentence-transformers model.")] = None,
    chunk_tokens: Annotated[int | None, typer.Option(help="Longest chunk.")] = None,
    compile_mode: Compile = None,
    codec: Codec = None,
    prompt_date: PromptDate = None,
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
    prune: Annotated[
        bool, typer.Option("--prune", help="Delete documents that are gone from these folders.")
    ] = False,
    root: Annotated[
        Path | None,
        typer.Option(help="Folder that ids are paths below; default: the one above each given."),
    ] = None,
    remote: Remote = None,
    levels: Levels = None,
) -> None:
    """Split, embed and precompute documents. Run again, it does only what is missing.

    Documents whose file is gone stay, which is said, until `ragcache delete` or --prune.
    """
    from ragcache.core import origins
    from ragcache.retriever.source import find

    ttl_s = None if ttl is None else seconds(ttl)
    check_free(Settings.load(store=store).store)
    errors: list[Any] = []
    try:
        on_error = errors.append if skip_errors else None
        sources = find(paths, root=root, on_error=on_error)
        found = sources.read(on_error=on_error, on_omitted=partial(tell, "left out"))
        documents = list(named_if_blank(found))
    except SourceError as unreadable:
        message = f"{unreadable} Or leave such documents out: --skip-errors"
        raise SourceError(message) from unreadable
    for error in errors:
        tell("skipped", error)
    settings = Settings.load(
        store=store,
        model=model,
        device=device,
        dtype=dtype,
        embedder=embedder,
        chunk_tokens=chunk_tokens,
        compile=compile_mode,
        codec=codec,
        prompt_date=prompt_date,
        max_bytes=max_bytes,
        remote=remote,
        levels=levels,
    )
    with opened(settings, tenant=tenant) as cache:
        for moved in origins.check_folders(cache.catalog, sources.folders):
            tell("moved", moved)
        renamed = origins.renamed(cache.indexing, sources, documents)
        tell_date(cache)
        tell_size(cache, cache.indexing.changed(documents))
        with progress() as told:
            added = cache.add(documents, ttl_s=ttl_s, pinned=pin, progress=told, tokens=told.tokens)
            if cache.remote is not None:
                cache.remote.flush(partial(told, "send"))
        origins.record_folders(cache.catalog, sources.folders)
        origins.rename(cache.indexing, renamed)
        _tell_renamed(renamed)
        lost = origins.gone(cache.catalog, sources, [document.id for document in documents])
        _tell_gone(lost, cache.delete(lost) if prune else [])
        _tell_otherwise_named(origins.otherwise_named(cache.catalog, sources))
    done = added.precomputed
    left_out = f", {len(errors)} skipped" if errors else ""
    tokens, took = render.counted(done.tokens, "token"), render.duration(done.seconds)
    work = f" ({tokens}, {render.size(done.payload_bytes)}) in {took}" if done.encoded else ""
    out.print(
        f"{render.counted(added.documents, 'document')} indexed "
        f"({render.counted(added.chunks, 'chunk')}), {added.unchanged:,} unchanged{left_out}; "
        f"KV of {render.counted(done.encoded, 'chunk')} computed{work}, {done.stored:,} were there",
        highlight=False,
        soft_wrap=True,
    )
    figures(
        {
            "documents": added.documents,
            "unchanged": added.unchanged,
            "skipped": [str(error) for error in errors],
            "chunks": added.chunks,
            "precomputed": asdict(done),
        }
    )


def _tell_renamed(renamed: Renamed) -> None:
    if renamed.same:
        before, now = next(iter(renamed.same.items()))
        tell(
            "renamed",
            f"{len(renamed.same)} documents, for ids begin with a folder: {now!r} was {before!r}",
        )
    if renamed.other:
        tell(
            "note",
            f"{len(renamed.other)} documents have an id without a folder, the first is "
            f"{renamed.other[0]!r}, and other texts than the files of that name. They may be "
            "versions of before, and questions find them: `ragcache delete` them if they are.",
        )


def _tell_otherwise_named(others: dict[str, str]) -> None:
    if others:
        other, now = next(iter(others.items()))
        tell(
            "note",
            f"{len(others)} of these documents are in the store under other names too, by another "
            f"folder that was indexed: the first, {now!r}, is {other!r} as well. Questions find "
            "both, and only these here are up to date: `ragcache delete` the others.",
        )


def _tell_gone(lost: list[str], deleted: list[str]) -> None:
    if deleted:
        count = render.counted(len(deleted), "document")
        tell("deleted", f"{count} whose files are gone, such as {deleted[0]!r}")
    elif lost:
        tell(
            "gone",
            f"the files of {render.counted(len(lost), 'document')}, such as {lost[0]!r}. Questions "
            "still find what is in the store: delete it with `ragcache delete`, or --prune here.",
        )


def query(
    question: str,
    store: Store = None,
    tenant: Tenant = None,
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
    require_chunks: RequireChunks = None,
    device: Device = None,
    dtype: Dtype = None,
    remote: Remote = None,
    levels: Levels = None,
) -> None:
    """Answer a question from the indexed documents; the answer streams.

    --compare may be given several times. Exit code 4: there was nothing to answer from.
    """
    from ragcache.api import report_page
    from ragcache.api.serialize import report_json
    from ragcache.blend import blender
    from ragcache.core.request import Request
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
        require_chunks=require_chunks,
        device=device,
        dtype=dtype,
        remote=remote,
        levels=levels,
    )
    sampling = Sampling(
        settings.max_tokens, settings.temperature, settings.top_p, tuple(stop or ()), seed
    )
    request = Request(question, sampling=sampling)
    ratio = None if settings.ratio == "auto" else settings.ratio
    blender(settings.mode, ratio)  # before the model is loaded
    for other in compare or ():
        blender(other)
    if report is not None:
        report_page.check_report_path(report)
    with opened(settings, lazy=True, tenant=tenant) as cache:
        stream = cache.generate(request)
        if stream.no_chunks is not None:
            named = f" --tenant {tenant}" if tenant else ""
            tell(
                "nothing to answer from",
                f"{stream.no_chunks}. What follows is the model's own. Add documents with "
                f"`ragcache index PATH... --store {settings.store}{named}`.",
            )
        begun = False
        for piece in stream:
            text = piece if begun else piece.lstrip()  # many models begin with a space
            begun = begun or bool(text)
            out.print(text, end="", highlight=False, soft_wrap=True)
        out.print()
        answer = stream.answer
        answers = {settings.mode: answer}
        for other in compare or ():
            answers[other] = cache.generate(replace(request, mode=other)).answer
        if report is not None:
            report_page.write_report(report, question, answers, cache)
    if compare:
        out.print(answer_table(answers))
    for note in answer.report.fallbacks:
        tell("note", note)
    if explain:
        out.print(summary(answer), highlight=False)
        for line in explanation(answer):
            out.print(line, highlight=False, soft_wrap=True)
        out.print(chunk_table(answer))
        out.print(layer_table(answer.report, out.width))
    found = {
        mode: {"answer": one.text.strip(), "report": report_json(one)}
        for mode, one in answers.items()
    }
    figures({"question": question, **found.pop(settings.mode), "compared": found})
    if answer.report.no_chunks is not None:
        raise typer.Exit(NO_CHUNKS)


def demo(
    questions: Annotated[int, typer.Option(help="Held-out questions in the table.")] = 200,
) -> None:
    """Index, precompute, ask in every mode, compare: no GPU, no model hub."""
    from ragcache.cli.demo import run

    found = run(out, progress, questions)
    figures({"figures": [one.as_json() for one in found]})


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
    require_chunks: RequireChunks = None,
    ram_bytes: Annotated[
        str | None, typer.Option(help="KV of each tenant held in RAM, such as 4GB.")
    ] = None,
    remote: Remote = None,
    levels: Levels = None,
) -> None:
    """Serve over HTTP, OpenAI's chat completions among others; docs/serving.md has the routes."""
    check_free(Settings.load(store=store).store)
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
            require_chunks=require_chunks,
            ram_bytes=ram_bytes,
            remote=remote,
            levels=levels,
        ),
        loading,
    )
