"""`ragcache demo`: index real articles, ask questions about them, and compare all fusion methods.

It needs no GPU and no model hub.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from statistics import median

from rich.console import Console

from ragcache.api.report_page import check_report_path, write_report
from ragcache.api.serialize import report_json
from ragcache.cli import render
from ragcache.cli.render.side_by_side import comparison_table, figure_table, gains_and_losses
from ragcache.errors import ConfigError
from ragcache.eval.articles import ARTICLE_QUESTIONS, ARTICLES, TOP_K
from ragcache.eval.dataset import Question
from ragcache.eval.evaluate import make_blenders
from ragcache.eval.side_by_side import Comparison, ModeFigures, ask_side_by_side, mode_figures
from ragcache.rag import RagCache
from ragcache.retriever.source import read
from ragcache.settings import Settings
from ragcache.types import Answer, Document, Sampling

#: Makes a context in which progress is shown.
_ShowProgress = Callable[[], AbstractContextManager[render.ProgressReporter]]
_PAGES = "concepts.md", "glossary.md"  # in docs/ of a checkout
#: Cache-Craft is left out: what it loads are chunks in the context of earlier prompts.
_MODES = (
    *("full", "prefix", "reuse", "ape", "epic", "cacheblend", "kvshare"),
    *("prophet", "infoflow", "qcfuse", "fused"),
)
_TOLD = "full", "prefix", "reuse", "cacheblend", "fused"  # those that the last lines are about
_SAMPLING = Sampling(max_tokens=16)
_COLUMNS = """\
right: the answer contains the expected one. TTFT: from when the chunks are
known to the first token. computed: share of the chunks' tokens that were
computed, mean over layers (the charged budget). loaded: stored KV that was
read. The last table has means over the questions. same as full: the answer is
that of full prefill, or both are right. Each mode answers each question once,
the modes take turns at being the first, and the stored KV is in the cache of
the file system. The questions are some that full prefill answers right with
smollm2, and were chosen by its answers alone.
"""
_AGAIN = """\
The page at /demo asks questions about these documents in any mode:
  ragcache demo --store demo-store
  ragcache serve --store demo-store --top-k {top_k}
Your own documents:
  ragcache index DOCS --model {model}
  ragcache query "..." --compare full
docs/quickstart.md shows the next steps.
"""


def run(
    out: Console,
    progress: _ShowProgress,
    *,
    model: str,
    store: Path | None = None,
    report: Path | None = None,
    loading: Callable[[str], None] | None = None,
) -> dict[str, object]:
    """Run the demo with ``model``, and print the result of every step; returns its figures.

    ``store``: the folder of the store, which is kept; by default, a temporary one is used.
    ``report``: write the page with all answers to this file. Raises ModelError if the model or its
    package is missing, and ConfigError if ``report`` cannot be written, if the embedding model's
    package is missing, or if the store has other documents.
    """
    began = time.perf_counter()
    if report is not None:
        check_report_path(report)
    folder = (
        tempfile.TemporaryDirectory(prefix="ragcache-") if store is None else nullcontext(store)
    )
    with folder as place:
        settings = Settings.load(store=place, model=model)
        with RagCache.open(place, settings=settings, loading=loading) as cache:
            _index(out, progress, cache, list(read([ARTICLES, *_pages()])))
            questions = [one.question for one in ARTICLE_QUESTIONS]
            compared = compare(out, progress, cache, questions, TOP_K)
            if report is not None:
                write_report(report, {one.question.text: _shown(one) for one in compared}, cache)
    figures = mode_figures(compared)
    sentences = list(gains_and_losses([one for one in figures if one.mode in _TOLD]))
    _summarise(out, compared, figures, sentences)
    out.print(_AGAIN.format(model=model, top_k=TOP_K), highlight=False)
    if report is not None:
        out.print(f"The report is in {report}.", highlight=False, soft_wrap=True)
    took = time.perf_counter() - began
    out.print(f"The demo took {render.duration(took)}.", highlight=False)
    return {
        "model": model,
        "seconds": took,
        "questions": [_question_json(one) for one in compared],
        "figures": [_figures_json(one) for one in figures],
        "gains_and_losses": sentences,
    }


def _shown(one: Comparison) -> Mapping[str, Answer]:
    """The answers in the order of the report: its headline is about the first mode."""
    return {mode: one.answers[mode] for mode in reversed(list(one.answers))}


def _pages() -> list[Path]:
    """The project's own documentation, where the demo runs in a checkout."""
    return [path for name in _PAGES if (path := Path("docs", name)).is_file()]


def _index(
    out: Console, progress: _ShowProgress, cache: RagCache, documents: Sequence[Document]
) -> None:
    names = {document.id for document in documents}
    if others := [entry.id for entry in cache.documents() if entry.id not in names]:
        raise ConfigError(
            f"the store has other documents than the demo's, such as {others[0]!r}: give --store "
            "another folder"
        )
    out.rule(f"index: {render.counted(len(documents), 'document')}")
    with progress() as reporter:
        added = cache.add(documents, progress=reporter, tokens=reporter.tokens)
    done, (held, chunks) = added.precomputed, cache.catalog.size
    if done.encoded:
        out.print(
            f"{held} documents, {chunks} chunks; KV of {done.tokens:,} tokens, "
            f"{render.size(done.payload_bytes)}, computed once in {render.duration(done.seconds)}",
            highlight=False,
        )
    else:
        out.print(f"{held} documents, {chunks} chunks, whose KV was stored already")


def compare(
    out: Console,
    progress: _ShowProgress,
    cache: RagCache,
    questions: Sequence[Question],
    top_k: int,
) -> list[Comparison]:
    """Ask all questions in all modes, and print a table for each question."""
    compared = []
    with progress() as reporter:
        asked = ask_side_by_side(
            cache,
            questions,
            make_blenders(_MODES),
            sampling=_SAMPLING,
            top_k=top_k,
            progress=lambda done, total: reporter("answers", done, total),
        )
        for one in asked:
            answer = next(iter(one.answers.values()))
            right = " or ".join(one.question.answers)
            out.rule(f"{one.question.text} (expected: {right})")
            tokens, chunks = len(answer.prompt), len(answer.passages)
            out.print(f"a prompt of {tokens:,} tokens with {chunks} chunks", highlight=False)
            out.print(comparison_table(one))
            compared.append(one)
    return compared


def _summarise(
    out: Console,
    compared: Sequence[Comparison],
    figures: Sequence[ModeFigures],
    sentences: Sequence[str],
) -> None:
    tokens = median(len(next(iter(one.answers.values())).prompt) for one in compared)
    count = render.counted(len(compared), "question")
    out.rule(f"every mode over {count}, with prompts of {tokens:,.0f} tokens")
    out.print(figure_table(figures))
    out.print(_COLUMNS, highlight=False)
    out.rule("what was gained, and what was lost")
    for sentence in sentences:
        out.print(f"{sentence}\n", highlight=False)


def _question_json(one: Comparison) -> Mapping[str, object]:
    return {
        "question": one.question.text,
        "expected": one.question.answers,
        "answers": {
            mode: {
                "answer": answer.text.strip(),
                "right": one.is_right(mode),
                "same": one.is_same(mode),
                "times_sooner": one.times_sooner(mode),
                "report": report_json(answer),
            }
            for mode, answer in one.answers.items()
        },
    }


def _figures_json(one: ModeFigures) -> Mapping[str, object]:
    found = asdict(one)
    found["lost"] = one.lost.question.text if one.lost else None
    return found
