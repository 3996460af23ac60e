"""Chats of unmodified clients: ``python -m bench.chat_turns --model smollm2 --out turns.jsonl``.

The official ``openai`` client and LangChain's ``ChatOpenAI`` send a chat of three turns to a server
on a loopback socket: a system message of the user's own, and articles, which the store has too.
They are pasted into the first question, or their chunks are sent as ``documents`` beside the
messages, as a client does that retrieves them itself. A conversation begins with another article
than those before it, so that its first turn has no prefix in common with them but the system
message.

Each turn is also answered by full prefill, in alternation. TTFT is from the call to the first piece
of text, both at the client. Tokens count as reused if their KV was loaded from the store or kept
from the turn before; of them, some are recomputed. What was missing is stored between two requests,
as it is while a user reads. The text of a prompt is compared with what ``apply_chat_template``
makes of the messages.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Literal

import openai
from pydantic import TypeAdapter

from bench.results import commit, machine, table
from bench.serve import KEY, TENANT, serving_as
from ragcache.api.service import Service
from ragcache.api.ticket_queue import EventCallback, Ticket
from ragcache.core.request import Request
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.engine.template import SEPARATOR
from ragcache.eval.articles import ARTICLES
from ragcache.retriever.source import read
from ragcache.types import Answer, Document

SYSTEM = (
    "You are the guide of a museum. Answer visitors from the articles that they show you, and from "
    "nothing else, in one or two short sentences. If the articles do not say it, say so."
)
TURNS = 3
MAX_TOKENS = 24
_QUESTIONS = (
    "In one sentence: what is the article on {} about?",
    "And which year does the article on {} mention first?",
    "Last question: which people does the article on {} name?",
)

Messages = list[dict[str, str]]
#: Where documents are sent: in the first question's text, or as ``documents`` with every request.
Place = Literal["pasted", "beside"]
#: Streams the answer to messages with fields beside them; the pieces are not empty.
Client = Callable[[Messages, Mapping[str, Any]], Iterator[str]]


@dataclass(frozen=True)
class Turn:
    client: str
    documents: Place
    conversation: int
    turn: int  # from 1
    tokens: int  # of the prompt
    loaded: int  # of them, tokens whose KV was loaded or kept
    recomputed: int  # of these, tokens that were recomputed
    ttft_s: float
    full_s: float  # TTFT of full prefill
    same_text: bool  # whether the prompt's text is the chat template's
    answer: str

    @property
    def reused(self) -> float:
        return self.loaded / self.tokens


class AnsweringService(Service):
    """A service whose latest answer can be inspected, with its prompt and report."""

    answer: Answer

    def submit(
        self, tenant: str, request: Request, on_event: EventCallback, **options: Any
    ) -> Ticket:
        def heard(kind: str, value: Any) -> None:
            if isinstance(value, Answer):
                self.answer = value
            on_event(kind, value)

        return super().submit(tenant, request, heard, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="name, folder or GGUF file")
    parser.add_argument("--out", type=Path, required=True, help="file for the results, JSON lines")
    parser.add_argument("--tokens", type=int, default=3000, help="of the first prompt, about")
    parser.add_argument("--rounds", type=int, default=3, help="conversations of each kind")
    parser.add_argument("--ratio", default="0.15", help="share of tokens to recompute, or auto")
    parser.add_argument("--threads", type=int, help="of torch")
    given = parser.parse_args()
    turns = []
    with given.out.open("wb") as out:
        for turn in measure(given.model, given.tokens, given.rounds, given.ratio):
            out.write(TypeAdapter(Turn).dump_json(turn) + b"\n")
            out.flush()
            print(line(turn), flush=True)
            turns.append(turn)
    ran = f"`python {shlex.join(sys.orig_argv[1:])}` on {machine()}; commit {commit()}."
    print(f"\n{show(turns)}\n{ran}")


def measure(model: str, tokens: int, rounds: int, ratio: str = "0.15") -> Iterator[Turn]:
    """The turns of ``rounds`` conversations of each kind, after one of each to warm up."""
    articles = list(read([ARTICLES]))
    with (
        TemporaryDirectory(prefix="ragcache-") as folder,
        serving_as(AnsweringService, Path(folder), model=model, ratio=ratio) as (service, http),
    ):
        service.add(TENANT, articles).result()
        clients = {"openai": openai_client, "ChatOpenAI": langchain_client}
        kinds: list[tuple[str, Place]] = [
            ("openai", "pasted"),
            ("openai", "beside"),
            ("ChatOpenAI", "pasted"),
        ]
        made = {name: make(f"{http.base_url}/v1") for name, make in clients.items()}
        number = 0
        for warm in range(rounds + 1):
            for name, where in kinds:
                shown = chosen(service, articles, number, tokens)
                chat = conversation(service, made[name], shown, where, swapped=bool(warm % 2))
                for turn in chat:
                    if warm:
                        yield replace(turn, client=name, conversation=number)
                number += 1


def openai_client(url: str) -> Client:
    client = openai.OpenAI(base_url=url, api_key=KEY, max_retries=0)

    def stream(messages: Messages, fields: Mapping[str, Any]) -> Iterator[str]:
        given: Any = messages
        for event in client.chat.completions.create(
            model="ragcache",
            messages=given,
            temperature=0,
            max_tokens=MAX_TOKENS,
            stream=True,
            extra_body=dict(fields),
        ):
            if event.choices and (piece := event.choices[0].delta.content):
                yield piece

    return stream


def langchain_client(url: str) -> Client:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own dependencies, at import
        from langchain_openai import ChatOpenAI
    options: dict[str, Any] = {"base_url": url, "api_key": KEY, "max_tokens": MAX_TOKENS}
    chat = ChatOpenAI(**options, model="ragcache", temperature=0, max_retries=0)

    def stream(messages: Messages, fields: Mapping[str, Any]) -> Iterator[str]:
        given: Any = messages
        for chunk in chat.stream(given, extra_body=dict(fields)):
            if chunk.text:
                yield chunk.text

    return stream


def chosen(
    service: Service, articles: Sequence[Document], number: int, tokens: int
) -> list[Document]:
    """Articles of about so many tokens, in an order of conversation ``number``. Conversations that
    follow one another begin with different ones."""
    first = number % len(articles)
    rest = [*articles[:first], *articles[first + 1 :]]
    Random(number).shuffle(rest)
    found, length = list[Document](), 0
    for article in (articles[first], *rest):
        length += len(service.default_cache.engine.tokenize(article.text))
        if found and length > tokens:
            break
        found.append(article)
    return found


def chunk_texts(service: Service, articles: Sequence[Document]) -> list[str]:
    """The texts of the articles' chunks, as the store has split them."""
    catalog = service.cache(TENANT).catalog
    rows = [catalog.rows_of(article.id) for article in articles]
    return [chunk.text for each in rows for chunk in catalog.chunks(each)]


def conversation(
    service: AnsweringService,
    client: Client,
    articles: Sequence[Document],
    where: Place,
    *,
    swapped: bool,
) -> Iterator[Turn]:
    """A chat about ``articles``. ``swapped``: full prefill answers first turns first."""
    pasted = where == "pasted"
    texts = [article.text.strip() for article in articles]
    fields = {} if pasted else {"documents": chunk_texts(service, articles)}
    messages: Messages = [{"role": "system", "content": SYSTEM}]
    for turn in range(1, TURNS + 1):
        title = texts[-turn % len(texts)].partition("\n")[0].lstrip("# ")
        question = _QUESTIONS[(turn - 1) % len(_QUESTIONS)].format(title)
        if pasted and turn == 1:
            question = "\n\n".join(["Here are some articles.", *texts, question])
        messages.append({"role": "user", "content": question})
        fused_first = (turn % 2 == 1) != swapped
        full_s, ttft_s, answer = 0.0, 0.0, None
        for full in (not fused_first, fused_first):
            if full:
                full_s = _timed(service, client, messages, {**fields, "ragcache": {"mode": "full"}})
                assert service.answer.report.cached_tokens == 0
            else:
                ttft_s = _timed(service, client, messages, fields)
                answer = service.answer
        assert answer is not None
        report = answer.report
        loaded = report.reused_tokens + report.recomputed_tokens + report.loaded_text_tokens
        engine = service.default_cache.engine
        yield Turn(
            client="",
            documents=where,
            conversation=0,
            turn=turn,
            tokens=len(answer.prompt),
            loaded=loaded,
            recomputed=report.recomputed_tokens,
            ttft_s=ttft_s,
            full_s=full_s,
            same_text="".join(engine.pieces(answer.prompt.tokens))
            == rendered(engine, messages, fields.get("documents", ())),
            answer=answer.text,
        )
        messages.append({"role": "assistant", "content": answer.text})


def _timed(
    service: AnsweringService, client: Client, messages: Messages, fields: Mapping[str, Any]
) -> float:
    """Seconds to the first piece. Returns when the answer is complete and what was missing is
    stored."""
    began = time.perf_counter()
    pieces = client(messages, fields)
    first = next(pieces, "")  # an answer may be empty
    taken = time.perf_counter() - began
    text = first + "".join(pieces)
    service.scheduler.call(lambda: None).result()
    assert text == service.answer.text
    return taken


def rendered(engine: Any, messages: Messages, documents: Sequence[str]) -> str:
    """What the model's chat template makes of the messages, with the documents in the last one."""
    assert isinstance(engine, TransformersEngine)
    *before, last = messages
    content = "".join(text + SEPARATOR for text in documents) + last["content"]
    text = engine.tokenizer.apply_chat_template(
        [*before, {**last, "content": content}], tokenize=False, add_generation_prompt=True
    )
    assert isinstance(text, str)
    return text


def line(one: Turn) -> str:
    """A turn as it is printed."""
    return (
        f"{one.client} {one.documents} {one.conversation:2d}.{one.turn} {one.tokens:,} tokens, "
        f"{one.reused:.1%} reused, {one.recomputed} of these recomputed; TTFT {one.ttft_s:.3f} s, "
        f"full {one.full_s:.3f} s ({one.full_s / one.ttft_s:.1f}x)"
        f"{'' if one.same_text else '; ANOTHER TEXT than the template renders'}"
    )


def show(turns: Sequence[Turn]) -> str:
    """A row for each client, place of the documents and turn: medians, and of ``full / TTFT`` the
    median of the quotients."""
    rows = []
    for kind in dict.fromkeys((one.client, one.documents, one.turn) for one in turns):
        found = [one for one in turns if (one.client, one.documents, one.turn) == kind]
        rows.append(
            [
                f"{kind[0]}, documents {kind[1]}, turn {kind[2]}",
                f"{median(one.tokens for one in found):,.0f}",
                f"{median(one.reused for one in found):.1%}",
                f"{median(one.recomputed for one in found):,.0f}",
                f"{median(one.tokens - one.loaded for one in found):,.0f}",
                f"{median(one.ttft_s for one in found):.3f}",
                f"{median(one.full_s for one in found):.3f}",
                f"{median(one.full_s / one.ttft_s for one in found):.1f}",
                f"{sum(one.same_text for one in found)} of {len(found)}",
            ]
        )
    heads = ["client", "tokens", "reused", "recomputed", "new", "TTFT s", "full s", "full / TTFT"]
    return table([*heads, "same text"], rows)


if __name__ == "__main__":
    main()
