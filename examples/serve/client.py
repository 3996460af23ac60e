"""The OpenAI client against ``ragcache serve``: ``python client.py [URL]``.

The API key is read from RAGCACHE_KEY, if the service requires one.
"""

from __future__ import annotations

import os
import sys

from openai import OpenAI

QUESTION = "What does Corvex Mills make?"
DOCUMENTS = [
    {"title": "Corvex Mills", "text": "Corvex Mills makes clocks."},
    {"text": "Mira Holt works as a painter. She lives in Oslo."},
]


def main(url: str = "http://127.0.0.1:8000") -> None:
    with OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("RAGCACHE_KEY", "none")) as client:
        answer = client.chat.completions.create(
            model="ragcache",
            messages=[{"role": "user", "content": QUESTION}],
            extra_body={"documents": DOCUMENTS},
        )
        print(answer.choices[0].message.content)
        print(answer.usage)
        print(answer.model_extra and answer.model_extra["ragcache"]["chunks"])
        stream = client.chat.completions.create(
            model="ragcache",
            messages=[{"role": "user", "content": QUESTION}],
            stream=True,
            extra_body={"documents": DOCUMENTS},
        )
        for event in stream:
            print(event.choices[0].delta.content or "", end="", flush=True)
        print()


if __name__ == "__main__":
    main(*sys.argv[1:])
