"""The first run: the small world indexed, asked and compared, in a folder that goes again."""

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
from ragcache.eval.dataset import load, take
from ragcache.eval.evaluate import compare, modes
from ragcache.eval.parallel import cores
from ragcache.eval.summary import Figures
from ragcache.models import TINY, world
from ragcache.rag import RagCache
from ragcache.settings import Settings

#: Shows progress for as long as its ``with`` lasts.
_ShowProgress = Callable[[], AbstractContextManager[render.ProgressReporter]]
_KINDS = """\
direct: the fact names its subject. local: a pronoun, its subject named earlier
in the chunk. split: a pronoun whose subject is named only in the chunk before,
so chunks that never saw each other (reuse) cannot know it. hop: two facts.
random: pays what cacheblend pays and chooses blindly. charged: the share of
chunk tokens computed, mean over layers; a layer in full counts in full. More
modes: ragcache eval --mode reuse:positions=overlapping --mode prophet ...
"""
_PAGES = "quickstart.md", "concepts.md", "security.md", "langchain.md"  # of the checkout's docs/
_ABOUT = """\
This model ({model}) was trained on a small made-up world of people, companies
and towns. It knows nothing else: ask it about your documents and it will answer
nonsense. For those, where a hub is reachable or with a model in a folder:
  ragcache index DOCS --model Qwen/Qwen2.5-0.5B-Instruct
  ragcache index DOCS --model /path/to/a/model/folder
  ragcache query "..."
Single times above are of one run each, and the first of a mode also warms it up.
docs/quickstart.md goes on from here.
"""


def run(out: Console, progress: _ShowProgress, questions: int) -> list[Figures]:
    """Index, precompute, ask, compare; print what each step did and how long all took. Gives the
    figures of every mode."""
    began = time.perf_counter()
    contexts = take(load(world("prompts.jsonl")), questions)
    with tempfile.TemporaryDirectory(prefix="ragcache-") as folder:
        _index_and_ask(out, progress, Path(folder))
    out.rule("every mode on held-out questions")
    with progress() as told:
        asked = {"questions": contexts}
        settings = Settings.load(model=TINY)
        ((_, figures),) = compare(
            settings, asked, modes(), max_tokens=8, processes=min(4, cores()), progress=told
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
    markdown = docs or [world("").parent / "README.md"]
    out.rule(f"index: the small world and {render.counted(len(markdown), 'page')} of Markdown")
    with RagCache.open(folder, TINY) as cache:
        with progress() as told:
            documents = read([world("documents.jsonl"), *markdown])
            added = cache.add(documents, progress=told, tokens=told.tokens)
        done = added.precomputed
        out.print(
            f"{added.documents} documents, {added.chunks} chunks; KV of {done.tokens} tokens, "
            f"{render.size(done.payload_bytes)}, computed once in {render.duration(done.seconds)}",
            highlight=False,
        )
        with world("questions.jsonl").open(encoding="utf-8") as lines:
            entries = [json.loads(line) for line in lines]
        for kind in ("direct", "local", "split"):
            entry = next(e for e in entries if e["kind"] == kind)
            out.rule(f"{entry['question']} ({kind}: {', '.join(entry['answers'])})")
            answers = {
                label: cache.ask(entry["question"], mode=mode) for label, mode in modes().items()
            }
            out.print(answer_table(answers))
