"""Commands for documents and questions, and to serve them."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ragcache.cli import render
from ragcache.cli.incoming import (
    IncomingDocuments,
    note_deleted,
    note_other_names,
    note_renamed,
)
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
    check_free,
    note_prompt_date,
    opened,
    parse_filter,
    read_schema,
)
from ragcache.cli.output import figures, loading, out, print_note, progress, waiting
from ragcache.cli.render.answers import (
    answer_table,
    chunk_table,
    explanation,
    late,
    layer_table,
    promise,
    reasons,
    summary,
)
from ragcache.errors import SourceError
from ragcache.models import SMOLLM2
from ragcache.settings import ServiceSettings, Settings, seconds


def index(
    paths: Annotated[list[Path], typer.Argument(help="Files and folders of documents.")],
    store: Store = None,
    tenant: Tenant = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    embedder: Annotated[str | None, typer.Option(help="Sentence-transformers model.")] = None,
    chunk_tokens: Annotated[int | None, typer.Option(help="Maximum tokens per chunk.")] = None,
    encoding_context: EncodingContext = None,
    codec: Codec = None,
    prompt_date: PromptDate = None,
    ttl: Annotated[
        str | None, typer.Option(help="Delete the documents after this time: 90s, 12h, 30d.")
    ] = None,
    pin: Annotated[
        bool | None,
        typer.Option("--pin/--unpin", help="Whether their KV is protected from eviction."),
    ] = None,
    max_bytes: Annotated[
        str | None, typer.Option(help="Maximum KV in the store, such as 50GB.")
    ] = None,
    skip_errors: Annotated[
        bool, typer.Option(help="Report documents that cannot be read, and continue.")
    ] = False,
    prune: Annotated[
        bool,
        typer.Option("--prune", help="Delete documents whose files are gone from these folders."),
    ] = False,
    root: Annotated[
        Path | None,
        typer.Option(
            help="Folder that ids are relative to; default: the parent of each given path."
        ),
    ] = None,
    remote: Remote = None,
    remote_codecs: RemoteCodecs = None,
) -> None:
    """Split and embed documents, and compute their KV. A second run does only what is missing.

    Documents whose file is gone stay until `ragcache delete` or --prune.
    """
    from ragcache.core import origins
    from ragcache.retriever.source import find_files

    ttl_s = None if ttl is None else seconds(ttl)
    check_free(Settings.load(store=store).store)
    errors: list[SourceError] = []

    def on_error(error: SourceError) -> None:
        if not skip_errors:
            raise SourceError(f"{error} Or leave such documents out: --skip-errors") from error
        errors.append(error)
        print_note("skipped", error)

    with waiting("looking for files"):
        sources = find_files(paths, root=root, on_error=on_error)
    settings = Settings.load(
        store=store,
        model=model,
        device=device,
        dtype=dtype,
        embedder=embedder,
        chunk_tokens=chunk_tokens,
        encoding_context=encoding_context,
        codec=codec,
        prompt_date=prompt_date,
        max_bytes=max_bytes,
        remote=remote,
        remote_codecs=remote_codecs,
    )
    with opened(settings, tenant=tenant) as cache:
        for moved in origins.check_folders(cache.catalog, sources.folders):
            print_note("moved", moved)
        note_prompt_date(cache)
        with progress() as reporter:
            coming = IncomingDocuments(cache, sources, reporter)
            added = cache.add_stream(
                coming.documents(on_error),
                ttl_s=ttl_s,
                pinned=pin,
                progress=reporter,
                tokens=reporter.tokens,
                before=coming.before,
                after=coming.after,
            )
            if cache.remote is not None:
                cache.remote.flush(partial(reporter, "send"))
        origins.record_folders(cache.catalog, sources.folders)
        origins.delete_old_names(cache.indexing, coming.renamed)
        note_renamed(coming.renamed)
        lost = origins.find_deleted(cache.catalog, sources, coming.ids)
        note_deleted(lost, cache.delete(lost) if prune else [])
        note_other_names(origins.find_other_names(cache.catalog, sources))
        if cache.retriever.is_building:
            with waiting("building the index of the vectors"):
                cache.retriever.finish()
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


def query(
    question: str,
    store: Store = None,
    tenant: Tenant = None,
    model: Model = None,
    mode: Annotated[
        str | None, typer.Option(help="Fusion method, such as full, reuse or cacheblend.")
    ] = None,
    ratio: Ratio = None,
    top_k: Annotated[int | None, typer.Option(help="Chunks to retrieve.")] = None,
    retrieval: Retrieval = None,
    min_score: Annotated[
        float | None, typer.Option(help="Least cosine similarity of a chunk, -1 to 1.")
    ] = None,
    mmr: Annotated[
        float | None,
        typer.Option(help="Choose chunks by maximal marginal relevance, 0 (unlike) to 1."),
    ] = None,
    reranker: Reranker = None,
    rerank: Annotated[
        int | None, typer.Option(help="How many chunks the reranker puts in a new order.")
    ] = None,
    top_tokens: Annotated[
        int | None, typer.Option(help="Maximum tokens of the retrieved chunks.")
    ] = None,
    where: Annotated[
        str | None,
        typer.Option(
            "--filter",
            metavar="JSON",
            help='Metadata of the documents to retrieve from, such as \'{"language": "en"}\'.',
        ),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Maximum tokens of the answer.")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Sampling temperature; 0 is greedy.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Probability mass of nucleus sampling.")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling.")] = None,
    json_schema: Annotated[
        Path | None, typer.Option(help="File with a JSON schema that the answer follows.")
    ] = None,
    explain: Annotated[bool, typer.Option(help="Show what was reused, and what it cost.")] = False,
    report: Annotated[
        Path | None,
        typer.Option(help="Write a page (.html) that shows the prompt and what was reused."),
    ] = None,
    compare: Annotated[
        list[str] | None, typer.Option(help="Also answer with this method, at its default ratio.")
    ] = None,
    require_chunks: RequireChunks = None,
    device: Device = None,
    dtype: Dtype = None,
    remote: Remote = None,
    remote_codecs: RemoteCodecs = None,
) -> None:
    """Answer a question from the indexed documents. The answer is streamed.

    --compare and --stop may be repeated. Exit code 4: there were no chunks to answer from.
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
        retrieval=retrieval,
        min_score=min_score,
        mmr=mmr,
        reranker=reranker,
        rerank=rerank,
        top_tokens=top_tokens,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        require_chunks=require_chunks,
        device=device,
        dtype=dtype,
        remote=remote,
        remote_codecs=remote_codecs,
    )
    sampling = Sampling(
        *(settings.max_tokens, settings.temperature, settings.top_p, tuple(stop or ()), seed),
        json_schema=None if json_schema is None else read_schema(json_schema),
    )
    request = Request(question, sampling=sampling, filter=parse_filter(where))
    share = None if settings.ratio == "auto" else settings.ratio
    blender(settings.mode, share)  # before the model is loaded
    for other in compare or ():
        blender(other)
    if report is not None:
        report_page.check_report_path(report)
    with opened(settings, lazy=True, tenant=tenant) as cache:
        stream = cache.generate(request)
        if stream.no_chunks is not None:
            named = f" --tenant {tenant}" if tenant else ""
            print_note(
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
            report_page.write_report(report, {question: answers}, cache)
    if compare:
        out.print(answer_table(answers))
    for note in answer.report.fallbacks:
        print_note("note", note)
    if explain:
        out.print(summary(answer), highlight=False)
        for line in (*explanation(answer), *late(answer), *promise(answer)):
            out.print(line, highlight=False, soft_wrap=True)
        out.print(chunk_table(answer))
        for line in reasons(answer):
            out.print(line, highlight=False, soft_wrap=True)
        out.print(layer_table(answer.report, out.width))
    found = {
        mode: {"answer": one.text.strip(), "report": report_json(one)}
        for mode, one in answers.items()
    }
    figures({"question": question, **found.pop(settings.mode), "compared": found})
    if answer.report.no_chunks is not None:
        raise typer.Exit(NO_CHUNKS)


def demo(
    model: Annotated[
        str, typer.Option(help="Folder of the model, its name on a model hub, or `tiny`.")
    ] = SMOLLM2,
    store: Annotated[
        Path | None,
        typer.Option(help="Folder of the store, which is kept; default: a temporary folder."),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write a page (.html) that shows all answers.")
    ] = None,
) -> None:
    """Index real articles, ask about them in every mode, and compare: no GPU, no model hub."""
    from ragcache.cli.demo import run

    figures(run(out, progress, model=model, store=store, report=report, loading=loading))


def serve(
    store: Store = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen at; other than loopback needs keys.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Port to listen at; 0 chooses a free one.")
    ] = None,
    keys: Annotated[
        Path | None, typer.Option(help="File of API keys: one name:key per line.")
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            help="What runs the model: embedded (this process), or vllm (servers at --base-url)."
        ),
    ] = None,
    base_url: Annotated[
        list[str] | None, typer.Option(help="URL of a vLLM server; repeat it for several.")
    ] = None,
    queue: Annotated[
        int | None, typer.Option(help="Maximum questions of a tenant that wait.")
    ] = None,
    streams: Annotated[int | None, typer.Option(help="Maximum answers at the same time.")] = None,
    timeout: Annotated[
        str | None, typer.Option(help="Time that a request may take: 90s, 5m.")
    ] = None,
    mode: Annotated[
        str | None, typer.Option(help="Fusion method, such as full, reuse or cacheblend.")
    ] = None,
    ratio: Ratio = None,
    top_k: Annotated[int | None, typer.Option(help="Chunks to retrieve.")] = None,
    retrieval: Retrieval = None,
    reranker: Reranker = None,
    require_chunks: RequireChunks = None,
    ram_bytes: Annotated[
        str | None,
        typer.Option(help="Maximum KV of each tenant that is cached in RAM, such as 4GB."),
    ] = None,
    trust_request_templates: Annotated[
        bool | None,
        typer.Option(
            "--trust-request-templates",
            help="Let requests bring chat templates, which are programs.",
        ),
    ] = None,
    remote: Remote = None,
    remote_codecs: RemoteCodecs = None,
) -> None:
    """Serve over HTTP, with OpenAI's chat completions API; docs/serving.md lists the routes."""
    check_free(Settings.load(store=store).store)
    from ragcache.api.serve import serve as run

    run(
        Settings.load(
            store=store,
            model=model,
            device=device,
            dtype=dtype,
            engine=engine,
            vllm_url=",".join(base_url) if base_url else None,
            mode=mode,
            ratio=ratio,
            top_k=top_k,
            retrieval=retrieval,
            reranker=reranker,
            require_chunks=require_chunks,
            ram_bytes=ram_bytes,
            remote=remote,
            remote_codecs=remote_codecs,
        ),
        ServiceSettings.load(
            host=host,
            port=port,
            keys=keys,
            queue=queue,
            streams=streams,
            trust_request_templates=trust_request_templates,
            timeout_s=None if timeout is None else seconds(timeout),
        ),
        loading,
    )
