"""Ask the questions of data sets in several modes, over the same given chunks."""

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
from ragcache.eval.dataset import EvalContext, Question, has_long_answers
from ragcache.eval.metrics import exact_match, f1, first_token_kl, load_stemmer, rouge_l
from ragcache.eval.parallel import run_parallel
from ragcache.eval.summary import ModeOutcomes, ModeSummary, QuestionOutcome, figures
from ragcache.models import TINY, model_path
from ragcache.planning.context import EncodingContext, encoding_context
from ragcache.settings import Settings
from ragcache.store.base import ChunkStore
from ragcache.store.key import ChunkKey
from ragcache.types import Answer, Sampling
from ragcache.util.list_argument import require_list

__all__ = ["compare", "make_blenders"]

#: The modes, by label, that are compared by default. ``random`` is a control that computes two full
#: layers, as CacheBlend does.
MODES = {
    "full": "full",
    "prefix": "prefix",
    "reuse": "reuse",
    "random": "random+full_layers=2",
    "cacheblend": "cacheblend",
    "fused": "fused",
}


def make_blenders(
    names: Sequence[str] | None = None, ratios: Sequence[float] = ()
) -> dict[str, Blender]:
    """Blenders by label, of :data:`MODES` by default.

    A mode that takes a ``recompute_ratio`` and does not name its own gets the given ratio; for
    several ratios there is one blender each, with labels such as ``cacheblend@0.15``. Raises
    ConfigError for an unknown mode, for a ratio outside [0, 1], and if no mode takes a ratio.
    """
    for ratio in require_list(ratios, "ratios"):
        check_ratio(ratio, "ratio")
    made: dict[str, Blender] = {}
    used = False
    named = MODES if names is None else {name: name for name in require_list(names, "modes")}
    for label, name in named.items():
        plain = blender(name)
        if not ratios or plain.ratio is None or "recompute_ratio" in name:
            made[label] = plain
            continue
        used = True
        for ratio in ratios:
            made[label if len(ratios) == 1 else f"{label}@{ratio:g}"] = blender(name, ratio)
    if ratios and not used:
        raise ConfigError(f"none of the modes {', '.join(made)} takes a ratio: leave it out")
    return made


def evaluate(
    engine: Engine,
    store: ChunkStore,
    contexts: Sequence[EvalContext],
    modes: Mapping[str, Blender],
    *,
    compile_mode: str = "prefix",
    max_tokens: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> list[ModeOutcomes]:
    """Ask every question in every mode, over chunks that are precomputed in ``compile_mode``.

    For modes that load variants, each chunk gets one variant, taken from a prompt in which it
    followed three chunks of its context, none of which precedes it in the questions' prompts.

    ``store`` should be empty: each context's chunks are stored before its questions and deleted
    afterwards, so that contexts share nothing. All modes answer a question before the next one is
    asked, in rotating order, and speed-ups are computed per question. Answers are scored by Rouge-L
    if the correct ones are long (:func:`has_long_answers`).
    """
    scores = [ModeOutcomes(label, made) for label, made in modes.items()]
    sampling = Sampling(max_tokens=max_tokens)
    encoding = encoding_context(compile_mode, engine)
    generator = LocalGenerator(engine, store, encoding, store_misses=False)
    full = next((label for label, made in modes.items() if made.name == "full"), None)
    total, done, long = sum(len(c.questions) for c in contexts), 0, has_long_answers(contexts)
    numbers: dict[tuple[str, ...], int] = {}  # entries with the same chunks are one context
    for context in contexts:
        number = numbers.setdefault(context.chunks, len(numbers))
        keys = _precompute(engine, store, context, encoding)
        if any(made.reuses == "variant" for made in modes.values()):
            keys += _variants(engine, store, context)
        for question in context.questions:
            prompt = engine.template.prompt(context.chunks, question.text)
            given: dict[str, _Reply] = {}
            for label in _rotated(list(modes), done):
                stream = generator.stream(PromptRequest(prompt, modes[label], sampling))
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
    datasets: Mapping[str, Sequence[EvalContext]],
    chosen: Mapping[str, Blender],
    *,
    against: str | None = None,
    max_tokens: int = 32,
    processes: int = 1,
    progress: Callable[[str, int, int], None] | None = None,
) -> Iterator[tuple[str, list[ModeSummary]]]:
    """Evaluate the model of ``settings`` on each data set; yields its name and the summaries.

    Chunks are stored in a temporary directory. With several ``processes``, contexts are divided
    among them, each with its own model and its share of the cores. They are spawned, so a script
    needs ``if __name__ == "__main__"``. Raises ConfigError, before the model is loaded, if
    ``against`` is not a label of ``chosen``, if ``processes`` < 1, or if Rouge-L is needed and its
    stemmer is not installed.
    """
    if against is not None and against not in chosen:
        raise ConfigError(f"cannot compare with {against!r}: the modes are {', '.join(chosen)}")
    _check_processes(processes)
    if any(map(has_long_answers, datasets.values())):
        load_stemmer()
    run = partial(_evaluate_model, settings, dict(chosen), max_tokens)
    return (
        (
            name,
            figures(
                run_parallel(run, contexts, processes, partial(progress or _no_progress, name)),
                against,
            ),
        )
        for name, contexts in datasets.items()
    )


def _check_processes(processes: int) -> None:
    if processes < 1:
        raise ConfigError(f"processes is {processes}: it takes at least 1")


def _no_progress(name: str, done: int, total: int) -> None:
    pass


def _evaluate_model(
    settings: Settings,
    chosen: Mapping[str, Blender],
    max_tokens: int,
    contexts: Sequence[EvalContext],
    progress: Callable[[int, int], None],
) -> list[ModeOutcomes]:
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
    encoding = encoding_context(settings.encoding_context or "prefix", engine)
    with (
        tempfile.TemporaryDirectory(prefix="ragcache-") as folder,
        DiskStore(folder, layout=settings.layout) as store,
    ):
        return evaluate(
            engine,
            store,
            contexts,
            chosen,
            compile_mode=encoding.mode,
            max_tokens=max_tokens,
            progress=progress,
        )


_PRECEDING = 2, 3, 4  # distances, in chunks, of the chunks before a variant's chunk

#: A mode's answer to a question, and the logits (vocabulary,) of its first token.
_Reply = tuple[Answer, Tensor]


def _outcome(
    context: int, question: Question, given: _Reply, reference: _Reply | None, long: bool
) -> QuestionOutcome:
    """Score an answer, and compare it with the ``reference`` that full prefill gave."""
    (answer, logits), report = given, given[0].report
    full, wanted = reference or (None, None)
    return QuestionOutcome(
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
    context: EvalContext,
    encoding: EncodingContext,
) -> list[ChunkKey]:
    """Store the KV of the prefix and of the context's chunks; returns their keys."""
    template = engine.template
    tokens = [template.chunk(chunk) for chunk in context.chunks]
    keys = [encoding.key(engine.fingerprint, ids) for ids in tokens]
    keys.append(ChunkKey(engine.fingerprint, template.prefix))
    precompute(engine, store, keys)
    return keys


def _variants(engine: Engine, store: ChunkStore, context: EvalContext) -> list[ChunkKey]:
    """Store a variant of each chunk; returns their keys."""
    chunks, count = context.chunks, len(context.chunks)
    keys = []
    for number, chunk in enumerate(chunks):
        others = dict.fromkeys((number + step) % count for step in _PRECEDING)
        before = [chunks[other] for other in others if other not in (number, number - 1)]
        prompt = engine.template.prompt([*before, chunk], context.questions[0].text)
        keys += store_variants(engine, store, prompt, [len(before)])
    return keys


def _rotated(labels: list[str], by: int) -> Iterator[str]:
    by %= len(labels)
    yield from labels[by:] + labels[:by]
