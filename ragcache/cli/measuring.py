"""Commands that measure: modes against full prefill, models, machines, and policies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ragcache import show
from ragcache.cli.options import (
    Codec,
    Compile,
    Device,
    Dtype,
    Model,
    Store,
    err,
    opened,
    out,
    tell,
)
from ragcache.errors import ConfigError, StoreError
from ragcache.settings import Settings
from ragcache.show import corpora, quality
from ragcache.show.stores import speed_table


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
        for table in quality.score_tables(figures, name):
            out.print(table)
    if json_file is not None:
        rows = [{"dataset": name} | f.as_json() for name, figures in done.items() for f in figures]
        json_file.write_text(json.dumps(rows, indent=2) + "\n")
    if plot_file is not None:
        plot.draw(done, plot_file)


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
        with opened(settings, lazy=True) as cache:
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
    out.print(quality.curve_table(found))
    out.print(quality.choice(choosing.least(found, keep), keep), highlight=False, soft_wrap=True)


def models(model: Model = None, store: Store = None, device: Device = None) -> None:
    """What a model's KV depends on, what it costs, and how much of a store it can use."""
    from ragcache.engine.transformers import TransformersEngine
    from ragcache.models import TINY, model_path
    from ragcache.store.disk import DiskStore

    settings = Settings.load(model=model, store=store, device=device)
    name = settings.model or TINY
    engine = TransformersEngine.load(
        model_path(name), device=settings.device, kernels=settings.kernels
    )
    spec = engine.spec
    out.print(str(engine.fingerprint), style="bold", highlight=False)
    out.print(
        f"{spec.layers} layers, {spec.kv_heads} KV heads of {spec.head_dim}, {spec.dtype}; "
        f"{show.size(spec.chunk_bytes(1))} per token; context of {engine.context_tokens} tokens",
        highlight=False,
    )
    out.print(f"kernels: {engine.kernels}", highlight=False)
    for key, value in engine.fingerprint.fields:
        out.print(f"  {key:10} {value}", highlight=False, soft_wrap=True)
    if settings.store.exists():
        with DiskStore(settings.store, readonly=True) as chunks:
            for built, count in chunks.stats().fingerprints.items():
                out.print(f"{settings.store}: {count} chunks built for {built}", highlight=False)


def profile(
    store: Store = None, model: Model = None, device: Device = None, dtype: Dtype = None
) -> None:
    """Measure anew how fast the model computes and its KV loads: what `--ratio auto` goes by."""
    settings = Settings.load(store=store, model=model, device=device, dtype=dtype)
    with opened(settings, lazy=True) as cache:
        speeds, why = cache.speeds(anew=True), cache.catalog.refusal()
    if speeds is None:
        raise StoreError(
            f"{settings.store} holds no KV that this model can use, so there is no loading to "
            "measure. Run `ragcache index` first."
        )
    out.print(speed_table(speeds))
    if why is not None:
        tell("note", f"these speeds are not recorded: {why}")


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
            out.print(corpora.routing_table(routed))
        return
    out.print(corpora.simulation_table(report(asked, costs, sizes), whole))
