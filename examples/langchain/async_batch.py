"""Ask several questions concurrently with asyncio; the engine interleaves them.

python -m examples.langchain.async_batch
"""

from __future__ import annotations

import asyncio

from examples.langchain.chain import QUESTION, build


async def main(folder: str) -> None:
    chain = await asyncio.to_thread(build, folder)  # loads a model
    questions = [QUESTION, "Where is Corvex Mills based?", "Where does Mira Holt live?"]
    for question, answer in zip(questions, await chain.abatch(questions), strict=True):
        reused = answer.response_metadata["ragcache"]["reused_tokens"]
        print(f"{question} {answer.text.strip()} ({reused} tokens reused)")


if __name__ == "__main__":
    asyncio.run(main("langchain-store"))
