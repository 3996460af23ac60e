"""Answers and cost of every mode over the same prompts, chunks given."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from torch import Tensor

from ragcache.blend import Blender, blender
from ragcache.blend.base import check_ratio
from ragcache.core.generate import LocalGenerator
from ragcache.core.precompute import precompute, store_variants
from ragcache.core.request import PromptRequest
from ragcache.engine.base import Engine
from ragcache.errors import ConfigError
from ragcache.eval.dataset import Context, Question, long_answers
from ragcache.eval.metrics import exact_match, f1, first_token_kl, rouge_l, stemmer
from ragcache.eval.parallel import check_processes, share
from ragcache.eval.summary import Figures, Outcome, Scores, figures
from ragcache.models import TINY, model_path
from ragcache.planning.context import EncodingContext, encoding_context
from ragcache.retriever.embed import Embedder, HashEmbedder, SentenceTransformerEmbedder
from ragcache.retriever.embedderfiles import PACKAGED
from ragcache.retriever.search import nearest
from ragcache.settings import Settings
from ragcache.store.base import ChunkStore
from ragcache.store.key import ChunkKey
from ragcache.types import Answer, Sampling, Tokens
from ragcache.util.several import several

#: What is compared unless modes are named. The control pays for full layers as CacheBlend does.
MODES = {
    "full": "full",
    "prefix": "prefix",
    "reuse": "reuse",
    "random": "random+full_layers=2",
    "cacheblend": "cacheblend",
    "fused": "fused",
}


def modes(names: Sequence[str] | None = None, ratios: Sequence[float] = ()) -> dict[str, Blender]:
    """Blenders by label; :data:`MODES` where no names are given.

    A mode that takes a ``recompute_ratio`` and does not name its own gets the ratio; with several
    there is one blender for each, labelled ``cacheblend@0.15``. Raises ConfigError for an unknown
    mode, for a ratio outside [0, 1], or where there are ratios and no mode takes one.
    """
    for ratio in several(ratios, "ratios"):
        check_ratio(ratio, "ratio")
    made: dict[str, Blender] = {}
    taken = False
    named = MODES if names is None else {name: name for name in several(names, "modes")}
    for label, name in named.items():
        plain = blender(name)
        if not ratios or "recompute_ratio" not in plain.parameters or "recompute_ratio" in name:
            made[label] = plain
            continue
        taken = True
        for ratio in ratios:
            made[label if len(ratios) == 1 else f"{label}@{ratio:g}"] = blender(name, ratio)
    if ratios and not taken:
        raise ConfigError(f"none of the modes {', '.join(made)} takes a ratio: leave it out")
    return made


def evaluate(
    engine: Engine,
    store: ChunkStore,
    contexts: Sequence[Context],
    modes: Mapping[str, Blender],
    *,
    compile_mode: str = "prefix",
    embedder: Embedder | None = None,
    max_tokens: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> list[Scores]:
    """Ask every question in every mode, over chunks that were precomputed in ``compile_mode``.

    Similar chunks (mode enriched) are those of the same context, by ``embedder``. Modes that load
    variants get one of each chunk, cut from a prompt in which it stood behind three chunks of its
    context, of which none is the one that stands before it in the questions' prompts.

    ``store`` should be empty: each context's chunks are put before its questions and deleted
    after them, so that nothing is shared between contexts. Modes take turns at each question,
    starting with another one each time; ratios of times are taken question by question. Answers
    get a Rouge-L where the right ones are long (:func:`long_answers`).
    """
    scores = [Scores(label, made) for label, made in modes.items()]
    sampling = Sampling(max_tokens=max_tokens)
    how = encoding_context(compile_mode, engine)
    answering = LocalGenerator(engine, store, how, store_misses=False)
    full = next((label for label, made in modes.items() if made.name == "full"), None)
    total, done, long = sum(len(c.questions) for c in contexts), 0, long_answers(contexts)
    numbers: dict[tuple[str, ...], int] = {}  # entries over the same chunks are one context
    for context in contexts:
        number = numbers.setdefault(context.chunks, len(numbers))
        keys = _precompute(engine, store, context, how, embedder)
        if any(made.behind == "variant" for made in modes.values()):
            keys += _variants(engine, store, context)
        for question in context.questions:
            prompt = engine.template.prompt(context.chunks, question.text)
            given: dict[str, _Given] = {}
            for label in _turned(list(modes), done):
                stream = answering.stream(PromptRequest(prompt, modes[label], sampling))
                given[label] = stream.answer, stream.first_logits
            reference = None if full is None else given[full]
            for one in scores:
                outcome = _outcome(number, question, given[one.mode], reference, long)
                one.outcomes.append(outcome)
            done += 1
            if progress is not None:
                progress(done, total)
        for key in keys:
            store.delete(key)
    return scores


def compare(
    settings: Settings,
    datasets: Mapping[str, Sequence[Context]],
    chosen: Mapping[str, Blender],
    *,
    against: str | None = None,
    max_tokens: int = 32,
    processes: int = 1,
    progress: Callable[[str, int, int], None] | None = None,
) -> Iterator[tuple[str, list[Figures]]]:
    """:func:`evaluate` the model of ``settings`` dataset by dataset: its name and the figures.

    Chunks are kept in an LMDB store on disk, gone afterwards. Several ``processes`` share the
    contexts, each with a model and a part of the cores of its own; they are spawned, so that a
    script has to guard its own start by ``if __name__ == "__main__"``. Raises ConfigError, before
    the model is loaded, if ``against`` is no label of the modes, there are less than one process,
    or Rouge-L is due and cannot be had.
    """
    if against is not None and against not in chosen:
        raise ConfigError(f"cannot compare with {against!r}: the modes are {', '.join(chosen)}")
    check_processes(processes)
    if any(map(long_answers, datasets.values())):
        stemmer()
    run = partial(_evaluate_model, settings, dict(chosen), max_tokens)
    return (
        (name, figures(share(run, contexts, processes, partial(progress or _quiet, name)), against))
        for name, contexts in datasets.items()
    )


def _quiet(name: str, done: int, total: int) -> None:
    pass


def _evaluate_model(
    settings: Settings,
    chosen: Mapping[str, Blender],
    max_tokens: int,
    contexts: Sequence[Context],
    progress: Callable[[int, int], None],
) -> list[Scores]:
    from ragcache.engine.hf.engine import TransformersEngine
    from ragcache.store.disk.store import DiskStore
    from ragcache.store.format.codecs import codec

    engine = TransformersEngine.load(
        model_path(settings.model or TINY),
        device=settings.device,
        dtype=settings.dtype,
        codec=codec(settings.codec or "raw").name,
        kernels=settings.kernels,
    )
    how = encoding_context(settings.encoding_context or "prefix", engine)
    embedder = None
    if how.similar:
        embedder = SentenceTransformerEmbedder(settings.embedder or PACKAGED)
    with (
        tempfile.TemporaryDirectory(prefix="ragcache-") as folder,
        DiskStore(folder, layout=settings.layout) as store,
    ):
        return evaluate(
            engine,
            store,
            contexts,
            chosen,
            compile_mode=how.mode,
            embedder=embedder,
            max_tokens=max_tokens,
            progress=progress,
        )


_COMPANY = 2, 3, 4  # which chunks a variant's chunk was behind, counted from its own

#: A mode's answer to a question, and the logits (vocabulary,) of its first token.
_Given = tuple[Answer, Tensor]


def _outcome(
    context: int, question: Question, given: _Given, reference: _Given | None, long: bool
) -> Outcome:
    """What ``given`` comes to, beside the ``reference`` that full prefill gave."""
    (answer, logits), report = given, given[0].report
    full, wanted = reference or (None, None)
    return Outcome(
        context=context,
        kind=question.kind,
        exact=exact_match(answer.text, question.answers),
        f1=f1(answer.text, question.answers),
        rouge_l=rouge_l(answer.text, question.answers) if long else None,
        kl=None if wanted is None else first_token_kl(wanted, logits),
        agrees=None if wanted is None else bool(wanted.argmax() == logits.argmax()),
        same=None if full is None else exact_match(answer.text, [full.text]),
        ttft_s=report.ttft_s,
        speedup=None if full is None else full.report.ttft_s / report.ttft_s,
        recomputed=report.recomputed_share,
        charged=report.charged_share,
        bytes_loaded=report.bytes_loaded,
    )


def _precompute(
    engine: Engine,
    store: ChunkStore,
    context: Context,
    how: EncodingContext,
    embedder: Embedder | None,
) -> list[ChunkKey]:
    """Store the prefix, and the context's chunks as ``how`` computes them."""
    template = engine.template
    tokens = [template.chunk(chunk) for chunk in context.chunks]
    keys = [how.key(engine.fingerprint, ids) for ids in tokens]
    company: dict[ChunkKey, Tokens] = {}
    if how.similar:
        near = nearest(embedder or HashEmbedder(), context.chunks, how.similar)
        for key, others in zip(keys, near, strict=True):
            company[key] = tuple(t for other in others for t in tokens[other])
    keys.append(ChunkKey(engine.fingerprint, template.prefix))
    precompute(engine, store, keys, preceding=lambda key: company.get(key, ()))
    return keys


def _variants(engine: Engine, store: ChunkStore, context: Context) -> list[ChunkKey]:
    chunks, count = context.chunks, len(context.chunks)
    keys = []
    for number, chunk in enumerate(chunks):
        others = dict.fromkeys((number + step) % count for step in _COMPANY)
        met = [chunks[other] for other in others if other not in (number, number - 1)]
        prompt = engine.template.prompt([*met, chunk], context.questions[0].text)
        keys += store_variants(engine, store, prompt, [len(met)])
    return keys


def _turned(labels: list[str], by: int) -> Iterator[str]:
    by %= len(labels)
    yield from labels[by:] + labels[:by]
