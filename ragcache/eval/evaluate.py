"""Ask the questions of data sets in several modes, over the same given chunks."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import TypedDict, Unpack

from ragcache.blend import Blender, blender
from ragcache.blend.base import check_ratio
from ragcache.engine.base import Engine
from ragcache.errors import ConfigError
from ragcache.eval.ask import ask_questions
from ragcache.eval.dataset import AnswerLength, EvalContext, answer_length
from ragcache.eval.metrics import load_stemmer
from ragcache.eval.no_context import NoContext
from ragcache.eval.outcomes import AskedQuestion, ModeOutcomes, by_mode
from ragcache.eval.outcomes_file import OutcomesFile, run_header
from ragcache.eval.parallel import run_parallel
from ragcache.eval.summary import ModeSummary, figures
from ragcache.models import TINY, model_path
from ragcache.planning.context import DEFAULT_CONTEXT, encoding_context
from ragcache.settings import Settings
from ragcache.store.base import ChunkStore
from ragcache.types import StageProgress
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
    several ratios there is one blender each, with labels such as ``cacheblend@0.15``. The mode
    ``none`` is :class:`ragcache.eval.no_context.NoContext`. Raises ConfigError for an unknown mode,
    for a ratio outside [0, 1], and if no mode takes a ratio.
    """
    for ratio in require_list(ratios, "ratios"):
        check_ratio(ratio, "ratio")
    made: dict[str, Blender] = {}
    used = False
    named = MODES if names is None else {name: name for name in require_list(names, "modes")}
    for label, name in named.items():
        plain = NoContext() if name == NoContext.name else blender(name)
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
    compile_mode: str = DEFAULT_CONTEXT,
    max_tokens: int = 32,
    instruction: str = "",
) -> list[ModeOutcomes]:
    """Ask every question in every mode, over chunks that are precomputed in ``compile_mode``.

    For modes that load variants, each chunk gets one variant, taken from a prompt in which it
    followed three chunks of its context, none of which precedes it in the questions' prompts.

    ``store`` should be empty: each context's chunks are stored before its questions and deleted
    afterwards, so that contexts share nothing. ``instruction`` stands before every question, in all
    modes. All modes answer a question before the next one is asked, in rotating order after full
    prefill, with whose answer theirs are compared; speed-ups are computed per question.

    If the correct answers are short, an answer ends with its first line that is not blank, which is
    scored; if they are long, answers are also scored by Rouge-L
    (:func:`ragcache.eval.dataset.answer_length`).
    """
    asked = ask_questions(
        engine,
        store,
        contexts,
        modes,
        compile_mode=compile_mode,
        max_tokens=max_tokens,
        instruction=instruction,
    )
    return by_mode(modes, asked)


def compare(
    settings: Settings,
    datasets: Mapping[str, Sequence[EvalContext]],
    chosen: Mapping[str, Blender],
    *,
    against: str | None = None,
    **options: Unpack[AskOptions],
) -> Iterator[tuple[str, list[ModeSummary]]]:
    """Evaluate the model of ``settings`` on each data set; yields its name and the summaries.

    Raises ConfigError, before the model is loaded, if ``against`` is not a label of ``chosen``, and
    else as :func:`ask_all`, which takes the same options.
    """
    if against is not None and against not in chosen:
        raise ConfigError(f"cannot compare with {against!r}: the modes are {', '.join(chosen)}")
    asked = ask_all(settings, datasets, chosen, **options)
    return ((name, figures(outcomes, against)) for name, outcomes in asked)


class AskOptions(TypedDict, total=False):
    """Options of :func:`ask_all`."""

    max_tokens: int
    instruction: str
    processes: int
    progress: StageProgress | None
    save: Path | None
    note: Callable[[str], object] | None


def ask_all(
    settings: Settings,
    datasets: Mapping[str, Sequence[EvalContext]],
    chosen: Mapping[str, Blender],
    *,
    max_tokens: int = 32,
    instruction: str = "",
    processes: int = 1,
    progress: StageProgress | None = None,
    save: Path | None = None,
    note: Callable[[str], object] | None = None,
) -> Iterator[tuple[str, list[ModeOutcomes]]]:
    """Ask the model of ``settings`` the questions of each data set in the modes ``chosen``; yields
    its name and the outcomes.

    Chunks are stored in a temporary directory. With several ``processes``, contexts are divided
    among them, each with its own model and its share of the cores. They are spawned, so a script
    needs ``if __name__ == "__main__"``.

    ``save``: a file in which the outcomes of every question are saved as soon as they are known
    (:class:`ragcache.eval.outcomes_file.OutcomesFile`). If it exists, the questions in it are not
    asked again. ``note`` receives a message about what was found in it.

    Raises ConfigError, before the model is loaded, if ``processes`` or ``max_tokens`` < 1, if
    Rouge-L is needed and its stemmer is not installed, or if ``save`` cannot be used or is of
    another run.
    """
    _check_processes(processes)
    if max_tokens < 1:
        raise ConfigError(f"max_tokens is {max_tokens}: ask for at least 1")
    if any(answer_length(contexts) == "long" for contexts in datasets.values()):
        load_stemmer()
    saved = None
    if save is not None:
        header = run_header(
            settings, datasets, chosen, max_tokens=max_tokens, instruction=instruction
        )
        saved = OutcomesFile.open(save, header)
        _note_content(saved, note or _no_note)
    ask = partial(
        _ask_model, settings, dict(chosen), max_tokens=max_tokens, instruction=instruction
    )
    told = progress or _no_progress
    return _asked(ask, datasets, chosen, processes, told, saved)


def _asked(
    ask: Callable[..., Iterator[AskedQuestion]],
    datasets: Mapping[str, Sequence[EvalContext]],
    chosen: Mapping[str, Blender],
    processes: int,
    progress: StageProgress,
    saved: OutcomesFile | None,
) -> Iterator[tuple[str, list[ModeOutcomes]]]:
    with closing(saved) if saved is not None else nullcontext():
        for name, contexts in datasets.items():
            asked = run_parallel(
                partial(
                    ask,
                    length=answer_length(contexts),
                    expected=saved.model if saved else "",
                ),
                contexts,
                processes,
                partial(progress, name),
                known=None if saved is None else saved.known.get(name),
                keep=None if saved is None else partial(saved.append, name),
            )
            yield name, by_mode(chosen, asked)


def _note_content(saved: OutcomesFile, note: Callable[[str], object]) -> None:
    """Say what a file of outcomes has already, and whether its last line was incomplete."""
    if saved.torn:
        note(f"the last line of {saved.path} was incomplete: it was removed")
    if known := sum(map(len, saved.known.values())):
        total = sum(found["questions"] for found in saved.header["datasets"].values())
        note(f"{known} of {total} questions are in {saved.path} already")


def _no_note(message: str) -> None:
    pass


def _check_processes(processes: int) -> None:
    if processes < 1:
        raise ConfigError(f"processes is {processes}: it takes at least 1")


def _no_progress(name: str, done: int, total: int) -> None:
    pass


def _ask_model(
    settings: Settings,
    chosen: Mapping[str, Blender],
    contexts: Sequence[EvalContext],
    *,
    max_tokens: int,
    instruction: str,
    length: AnswerLength,
    expected: str,
) -> Iterator[AskedQuestion]:
    """Load the model and ask. Raises ConfigError unless the digest of its fingerprint is
    ``expected``, if that is not empty."""
    from ragcache.engine.hf.engine import TransformersEngine
    from ragcache.setup import resolve_codec, settle_codec
    from ragcache.store.catalog.catalog import Catalog
    from ragcache.store.disk.store import DiskStore

    with (
        tempfile.TemporaryDirectory(prefix="ragcache-") as folder,
        DiskStore(folder, layout=settings.layout) as store,
    ):
        stored = resolve_codec(Catalog(store), settings)
        engine = TransformersEngine.load(
            model_path(settings.model or TINY),
            device=settings.device,
            dtype=settings.dtype,
            codec=stored,
            kernels=settings.kernels,
        )
        settle_codec(Catalog(store), engine, stored, Path(folder), settings)
        if expected and engine.fingerprint.digest.hex() != expected:
            raise ConfigError(
                f"the saved outcomes are of another model than {engine.fingerprint}: its files, "
                "its dtype, the basis of its codec or the version of transformers have changed. "
                "Save to another file."
            )
        encoding = encoding_context(settings.encoding_context or DEFAULT_CONTEXT, engine)
        yield from ask_questions(
            engine,
            store,
            contexts,
            chosen,
            compile_mode=encoding.mode,
            max_tokens=max_tokens,
            instruction=instruction,
            length=length,
        )
