"""Answer a question about documents, and print the report."""

from __future__ import annotations

import sys

from ragcache import Document, RagCache

DOCUMENTS = [
    Document("holt", "Mira Holt works as a painter.\n\nShe lives in Oslo."),
    Document("corvex", "Corvex Mills makes clocks. The company is based in Bexley."),
]


def main(store: str = "my-store") -> None:
    with RagCache.open(store) as cache:  # or model="Qwen/Qwen2.5-0.5B-Instruct"
        cache.add(DOCUMENTS)
        for mode in ("full", "fused"):
            answer = cache.ask("What does Corvex Mills make?", mode=mode)
            report = answer.report
            print(f"{mode}: {answer.text.strip()}; {report.charged_share:.0%} computed")


if __name__ == "__main__":
    main(*sys.argv[1:])
