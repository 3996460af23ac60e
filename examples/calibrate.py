"""Find the smallest ratio that keeps full prefill's answers, on your own questions.

``ragcache calibrate questions.txt --store my-store`` does the same.
"""

from __future__ import annotations

import sys
from pathlib import Path

from ragcache.eval.calibrate import calibrate, cheapest, retrieve_contexts, settings_of_store
from ragcache.rag import RagCache
from ragcache.settings import Settings


def main(questions: str, store: str) -> None:
    with RagCache.open(store) as cache:
        contexts = retrieve_contexts(
            Path(questions), cache
        )  # each question with its retrieved chunks
        settings = settings_of_store(Settings.load(), cache)
    curve = calibrate(settings, contexts, ["fused"], max_tokens=8)
    for point in curve:
        kept = point.same.value if point.same else 0.0
        print(f"{point.mode:12} keeps {kept:4.0%}, computes {point.charged:4.0%}")
    chosen = cheapest(curve, keep=0.95)
    print("use", chosen.mode if chosen else "full")


if __name__ == "__main__":
    main(*sys.argv[1:])
