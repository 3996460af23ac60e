"""Stream the chain's answer; the report is in the last piece.

python -m examples.langchain.stream
"""

from __future__ import annotations

from examples.langchain.chain import QUESTION, build


def main(folder: str) -> None:
    for piece in build(folder).stream(QUESTION):
        print(piece.text, end="", flush=True)
        if report := piece.response_metadata.get("ragcache"):
            print(f"\nfirst token after {1e3 * report['ttft_s']:.0f} ms")


if __name__ == "__main__":
    main("langchain-store")
