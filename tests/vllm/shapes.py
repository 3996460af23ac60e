"""Prompts of several shapes over a small random model, with their KV stored."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ragcache.core.precompute import precompute
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.planning.context import EncodingContext, encoding_context
from ragcache.planning.lookup import chunk_keys, text_keys
from ragcache.store.base import ChunkStore
from ragcache.store.disk.store import DiskStore
from ragcache.types import Part, Prompt
from tests import models
from tests.scene import DOCUMENTS

SHAPES = ("chunk first", "text between chunks", "several texts first", "a found chunk", "no chunk")


@dataclass(frozen=True)
class Shapes:
    """An engine, and the prompts of :data:`SHAPES`."""

    engine: TransformersEngine
    encoding: EncodingContext
    prompts: dict[str, Prompt]

    @classmethod
    def make(cls) -> Shapes:
        engine = models.engine("llama")
        engine.repairs = False  # as vLLM

        def text(given: str) -> Part:
            return Part(engine.tokenize(given))

        a, b, c = (Part(engine.tokenize(f"{d.text}\n\n"), True) for d in DOCUMENTS)
        found = Part(a.tokens[:9], True, a.tokens)
        start = Part(engine.template.prefix)
        system, turn = (
            text("Be brief, and name the town."),
            text(" She was born in Oslo. And then?"),
        )
        question = text(" Question: Where does she live?\nAnswer:")
        parts = (
            (a, b, question),
            (system, a, turn, b, turn, a, question),
            (start, system, turn, c, b, question),
            (system, found, text("in Bexley. "), b, question),
            (system, turn, question),
        )
        prompts = {name: Prompt(given) for name, given in zip(SHAPES, parts, strict=True)}
        return cls(engine, encoding_context("prefix", engine), prompts)

    def fill(self, store: ChunkStore) -> None:
        """Store every chunk, and every text before the first chunk."""
        print_ = self.engine.fingerprint
        for prompt in self.prompts.values():
            keys = chunk_keys(prompt, print_, "encoded", self.encoding, "")
            precompute(self.engine, store, [*text_keys(prompt, print_, "encoded"), *keys])

    def filled(self, path: Path) -> Path:
        """``path``, with a store of all of these."""
        with DiskStore(path) as store:
            self.fill(store)
        return path
