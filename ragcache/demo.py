"""The first run: the small world indexed, asked and compared, in a folder that goes again."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

from rich.console import Console

from ragcache import show
from ragcache.dataset import load, take
from ragcache.evaluate import MODES, compare, modes
from ragcache.models import TINY, world
from ragcache.pipeline import RagCache
from ragcache.settings import Settings

_ABOUT = """\
This model ([bold]{model}[/]) was trained on a small made-up world of people, companies and towns.
It knows nothing else: ask it about your documents and it will answer nonsense. For those:
  ragcache index DOCS --model Qwen/Qwen2.5-0.5B-Instruct      (where a model hub is reachable)
  ragcache index DOCS --model /path/to/a/model/folder         (config, safetensors, tokenizer)
  ragcache query "..."
"""


def run(out: Console, err: Console, questions: int) -> None:
    """Index, precompute, ask, compare; print what each step did and how long all took."""
    began = time.perf_counter()
    contexts = take(load(world("prompts.jsonl")), questions)
    with tempfile.TemporaryDirectory(prefix="ragcache-") as folder:
        _index_and_ask(out, err, Path(folder))
    out.rule("every mode on held-out questions")
    with show.progress(err) as told:
        scores = compare(Settings.load(model=TINY), contexts, modes(), progress=told, max_tokens=8)
    documents = len(contexts[0].chunks)
    out.print(show.score_table(scores, f"exact match by kind; {documents} chunks in a prompt"))
    out.print(
        "direct: the fact names its subject. local: a pronoun, named earlier in the chunk. split: "
        "a pronoun whose\nsubject stands in the chunk before: chunks that never saw each other "
        "(reuse) cannot know it. hop: two facts."
    )
    out.print(_ABOUT.format(model=TINY), highlight=False)
    out.print(f"The demo took {time.perf_counter() - began:.0f} s.", highlight=False)


def _index_and_ask(out: Console, err: Console, folder: Path) -> None:
    from ragcache.retriever.source import read

    markdown = Path("docs") if Path("docs").is_dir() else world("").parent
    sources = [world("documents.jsonl"), markdown]
    out.rule(f"index: the small world and the Markdown in {markdown.name}/")
    with RagCache.open(folder, TINY) as cache:
        with show.progress(err) as told:
            added = cache.add(read(sources), progress=told)
        done = added.precomputed
        out.print(
            f"{added.documents} documents, {added.chunks} chunks; KV of {done.tokens} tokens, "
            f"{show.size(done.payload_bytes)}, computed once in {done.seconds:.1f} s",
            highlight=False,
        )
        with world("questions.jsonl").open(encoding="utf-8") as lines:
            asked = [json.loads(line) for line, _ in zip(lines, range(3), strict=False)]
        for entry in asked:
            out.rule(entry["question"])
            out.print(f"expected: {', '.join(entry['answers'])} ({entry['kind']})")
            for mode in MODES:
                answer = cache.ask(entry["question"], mode=mode)
                out.print(f"[bold]{answer.text.strip():20}[/] {show.summary(answer)}")
