"""The chat model: options, streaming, threads and loops, errors, and callbacks."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.load import dumpd, load
from langchain_core.messages import (
    AIMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
    message_to_dict,
    messages_from_dict,
    trim_messages,
)
from langchain_core.outputs import LLMResult
from langchain_core.runnables import RunnableLambda
from pydantic import SecretStr, ValidationError

from ragcache.errors import ConfigError, PromptError, RagCacheError
from ragcache.langchain import (
    ChatRagCache,
    RagCacheMessage,
    RagCacheMessageChunk,
    RagCacheRetriever,
    rag_messages,
)
from ragcache.langchain.convert import convert_messages
from ragcache.langchain.http_backend import HttpBackend
from ragcache.langchain.local_backend import LocalBackend
from ragcache.langchain.notebook_html import report_html
from ragcache.models import TINY
from ragcache.rag import RagCache
from ragcache.settings import Settings
from ragcache.types import Sampling
from tests import scene
from tests.langchain import stub
from tests.langchain.conftest import DOCUMENTS, PLACES, QUESTION

ASKED = rag_messages(QUESTION, DOCUMENTS)
TEXTS = [document.page_content for document in DOCUMENTS]
both_places = pytest.mark.parametrize("place", PLACES, indirect=True, scope="module")


@both_places
def test_options_reach_the_engine(place: dict[str, Any], cache: RagCache) -> None:
    options: dict[str, Any] = {"temperature": 1.5, "top_p": 0.9, "seed": 7, "max_tokens": 9}
    messages = [{"role": "user", "content": [*TEXTS, QUESTION]}]
    own = cache.ask(messages=messages, chunks=[], sampling=Sampling(**options), mode="reuse")
    made = ChatRagCache(**place, **options, mode="reuse").invoke(ASKED)
    called = ChatRagCache(**place).bind(**options).invoke(ASKED, mode="reuse")
    assert made.text == called.text == own.text
    report = called.response_metadata["ragcache"]
    assert (report["mode"], report["recomputed_tokens"]) == ("reuse", 0)
    ratio = ChatRagCache(**place, ratio=1.0).invoke(ASKED).response_metadata["ragcache"]
    assert ratio["parameters"]["recompute_ratio"] == 1.0


@both_places
def test_stop(place: dict[str, Any], cache: RagCache) -> None:
    whole = ChatRagCache(**place).invoke(ASKED)
    assert whole.response_metadata["finish_reason"] == "length"
    stop = [whole.text[2:4]]
    for answer in (
        ChatRagCache(**place).invoke(ASKED, stop=stop),
        ChatRagCache(**place, stop=stop).invoke(ASKED),
        sum(ChatRagCache(**place).bind(stop=stop).stream(ASKED), RagCacheMessageChunk(content="")),
    ):
        assert answer.text == whole.text[:2]
        assert answer.response_metadata["finish_reason"] == "stop"


@both_places
def test_usage_and_report(place: dict[str, Any], cache: RagCache) -> None:
    answer = ChatRagCache(**place).invoke(ASKED)
    report = answer.response_metadata["ragcache"]
    usage = answer.usage_metadata
    assert usage is not None
    parts = ("prefix_tokens", "chunk_tokens", "question_tokens")
    assert usage["input_tokens"] == sum(report[part] for part in parts)
    assert usage["output_tokens"] == 6
    loaded = report["reused_tokens"] + report["loaded_text_tokens"]
    assert usage["input_token_details"] == {"cache_read": loaded}
    assert report["mode"] == "fused" and 0 < report["ttft_s"] < report["total_s"]
    assert {"id", "tokens", "recomputed", "charged", "miss"} <= report["chunks"][0].keys()
    assert answer.response_metadata["model_name"] == "llama"
    json.dumps(answer.response_metadata)


@both_places
def test_callbacks_see_tokens_and_the_report(place: dict[str, Any]) -> None:
    class Seen(BaseCallbackHandler):
        def __init__(self) -> None:
            self.tokens: list[str] = []
            self.results: list[LLMResult] = []

        def on_llm_new_token(self, token: Any, **kwargs: Any) -> None:
            self.tokens.append(token)

        def on_llm_end(self, response: LLMResult, **kwargs: Any) -> None:
            self.results.append(response)

    seen = Seen()
    chain: Any = RunnableLambda(lambda _: ASKED) | ChatRagCache(**place)
    answer = chain.invoke("", {"callbacks": [seen]})
    pieces = list(chain.stream("", {"callbacks": [seen]}))
    assert "".join(seen.tokens) == answer.text and len(pieces) > 2
    for result in seen.results:
        told = result.generations[0][0].message.response_metadata["ragcache"]  # type: ignore[union-attr]
        assert told["reused_tokens"] == answer.response_metadata["ragcache"]["reused_tokens"]
    assert seen.results[0].llm_output is not None
    assert seen.results[0].llm_output["ragcache"] == answer.response_metadata["ragcache"]


@both_places
def test_many_at_once_from_threads_and_loops(place: dict[str, Any]) -> None:
    model = ChatRagCache(**place)
    want = model.invoke(ASKED).text

    async def several() -> list[str]:
        return [m.text for m in await asyncio.gather(*(model.ainvoke(ASKED) for _ in range(3)))]

    with ThreadPoolExecutor(4) as pool:
        loops = [pool.submit(asyncio.run, several()) for _ in range(2)]
        threads = [pool.submit(model.invoke, ASKED) for _ in range(4)]
        assert [text for loop in loops for text in loop.result()] == [want] * 6
        assert [thread.result().text for thread in threads] == [want] * 4


@both_places
def test_the_event_loop_is_never_blocked(place: dict[str, Any]) -> None:
    model = ChatRagCache(**place)
    model.invoke("warm up")

    async def main() -> float:
        asked = asyncio.create_task(model.abatch([ASKED] * 4))
        longest, last = 0.0, time.perf_counter()
        while not asked.done():
            await asyncio.sleep(0)
            now = time.perf_counter()
            longest, last = max(longest, now - last), now
        assert len(await asked) == 4
        return longest

    began = time.perf_counter()
    longest = asyncio.run(main())
    assert longest < 0.5 * (time.perf_counter() - began)


def test_langchains_cache_tells_calls_apart(cache: RagCache) -> None:
    model = ChatRagCache(store=cache, cache=InMemoryCache())
    one, two = (model.invoke(QUESTION, documents=[text]) for text in TEXTS[:2])
    again = model.invoke(QUESTION, documents=[TEXTS[0]])
    assert again.response_metadata["ragcache"] == one.response_metadata["ragcache"]
    assert two.response_metadata["ragcache"] != one.response_metadata["ragcache"]


def test_a_stream_that_is_left_is_given_up(cache: RagCache) -> None:
    model = ChatRagCache(store=cache, max_tokens=300)
    assert isinstance(model.backend, LocalBackend)

    async def first() -> None:
        async for _ in model.astream(ASKED):
            break

    next(iter(model.stream(ASKED)))
    asyncio.run(first())
    ended = time.monotonic() + 5
    while model.backend.scheduler.depth() != (0, 0):
        assert time.monotonic() < ended
        time.sleep(0.01)


@both_places
def test_what_cannot_be_is_refused(place: dict[str, Any]) -> None:
    model = ChatRagCache(**place)
    with pytest.raises(TypeError, match="logprobs: unknown option of ChatRagCache"):
        model.invoke(ASKED, logprobs=True)
    with pytest.raises((ConfigError, PromptError), match="mode .no-such-mode. is unknown"):
        model.invoke(ASKED, mode="no-such-mode")
    with pytest.raises(NotImplementedError, match="cannot call tools: .* in a step of the chain"):
        model.bind_tools([])
    with pytest.raises(NotImplementedError, match="cannot call tools"):
        model.get_num_tokens_from_messages(ASKED, tools=[dict])
    with pytest.raises(TypeError, match="temprature: .* Did you mean temperature"):
        model.bind(temprature=1)
    with pytest.raises(TypeError, match="logprob: unknown option of ChatRagCache. Its options are"):
        ChatRagCache(**place | {"logprob": True})
    with pytest.raises(TypeError, match="top_k: unknown option of RagCacheRetriever"):
        RagCacheRetriever(**place | {"top_k": 3})
    with pytest.raises(PromptError, match="messages"):
        list(model.stream([]))


@both_places
def test_tokens_are_counted_by_the_models_own_tokenizer(
    place: dict[str, Any], cache: RagCache
) -> None:
    model = ChatRagCache(**place)
    text = "Mira Holt keeps a parrot."
    assert model.get_token_ids(text) == list(cache.engine.tokenize(text))
    assert model.get_num_tokens(text) == len(cache.engine.tokenize(text)) > 0
    for asked in (ASKED, [SystemMessage("Be brief."), HumanMessage(QUESTION)]):
        usage = model.invoke(asked).usage_metadata
        assert usage and model.get_num_tokens_from_messages(asked) == usage["input_tokens"]
    usage = model.invoke(QUESTION, documents=TEXTS).usage_metadata
    counted = model.get_num_tokens_from_messages([HumanMessage(QUESTION)], documents=TEXTS)
    assert usage and counted == usage["input_tokens"]
    assert model.get_num_tokens_from_messages([]) == 0
    own = ChatRagCache(**place, custom_get_token_ids=lambda text: [0] * len(text))
    assert own.get_num_tokens("four") == 4
    assert own.get_num_tokens_from_messages([HumanMessage("four")]) > 4


@both_places
def test_history_can_be_trimmed_by_the_model(place: dict[str, Any]) -> None:
    model = ChatRagCache(**place)
    said = [HumanMessage("How are you?"), AIMessage("Well."), HumanMessage(QUESTION)]
    room = model.get_num_tokens_from_messages(said[2:])
    assert trim_messages(said, max_tokens=room, token_counter=model) == said[2:]


@both_places
def test_traces_name_the_model(place: dict[str, Any]) -> None:
    class Seen(BaseCallbackHandler):
        def __init__(self) -> None:
            self.names: list[str] = []

        def on_chat_model_start(self, *args: Any, metadata: Any = None, **kwargs: Any) -> None:
            self.names.append(metadata["ls_model_name"])

    seen = Seen()
    config: Any = {"callbacks": [seen]}

    async def later(model: ChatRagCache) -> None:
        async for _ in model.astream(ASKED, config):
            pass

    ChatRagCache(**place).invoke(ASKED, config)
    list(ChatRagCache(**place).stream(ASKED, config))
    asyncio.run(ChatRagCache(**place).ainvoke(ASKED, config))
    asyncio.run(later(ChatRagCache(**place)))
    assert seen.names == ["llama"] * 4
    params = ChatRagCache(**place, stop=["x"])._get_ls_params(stop=[])
    assert "ls_stop" not in params  # this call has none


def test_a_service_that_does_not_name_its_model() -> None:
    assert ChatRagCache(base_url="http://127.0.0.1:9/v1").backend.model_name() == ""


@both_places
def test_an_empty_retrieval_is_no_documents(
    place: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ChatRagCache(**place)
    monkeypatch.setattr(RagCache, "retrieve", lambda *_: pytest.fail("chunks were retrieved"))
    found = AIMessage("", tool_calls=[{"name": "notes", "args": {}, "id": "1"}])
    tool = ToolMessage("", artifact=[], tool_call_id="1")
    asked = f"{TEXTS[0]} {QUESTION}"
    for answer in (
        model.invoke(asked, documents=[]),
        model.bind(documents=[]).invoke(asked),
        model.invoke(rag_messages(asked, [])),
        asyncio.run(model.ainvoke(rag_messages({"question": asked, "documents": []}))),
        model.invoke([HumanMessage(asked), found, tool]),
        sum(model.stream(asked, documents=[]), RagCacheMessageChunk(content="")),
    ):
        report = answer.response_metadata["ragcache"]
        assert report["chunks"] == []
        assert "there are no documents" in report["fallbacks"][-1]
        assert "the answer comes from the messages alone" in report["fallbacks"][-1]
    (message,) = rag_messages(asked, [])
    assert message_to_dict(message) == message_to_dict(
        messages_from_dict([message_to_dict(message)])[0]
    )
    converted = convert_messages(messages_from_dict([message_to_dict(message)]))
    assert converted.sources == ("content blocks",)


@both_places
def test_documents_without_text_are_counted(place: dict[str, Any]) -> None:
    answer = ChatRagCache(**place).invoke(QUESTION, documents=["", *TEXTS, " \n"])
    report = answer.response_metadata["ragcache"]
    assert len(report["chunks"]) == len(TEXTS)
    assert "2 of the documents had no text, and were left out" in report["fallbacks"]


@both_places
def test_no_documents_can_be_refused(place: dict[str, Any]) -> None:
    strict = ChatRagCache(**place, require_chunks=True)
    assert strict.invoke(ASKED).text
    for asked in (rag_messages(QUESTION, []), QUESTION):
        with pytest.raises(PromptError, match="no chunks to answer from.*require_chunks"):
            strict.invoke(asked)
        with pytest.raises(PromptError, match="no chunks to answer from"):
            list(ChatRagCache(**place).stream(asked, require_chunks=True))
        assert strict.invoke(asked, require_chunks=False).text


@pytest.mark.parametrize("given", ["In Oslo.", DOCUMENTS[0], {"id": "holt", "text": "In Oslo."}, 3])
def test_one_document_is_no_list(cache: RagCache, given: Any) -> None:
    model = ChatRagCache(store=cache)
    with pytest.raises(ConfigError, match="documents is one .*: give a list, such as"):
        model.invoke(QUESTION, documents=given)
    with pytest.raises(ConfigError, match="documents is one"):
        rag_messages(QUESTION, given)
    with pytest.raises(ConfigError, match="documents is one"):
        rag_messages({"question": QUESTION, "documents": given})
    with pytest.raises(ConfigError, match="stop is one str: give a list, such as"):
        model.invoke(ASKED, stop="END")  # type: ignore[arg-type]


def test_another_model_than_the_open_one_is_refused(cache: RagCache) -> None:
    with pytest.raises(
        ConfigError, match="'other' is requested, but the store was opened with llama"
    ):
        ChatRagCache(store=cache).invoke(ASKED, model="other")


def test_time_is_over(cache: RagCache) -> None:
    with pytest.raises(TimeoutError, match="no answer within 0.0 seconds"):
        ChatRagCache(store=cache).invoke(ASKED, timeout=0.0)


def test_one_place_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAGCACHE_STORE", "RAGCACHE_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValidationError, match="give either store= or base_url="):
        ChatRagCache()
    monkeypatch.setenv("RAGCACHE_BASE_URL", "")
    monkeypatch.setenv("RAGCACHE_STORE", "here")
    assert ChatRagCache().store == "here"
    with pytest.raises(ValidationError, match="give either store= or base_url="):
        ChatRagCache(store="here", base_url="http://there/v1")
    with pytest.raises(ConfigError, match="store is a int"):
        ChatRagCache(store=3).invoke("Hello")


def test_clients_variables_are_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAGCACHE_BASE_URL", "http://localhost:8000/v1")
    monkeypatch.setenv("RAGCACHE_API_KEY", "sk")
    assert Settings.load().mode == "fused"
    model = ChatRagCache()
    assert (model.base_url, model.api_key and model.api_key.get_secret_value()) == (
        "http://localhost:8000/v1",
        "sk",
    )


def test_a_folder_is_opened_once_and_closed_with_its_last_user(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    scene.small(tmp_path).close()  # makes the store, with an embedder that needs no package
    one, two = ChatRagCache(store=scene.small(tmp_path)), ChatRagCache(store=str(tmp_path))
    assert one.backend is two.backend
    cache = one.store
    del one, two
    cache.close()
    assert TINY  # the folder can be opened again
    scene.small(tmp_path).close()


@pytest.mark.filterwarnings("ignore:The function `load` is in beta")
def test_a_model_can_be_saved_and_loaded() -> None:
    places: list[dict[str, Any]] = [{"store": "a-store"}, {"base_url": "http://localhost:8000/v1"}]
    for place in places:
        model = ChatRagCache(**place, mode="reuse", temperature=0.5, stop=["\n"])
        saved = dumpd(model)
        again = load(saved, valid_namespaces=["ragcache"], allowed_objects=[ChatRagCache])
        assert again == model


@pytest.mark.filterwarnings("ignore:The function `load` is in beta")
def test_answers_are_shown_and_saved_as_what_they_are(cache: RagCache) -> None:
    model = ChatRagCache(store=cache)
    answer = model.invoke(ASKED)
    streamed = sum(model.stream(ASKED), RagCacheMessageChunk(content=""))
    assert isinstance(answer, RagCacheMessage) and isinstance(streamed, RagCacheMessageChunk)
    for shown in (answer._repr_html_(), streamed._repr_html_()):
        assert shown is not None and shown.count("hsl(") == 2 * len(DOCUMENTS)
    assert RagCacheMessage(content="no report")._repr_html_() is None
    again = load(dumpd(answer), allowed_objects="core")
    assert again.response_metadata == answer.response_metadata


def test_nothing_of_a_document_gets_into_the_page() -> None:
    evil = "<script>alert(1)</script>"
    chunk = {"id": evil, "tokens": 3, "recomputed": 1, "charged": 0.3, "miss": evil}
    shown = report_html(evil, {"mode": evil, "chunks": [chunk], "fallbacks": [evil]})
    assert "<script" not in shown and shown.count("&lt;script") == 6


def test_the_service_is_asked_as_its_contract_says(service: stub.Stub) -> None:
    model = ChatRagCache(
        base_url=service.url, api_key=SecretStr(stub.KEY), mode="fused", ratio=0.3, seed=1
    )
    model.invoke(ASKED)
    list(model.stream(ASKED))
    plain, streamed = service.asked[-2:]
    chunk = {"type": "chunk", "text": TEXTS[0], "id": "holt"}
    (message,) = plain["messages"]
    assert message["role"] == "user" and message["content"][0] == chunk
    assert message["content"][-1] == {"type": "text", "text": QUESTION}
    assert plain["documents"] == []
    assert plain["ragcache"] == {"mode": "fused", "ratio": 0.3}
    assert (plain["seed"], plain["stream"], streamed["stream"]) == (1, False, True)
    assert streamed["stream_options"] == {"include_usage": True}


def test_a_busy_service_is_asked_again(service: stub.Stub) -> None:
    model = ChatRagCache(base_url=service.url, api_key=SecretStr(stub.KEY))
    for busy in (1, 2):
        service.busy = busy
        assert model.invoke(ASKED).text == asyncio.run(model.ainvoke(ASKED)).text
    service.busy = 3
    with pytest.raises(RagCacheError, match="answered 503: busy"):
        model.invoke(ASKED)
    service.busy = 0


def test_a_key_that_is_refused(service: stub.Stub) -> None:
    model = ChatRagCache(base_url=service.url, api_key=SecretStr("wrong"))
    with pytest.raises(ConfigError, match="401: no such key. Check api_key"):
        model.invoke(ASKED)


def test_a_service_that_is_not_there() -> None:
    model = ChatRagCache(base_url="http://127.0.0.1:9/v1", max_retries=0)
    with pytest.raises(RagCacheError, match="no service answers at http://127.0.0.1:9/v1/chat"):
        model.invoke(ASKED)
    with pytest.raises(RagCacheError, match="no service answers"):
        asyncio.run(model.ainvoke(ASKED))


def test_an_error_in_the_middle_of_a_stream_is_raised() -> None:
    from ragcache.langchain.http_backend import _Events

    with pytest.raises(RagCacheError, match="the service ended the answer: too late"):
        list(_Events().read('data: {"error": {"message": "too late"}}'))
    assert isinstance(HttpBackend("http://localhost/v1"), HttpBackend)
    for url in ("http://localhost:8000", "http://localhost:8000/", "http://localhost:8000/v1/"):
        assert str(HttpBackend(url)._client.base_url) == "http://localhost:8000/v1/"
    assert (
        str(HttpBackend("https://kv.example/rag/v1")._client.base_url)
        == "https://kv.example/rag/v1/"
    )


def test_the_package_stays_light() -> None:
    code = (
        "import sys, ragcache.langchain; "
        "print([m for m in ('torch', 'langchain_core', 'httpx') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert out.stdout.strip() == "[]"


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import ragcache.langchain as package

    monkeypatch.setitem(sys.modules, "ragcache.langchain.chat", None)
    monkeypatch.setattr(package, "import_module", _missing)
    with pytest.raises(ImportError, match=r'pip install "ragcache-fusion\[langchain\]"'):
        package.__getattr__("ChatRagCache")
    with pytest.raises(AttributeError, match="no attribute 'Chat'"):
        package.Chat  # type: ignore[attr-defined]  # noqa: B018


def _missing(name: str) -> Any:
    raise ModuleNotFoundError(name, name="langchain_core")


@pytest.mark.parametrize("where", ["here", "on its own thread"])
def test_what_nobody_uses_any_more_ends(tmp_path: Path, where: str) -> None:
    with scene.small(tmp_path) as cache:
        before = set(threading.enumerate())
        held = [LocalBackend.open(cache)]
        held[0].run(lambda cache: cache.documents())
        own = set(threading.enumerate()) - before
        if where == "here":
            held.clear()
        else:
            held[0].scheduler.submit("", lambda _: map(list.clear, [held]), lambda *_: None)
        for thread in own:
            thread.join(5)
        assert own and not any(thread.is_alive() for thread in own)


def test_a_service_that_cannot_be_asked() -> None:
    with pytest.raises(RagCacheError, match="request to the service failed: .*Check base_url"):
        ChatRagCache(base_url="ftp://nowhere").invoke("Who?")
