"""A small RagCache over a random model: everything real but the weights and the embedder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ragcache.blend import blender
from ragcache.core.calibration import Calibration
from ragcache.rag import RagCache
from ragcache.retriever.embed import HashEmbedder
from ragcache.settings import Settings
from ragcache.store.disk.store import DiskStore
from ragcache.types import Document
from tests import models

DOCUMENTS = [
    Document("holt", "Mira Holt keeps a parrot. She plays the cello and lives by the sea."),
    Document("mill", "The old mill in Bexley stands on the river Avon. It grinds no more."),
    Document("boats", "Her father built boats in Oslo. The boats were small and fast."),
]


#: A chat template.
CHATML = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def report(paragraphs: int) -> str:
    """A long text, in which chunks are found."""
    return "\n\n".join(
        f"Paragraph {n} of the report. " + f"The town of Riverton has {n + 3} harbours. " * 12
        for n in range(paragraphs)
    )


def small(path: Path, *, seed: int = 0, **settings: object) -> RagCache:
    """A store in ``path`` with a Llama whose weights follow ``seed``; answers of 6 tokens.

    The ratio is fixed, so that nothing depends on how fast this machine is.
    """
    given = {"max_tokens": 6, "top_k": 2, "ratio": 0.15, **settings}
    engine = models.engine("llama", seed=seed)
    store = DiskStore(path)
    return RagCache(engine, store, HashEmbedder(), path, Settings(**given))  # type: ignore[arg-type]


def save_model(path: Path, *, seed: int = 0) -> Path:
    """The same model as a folder that from_pretrained loads."""
    models.model("llama", seed=seed).save_pretrained(path)
    models.tokenizer().save_pretrained(path)
    return path


def calibration(cache: RagCache, **changes: Any) -> Calibration:
    """One that covers the answers of ``cache``, with these ``changes``."""
    own = cache.engine.fingerprint
    made = Calibration(
        epsilon=0.05,
        confidence=0.95,
        disagreement="answer",
        max_tokens=6,
        mode="fused",
        ratio=0.05,
        questions=120,
        failures=1,
        model=str(own),
        fingerprint=own.digest.hex(),
        codec=own.codec,
        encoding_context=cache.encoding.mode,
        date="2026-11-30",
        context_digest=cache.encoding.digest,
        revision=blender(changes.get("mode", "fused")).revision,
        most_chunks=50,
    )
    return replace(made, **changes)
