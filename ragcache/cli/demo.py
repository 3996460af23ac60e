"""`ragcache demo`: index the small world, ask questions, and compare all fusion methods.

It needs no GPU and no model hub, and works in a temporary directory.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from rich.console import Console

from ragcache.cli import render
from ragcache.cli.render.answers import answer_table
from ragcache.cli.render.quality import score_tables
from ragcache.eval.dataset import first_questions, load_dataset
from ragcache.eval.evaluate import compare, make_blenders
from ragcache.eval.parallel import usable_cores
from ragcache.eval.summary import ModeSummary
from ragcache.models import TINY, world_file
from ragcache.rag import RagCache
from ragcache.settings import Settings

#: Makes a context in which progress is shown.
_ShowProgress = Callable[[], AbstractContextManager[render.ProgressReporter]]
_KINDS = """\
direct: the fact names its subject. local: it has a pronoun whose subject is
named earlier in the chunk. split: it has a pronoun whose subject is named only
in the chunk before, so chunks without attention to each other (reuse) lack it.
hop: the question needs two facts. random: recomputes as many tokens as
cacheblend, chosen at random. charged: share of chunk tokens that are computed,
mean over layers. More fusion methods:
  ragcache eval --mode reuse:positions=overlapping --mode prophet ...
"""
_PAGES = "quickstart.md", "concepts.md", "security.md", "langchain.md"  # in docs/ of a checkout
_ABOUT = """\
This model ({model}) was trained on a small made-up world of people, companies
and towns, and knows nothing else. For your own documents, use a model from a
hub or from a folder:
  ragcache index DOCS --model Qwen/Qwen2.5-0.5B-Instruct
  ragcache index DOCS --model /path/to/a/model/folder
  ragcache query "..."
The times above are of single runs; the first run of a mode includes its warm-up.
docs/quickstart.md shows the next steps.
"""


def run(out: Console, progress: _ShowProgress, questions: int) -> list[ModeSummary]:
    """Run the demo with ``questions`` held-out questions, and print the result of every step.

    Returns the figures of every mode.
    """
    began = time.perf_counter()
    contexts = first_questions(load_dataset(world_file("prompts.jsonl")), questions)
    with tempfile.TemporaryDirectory(prefix="ragcache-") as folder:
        _index_and_ask(out, progress, Path(folder))
    out.rule("every mode on held-out questions")
    with progress() as reporter:
        asked = {"questions": contexts}
        settings = Settings.load(model=TINY)
        ((_, figures),) = compare(
            settings,
            asked,
            make_blenders(),
            max_tokens=8,
            processes=min(4, usable_cores()),
            progress=reporter,
        )
    for table in score_tables(figures, "exact match by kind of question, in percent"):
        out.print(table)
    out.print(_KINDS, highlight=False)
    out.print(_ABOUT.format(model=TINY), highlight=False)
    out.print(f"The demo took {render.duration(time.perf_counter() - began)}.", highlight=False)
    return figures


def _index_and_ask(out: Console, progress: _ShowProgress, folder: Path) -> None:
    from ragcache.retriever.source import read

    docs = [path for name in _PAGES if (path := Path("docs", name)).is_file()]
    markdown = docs or [world_file("").parent / "README.md"]
    out.rule(f"index: the small world and {render.counted(len(markdown), 'page')} of Markdown")
    with RagCache.open(folder, TINY) as cache:
        with progress() as reporter:
            documents = read([world_file("documents.jsonl"), *markdown])
            added = cache.add(documents, progress=reporter, tokens=reporter.tokens)
        done = added.precomputed
        out.print(
            f"{added.documents} documents, {added.chunks} chunks; KV of {done.tokens} tokens, "
            f"{render.size(done.payload_bytes)}, computed once in {render.duration(done.seconds)}",
            highlight=False,
        )
        with world_file("questions.jsonl").open(encoding="utf-8") as lines:
            entries = [json.loads(line) for line in lines]
        for kind in ("direct", "local", "split"):
            entry = next(e for e in entries if e["kind"] == kind)
            out.rule(f"{entry['question']} ({kind}: {', '.join(entry['answers'])})")
            answers = {
                label: cache.ask(entry["question"], mode=mode)
                for label, mode in make_blenders().items()
            }
            out.print(answer_table(answers))
