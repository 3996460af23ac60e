"""Commands that measure: fusion methods, models, speeds, and eviction policies."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ragcache.cli import render
from ragcache.cli.options import (
    Codec,
    Device,
    Dtype,
    EncodingContext,
    Model,
    Store,
    check_exists,
    check_free,
    opened,
)
from ragcache.cli.output import as_json, figures, loading, out, print_note, progress, waiting
from ragcache.cli.render import corpora, quality
from ragcache.cli.render.stores import built_for, speed_table, store_table
from ragcache.errors import ConfigError, NoChunksError, StoreError
from ragcache.settings import Settings
from ragcache.types import Disagreement

if TYPE_CHECKING:
    from ragcache.core.calibration import Calibration
    from ragcache.eval.dataset import EvalContext


def evaluate(
    dataset: Annotated[
        list[Path] | None,
        typer.Option(
            help="Prompts (.jsonl), or JSON in CacheBlend's format; default: the small world."
        ),
    ] = None,
    mode: Annotated[
        list[str] | None,
        typer.Option(
            help="Fusion methods, and `none`: the question without chunks. Default: full, prefix, "
            "reuse, random, cacheblend and fused."
        ),
    ] = None,
    ratio: Annotated[
        list[float] | None, typer.Option(help="Shares of chunk tokens to recompute, 0 to 1.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Also show differences from this method.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Maximum questions per dataset; default: all.")
    ] = None,
    encoding_context: EncodingContext = None,
    codec: Codec = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    max_tokens: Annotated[int, typer.Option(help="Maximum tokens of an answer.")] = 32,
    instruction: Annotated[
        str,
        typer.Option(
            help="Text before every question, such as how long an answer should be.",
            show_default=False,
        ),
    ] = "",
    processes: Annotated[
        int, typer.Option(help="Processes that share the questions; each loads the model.")
    ] = 1,
    save: Annotated[
        Path | None,
        typer.Option(
            help="Save the outcomes of every question in this file (.jsonl) at once. A second run "
            "asks only the questions that it lacks."
        ),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write the figures into this file (JSON).")
    ] = None,
    plot_file: Annotated[
        Path | None,
        typer.Option("--plot", help="Draw quality against budget into this file (.png or .svg)."),
    ] = None,
    plot_y: Annotated[
        str,
        typer.Option(
            help="What --plot shows: exact_match, f1, pgr, answer_top1 or answer_kl.",
        ),
    ] = "exact_match",
) -> None:
    """Measure the quality and cost of fusion methods on questions with given chunks.

    --dataset, --mode and --ratio may be repeated.
    """
    from ragcache.eval import plot
    from ragcache.eval.dataset import load_datasets
    from ragcache.eval.evaluate import compare, make_blenders
    from ragcache.models import world_file

    settings = Settings.load(
        model=model, device=device, dtype=dtype, encoding_context=encoding_context, codec=codec
    )
    chosen = make_blenders(mode, ratio or ())
    datasets = load_datasets(dataset or [world_file("prompts.jsonl")], limit)
    for name, contexts in datasets.items():
        _check_chunks(contexts, name)
    if plot_file is not None:
        plot.check_plot(plot_file, plot_y)
    written = {"--report": report, "--plot": plot_file, "--save": save}
    files = {option: file for option, file in written.items() if file is not None}
    _check_distinct([*files.items(), *(("--dataset", file) for file in dataset or ())])
    for file in files.values():
        if not file.absolute().parent.is_dir():
            raise ConfigError(f"cannot write {file}: there is no folder {file.parent}")
    with progress() as reporter:
        done = dict(
            compare(
                settings,
                datasets,
                chosen,
                against=against,
                max_tokens=max_tokens,
                instruction=instruction,
                processes=processes,
                progress=reporter,
                save=save,
                note=partial(print_note, "note"),
            )
        )
    for name, found in done.items():
        for table in quality.score_tables(found, name):
            out.print(table)
    rows = [{"dataset": name} | f.as_json() for name, found in done.items() for f in found]
    if report is not None:
        report.write_text(as_json({"figures": rows}) + "\n", encoding="utf-8")
    figures({"figures": rows})
    if plot_file is not None:
        plot.save_plot(done, plot_file, y=plot_y)


def calibrate(
    questions: Annotated[
        Path | None,
        typer.Argument(
            help="Questions: a text file with one per line, for which the store is searched; or "
            "prompts with chunks (.jsonl, .json). Default: those of the small world."
        ),
    ] = None,
    store: Store = None,
    mode: Annotated[
        list[str] | None,
        typer.Option(help="Fusion methods to try, at several ratios; default: fused."),
    ] = None,
    keep: Annotated[
        float, typer.Option(help="Share of answers that must equal full prefill's, 0 to 1.")
    ] = 0.95,
    epsilon: Annotated[
        float | None,
        typer.Option(
            help="Promise that at most this share of answers disagrees with full prefill's, 0 to "
            "1, in place of --keep."
        ),
    ] = None,
    confidence: Annotated[
        float, typer.Option(help="Confidence of the promise of --epsilon, 0 to 1.")
    ] = 0.95,
    disagreement: Annotated[
        Disagreement,
        typer.Option(
            help="When answers disagree, for --epsilon: their normalised texts differ (answer), or "
            "one of their first 16 tokens does (tokens)."
        ),
    ] = "answer",
    escalate: Annotated[
        bool,
        typer.Option(
            "--escalate",
            help="With --epsilon: compute answers by full prefill, before they are streamed, whose "
            "first token is uncertain. It makes lower ratios possible, and needs more questions.",
        ),
    ] = False,
    save: Annotated[
        bool,
        typer.Option(
            "--save",
            help="Record the promise in the store: ratio auto then takes its ratio as the least, "
            "uncertain answers are escalated, and reports say whether an answer is covered.",
        ),
    ] = False,
    limit: Annotated[
        int | None,
        typer.Option(
            help="Maximum questions. Default: 50; with --epsilon all, but one for each list of "
            "chunks.",
            show_default=False,
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            help="Maximum tokens of an answer. Default: 32; with --epsilon as in the settings.",
            show_default=False,
        ),
    ] = None,
    processes: Annotated[
        int, typer.Option(help="Processes that share the questions; each loads the model.")
    ] = 1,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Find the lowest ratio at which answers equal those of full prefill.

    It needs questions, but no answers. --mode may be repeated.
    """
    from ragcache.eval import calibrate as choosing
    from ragcache.eval.dataset import load_dataset
    from ragcache.eval.promise import Promise
    from ragcache.models import world_file

    settings = Settings.load(store=store, model=model, device=device, dtype=dtype)
    choosing.candidates(mode or ())  # before anything is loaded
    promise = None if epsilon is None else Promise(epsilon, confidence)
    if save and promise is None:
        raise ConfigError("--save records a promise: give --epsilon too, such as 0.05")
    if escalate and promise is None:
        raise ConfigError("--escalate is for a promise: give --epsilon too, such as 0.05")
    if save:
        check_free(settings.store)
    path = questions or world_file("prompts.jsonl")
    has_chunks = path.suffix in {".jsonl", ".json"}
    contexts = load_dataset(path) if has_chunks else []
    calibrated = None
    if save or not has_chunks or store is not None:
        with opened(settings, lazy=True) as cache:
            if not has_chunks:
                contexts = choosing.retrieve_contexts(path, cache)
                _check_chunks(contexts, str(path), cache.no_chunks())
            settings = choosing.settings_of_store(settings, cache)
            calibrated = cache.engine.fingerprint, cache.encoding
    if promise is not None:
        contexts = _independent(contexts) if has_chunks else _noted_if_shared(contexts)
    most = max_tokens
    if most is None:
        most = 32 if promise is None else settings.max_tokens
    if limit is None:
        limit = 50 if promise is None else len(contexts)
    with progress() as reporter:
        outcomes = choosing.ask_candidates(
            settings,
            contexts,
            mode or ["fused"],
            limit=limit,
            max_tokens=most,
            processes=processes,
            progress=reporter,
        )
    found = choosing.summaries(outcomes)
    out.print(quality.curve_table(found))
    told: dict[str, object] = {"figures": [one.as_json() for one in found]}
    if promise is None:
        least = choosing.cheapest(found, keep)
        out.print(quality.ratio_advice(least, keep), highlight=False, soft_wrap=True)
        figures({"keep": keep, "least": None if least is None else least.mode, **told})
        return
    tests = choosing.candidate_tests(outcomes, promise, disagreement, escalate=escalate)
    chosen = choosing.cheapest_promised(tests)
    out.print(quality.promise_table(tests, promise))
    for line in quality.promise_advice(tests, promise):
        out.print(line, highlight=False, soft_wrap=True)
    if save and calibrated is not None:
        made = None
        if chosen is not None:
            chunks = choosing.most_chunks(contexts, limit)
            made = choosing.calibration_of(chosen, promise, disagreement, most, *calibrated, chunks)
        _save_calibration(settings.store, made)
    figures(
        {
            "promise": asdict(promise) | {"disagreement": disagreement, "max_tokens": most},
            "least": None if chosen is None else chosen.mode,
            "candidates": [asdict(one) for one in tests],
            "saved": save and chosen is not None,
            **told,
        }
    )


def _independent(contexts: Sequence[EvalContext]) -> list[EvalContext]:
    """One question for each list of chunks, with a note if there were more."""
    from ragcache.eval.calibrate import one_per_context

    kept, total = one_per_context(contexts), sum(len(context.questions) for context in contexts)
    if len(kept) < total:
        print_note(
            "note",
            f"{len(kept)} of {total} questions are asked, one for each list of chunks: questions "
            "over the same chunks are not independent",
        )
    return kept


def _noted_if_shared(contexts: list[EvalContext]) -> list[EvalContext]:
    """``contexts`` of one question each, with a note if some have the same chunks."""
    alike = len(contexts) - len({context.chunks for context in contexts})
    if alike:
        print_note(
            "note",
            f"{alike} of {len(contexts)} questions find the same chunks as another one: the "
            "promise holds if the questions were drawn at random from those that are asked, not "
            "written for these chunks",
        )
    return contexts


def _save_calibration(path: Path, made: Calibration | None) -> None:
    """Record a calibration in a store; None: delete an earlier one, which no longer holds."""
    from ragcache.core.calibration import drop_calibration
    from ragcache.store import Catalog, DiskStore

    with DiskStore(path) as store:
        catalog = Catalog(store)
        if made is not None:
            made.record(catalog)
            out.print(f"Recorded in {path}.", highlight=False, soft_wrap=True)
        elif drop_calibration(catalog):
            print_note("deleted", f"the earlier calibration of {path}: it cannot be confirmed")
        else:
            print_note("note", f"nothing is recorded in {path}: full prefill needs no promise")


def _check_distinct(files: Sequence[tuple[str, Path]]) -> None:
    """Raise ConfigError if one of the files would be overwritten by another."""
    known: dict[Path, str] = {}
    for option, file in files:
        other = known.setdefault(file.resolve(), option)
        if other != option:
            raise ConfigError(f"{other} and {option} both name {file}: name different files")


def _check_chunks(contexts: Iterable[EvalContext], name: str, why: str = "none are given") -> None:
    """Say how many questions have no chunks; NoChunksError where none has any: every mode answers
    those alike."""
    counts = [(len(context.questions), bool(context.chunks)) for context in contexts]
    total = sum(questions for questions, _ in counts)
    without = sum(questions for questions, has in counts if not has)
    if without == total:
        raise NoChunksError(
            f"{name}: there are no chunks to answer from: {why}. Give questions with chunks, or "
            "index documents."
        )
    if without:
        print_note(
            "nothing to answer from", f"{without} of {total} questions of {name} have no chunks"
        )


def models(model: Model = None, store: Store = None, device: Device = None) -> None:
    """Show what a model's KV depends on, its size, and how many chunks of a store are usable.

    The model is the named one, or else the store's own.
    """
    from ragcache.engine.hf.engine import TransformersEngine
    from ragcache.models import TINY, model_path
    from ragcache.setup import resolve_model_name
    from ragcache.store import Catalog, DiskStore

    settings = Settings.load(model=model, store=store, device=device)
    if store is not None:
        check_exists(settings.store)
    with ExitStack() as stack:
        stats, name, codec = None, settings.model or TINY, settings.codec or "raw"
        if settings.store.exists():
            chunks = stack.enter_context(DiskStore(settings.store, readonly=True))
            catalog = Catalog(chunks)
            stats, documents = chunks.stats(), len(catalog.entries())
            name = resolve_model_name(catalog, settings.model)
            codec = settings.codec or catalog.get_setting("codec") or "raw"
    loading(name)
    engine = TransformersEngine.load(
        model_path(name), device=settings.device, codec=codec, kernels=settings.kernels
    )
    spec, fingerprint = engine.spec, engine.fingerprint
    found: dict[str, object] = {
        "model": str(fingerprint),
        **asdict(spec),
        "token_bytes": spec.chunk_bytes(1),
        "context_tokens": engine.context_tokens,
        "kernels": engine.kernels,
        "fingerprint": dict(fingerprint.fields),
        "store": None,
    }
    out.print(str(fingerprint), style="bold", highlight=False)
    out.print(
        f"{spec.layers} layers, {spec.kv_heads} KV heads of {spec.head_dim}, {spec.dtype}; "
        f"{render.size(spec.chunk_bytes(1))} per token; context of {engine.context_tokens} tokens",
        highlight=False,
        soft_wrap=True,
    )
    out.print(f"kernels: {engine.kernels}", highlight=False)
    if engine.template.day is not None:
        out.print("the prompt has a date: a store keeps that of its first use", highlight=False)
    for key, value in fingerprint.fields:
        out.print(f"  {key:10} {value}", highlight=False, soft_wrap=True)
    if stats is not None:
        usable, count = stats.usable(fingerprint)
        out.print(f"\nThe store {settings.store}:", highlight=False, soft_wrap=True)
        out.print(store_table(stats, documents, own=fingerprint))
        out.print(f"{fingerprint} can use {usable} of {count} chunks.", highlight=False)
        found["store"] = {
            "path": settings.store,
            "documents": documents,
            "chunks": count,
            "usable_chunks": usable,
            "built_for": built_for(stats),
        }
    figures(found)


def profile(
    store: Store = None, model: Model = None, device: Device = None, dtype: Dtype = None
) -> None:
    """Measure again how fast the model computes and KV loads, for `--ratio auto`."""
    settings = Settings.load(store=store, model=model, device=device, dtype=dtype)
    with opened(settings, lazy=True) as cache:
        with waiting("measuring the model and the store"):
            speeds, why = cache.speeds(anew=True), cache.catalog.refusal()
    if speeds is None:
        raise StoreError(
            f"{settings.store} holds no KV that this model can use, so there is no loading to "
            "measure. Run `ragcache index` first."
        )
    out.print(speed_table(speeds))
    figures(json.loads(speeds.as_json()))
    if why is not None:
        print_note("note", f"these speeds are not recorded: {why}")


def simulate(
    trace: Annotated[
        str,
        typer.Argument(help="File of requests (JSON Lines), or a synthetic trace: zipf or scans."),
    ],
    capacity: Annotated[
        list[str] | None,
        typer.Option(
            help="Size of the store; default: 5, 10 and 25 % of the chunks requested twice."
        ),
    ] = None,
    replicas: Annotated[
        list[int] | None,
        typer.Option(
            help="Route the trace over so many replicas instead, each with --capacity as RAM."
        ),
    ] = None,
    model: Model = None,
) -> None:
    """Simulate what stores of several sizes save under each eviction policy, and at best.

    A line of a trace: {"chunks": [{"id": "a#0", "tokens": 123}, ...]}
    """
    from ragcache.engine.hf.engine import TransformersEngine
    from ragcache.models import TINY, model_path
    from ragcache.planning.flops import ModelShape as Costs
    from ragcache.settings import size
    from ragcache.sim.eviction import compare_policies, working_set_bytes
    from ragcache.sim.routing import POLICIES, simulate_routing
    from ragcache.sim.trace import SYNTHETIC_TRACES, load_trace

    asked = SYNTHETIC_TRACES[trace]() if trace in SYNTHETIC_TRACES else load_trace(Path(trace))
    given = [size(text) for text in capacity or ()]
    name = Settings.load(model=model).model or TINY
    with waiting(f"loading the model {name}"):
        engine = TransformersEngine.load(model_path(name))
    costs = Costs(engine.spec, engine.parameters, engine.heads)
    whole = working_set_bytes(asked, costs)
    sizes = given or [max(1, whole * share // 100) for share in (5, 10, 25)]
    if replicas:
        shared = []
        for ram in sizes:
            held = ram // costs.size(1)
            with waiting(f"replaying the trace over replicas with {render.size(ram)} each"):
                routed = [
                    simulate_routing(asked, p, count, held) for count in replicas for p in POLICIES
                ]
            out.print(f"{render.size(ram)} in RAM each", highlight=False)
            out.print(corpora.routing_table(routed))
            shared += [{"ram_bytes": ram, **corpora.routing_json(one)} for one in routed]
        figures({"working_set_bytes": whole, "replicas": shared})
        return
    with waiting("replaying the trace under every policy"):
        rows = compare_policies(asked, costs, sizes)
    out.print(corpora.simulation_table(rows, whole))
    figures({"working_set_bytes": whole, "stores": [corpora.simulation_json(row) for row in rows]})
