"""Answers over servers that are played by the embedded engine: what is sent, and what is made of
the reply."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ragcache.blend import Blender
from ragcache.blend.fused import Fused
from ragcache.blend.reuse import Reuse
from ragcache.core.generate import LocalGenerator
from ragcache.core.request import PromptRequest
from ragcache.engine.base import Prefilled
from ragcache.errors import ModelError, RagCacheError
from ragcache.planning.lookup import text_keys
from ragcache.store.disk.store import DiskStore
from ragcache.store.memory import MemoryStore
from ragcache.types import Answer, Certificate, Part, Prompt, Sampling, Tokens
from ragcache.vllm.http import ServerUnreachable
from ragcache.vllm.jobs import JobRunner, refusal_reply
from ragcache.vllm.manifest import Manifest
from ragcache.vllm.planner import PlannedRequest, Planner
from ragcache.vllm.stream import VllmGenerator
from tests.vllm.shapes import SHAPES, Shapes

SAMPLING = Sampling(max_tokens=6)


class Servers:
    """Two servers of a store. ``breaks_after``: tokens after which the first one stops."""

    def __init__(self, shapes: Shapes, store: DiskStore, breaks_after: int | None = None) -> None:
        self.shapes, self.store, self.breaks_after = shapes, store, breaks_after
        self.broken = {"a"}
        stores: Any = SimpleNamespace(root=store.tables.path, of=lambda tenant: store)
        self.runner = JobRunner(shapes.engine, stores)
        self.bodies: list[dict[str, Any]] = []
        self.encoded: list[tuple[Tokens, int]] = []  # context, and how many chunks

    @property
    def generator(self) -> VllmGenerator:
        engine: Any = _Engine(self)
        return VllmGenerator(engine, self.store, self.shapes.encoding)

    def prefilled(self, body: dict[str, Any]) -> Prefilled:
        """The prompt, fused if the planner accepts its manifest, else computed."""
        params = body.get("kv_transfer_params")
        request = PlannedRequest("r", params, body["prompt"], body.get("cache_salt"))
        planner = Planner(self.shapes.engine.fingerprint.digest.hex())
        count = planner.match(request, 0)
        assert planner.refused == {}
        planner.allocate("r", [], count)
        seen: list[Prefilled] = []
        forward = self.shapes.engine.prefill
        with pytest.MonkeyPatch.context() as patch:

            def prefills(tokens: Tokens, *args: Any, **options: Any) -> Prefilled:
                options["room"] = SAMPLING.max_tokens
                seen.append(forward(tokens, *args, **options))
                return seen[-1]

            patch.setattr(self.shapes.engine, "prefill", prefills)
            for job in planner.take_jobs():
                try:
                    self.runner.run(job)
                except RagCacheError as error:
                    reply = refusal_reply(str(error))
                    self.runner.replies.write_report(job.manifest.ticket, reply)
        return seen[-1] if seen else forward(tuple(body["prompt"]), room=SAMPLING.max_tokens)

    class _Stream:
        def __init__(self, servers: Servers, url: str, body: dict[str, Any]) -> None:
            self.servers, self.url, self.body = servers, url, body
            servers.bodies.append(body)

        def poll(self, wait_s: Callable[[], float]) -> Iterator[int]:
            engine = self.servers.shapes.engine
            sampling = Sampling(max_tokens=self.body["max_tokens"])
            steps = engine.decode(self.servers.prefilled(self.body), sampling)
            for number, step in enumerate(steps):
                if self.url in self.servers.broken and number == self.servers.breaks_after:
                    raise ServerUnreachable(f"{self.url}: it has stopped")
                yield step.token

        def close(self) -> None:
            pass


class _Engine:
    """In place of a VllmEngine."""

    ends = frozenset({2})  # the EOS of tests.models

    def __init__(self, servers: Servers) -> None:
        self._servers, self.replicas = servers, SimpleNamespace(choose=self._choose)
        self.client = SimpleNamespace(stream=lambda url, body: servers._Stream(servers, url, body))
        self.replies = servers.runner.replies

    def __getattr__(self, name: str) -> Any:
        return getattr(self._servers.shapes.engine, name)

    def encode(self, chunks: Any, *, context: Tokens = ()) -> Any:
        self._servers.encoded.append((context, len(chunks)))
        return self._servers.shapes.engine.encode(chunks, context=context)

    def _choose(self, chunks: dict[bytes, int], without: list[str]) -> str | None:
        return next((url for url in ("a", "b") if url not in without), None)


@pytest.fixture(scope="module")
def shapes() -> Shapes:
    return Shapes.make()


@pytest.fixture(scope="module")
def store(shapes: Shapes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DiskStore]:
    with DiskStore(tmp_path_factory.mktemp("stream") / "store") as made:
        shapes.fill(made)
        yield made


def answered(servers: Servers, prompt: Prompt, mode: Blender, **options: Any) -> Answer:
    return servers.generator.stream(PromptRequest(prompt, mode, SAMPLING, **options)).answer


def embedded(shapes: Shapes, prompt: Prompt, mode: Blender) -> Answer:
    held = MemoryStore()
    shapes.fill(held)
    local = LocalGenerator(shapes.engine, held, shapes.encoding)
    return local.stream(PromptRequest(prompt, mode, SAMPLING)).answer


def sent(body: dict[str, Any]) -> Manifest | None:
    return Manifest.read(body.get("kv_transfer_params"))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", [Reuse(), Fused(0.3)], ids=str)
def test_an_answer_is_the_embedded_engine_s(
    shapes: Shapes, store: DiskStore, mode: Blender, shape: str
) -> None:
    servers, prompt = Servers(shapes, store), shapes.prompts[shape]
    answer, expected = answered(servers, prompt, mode), embedded(shapes, prompt, mode)
    assert (answer.tokens, answer.text) == (expected.tokens, expected.text)
    manifest = sent(servers.bodies[0])
    assert (manifest is None) == (shape == "no chunk")
    if manifest is not None:
        assert manifest.prompt(prompt.tokens) == prompt
        assert answer.report.reused_tokens == expected.report.reused_tokens


@pytest.mark.parametrize("shape", ["no chunk", "chunk first"])
def test_a_promise_that_needs_the_margin_is_not_made(
    shapes: Shapes, store: DiskStore, shape: str
) -> None:
    """Servers return no logits. Without a chunk, the answer is full prefill's."""
    made = Certificate(True, "", 0.05, 0.95, "answer", "fused", 0.3, 120, "2026-11-30")
    needs = replace(made, least_margin=2.0)
    for given in (made, needs):
        answer = answered(
            Servers(shapes, store), shapes.prompts[shape], Fused(0.3), certificate=given
        )
        found = answer.report.certificate
        assert found is not None and not found.escalated
        assert found.covered == (given is made or shape == "no chunk")
        assert found.covered or "its logits are not known here" in found.reason


@pytest.mark.parametrize("shape", SHAPES)
def test_another_server_continues_after_the_tokens_so_far(
    shapes: Shapes, store: DiskStore, shape: str
) -> None:
    servers, prompt = Servers(shapes, store, breaks_after=2), shapes.prompts[shape]
    answer = answered(servers, prompt, Fused(1.0))
    assert answer.tokens == embedded(shapes, prompt, Fused(1.0)).tokens
    assert any("continued on another server after 2 tokens" in f for f in answer.report.fallbacks)
    second = servers.bodies[1]
    assert tuple(second["prompt"]) == prompt.tokens + answer.tokens[:2]
    if (manifest := sent(second)) is not None:
        assert manifest.prompt(second["prompt"]) == prompt.continued(answer.tokens[:2])


def test_a_prompt_that_no_server_finishes(shapes: Shapes, store: DiskStore) -> None:
    servers = Servers(shapes, store, breaks_after=2)
    servers.broken = {"a", "b"}
    with pytest.raises(ModelError, match="no vLLM server answers: a, b cannot be reached"):
        answered(servers, shapes.prompts["chunk first"], Reuse())


def test_what_a_worker_refuses_is_an_error(shapes: Shapes, store: DiskStore) -> None:
    prompt = Prompt(shapes.prompts["chunk first"].parts[:2])
    with pytest.raises(ModelError, match="loads nothing for this prompt: the prompt ends with a"):
        answered(Servers(shapes, store), prompt, Reuse())


def test_a_prompt_that_ends_with_a_chunk_is_continued_by_a_text() -> None:
    prompt = Prompt((Part((1, 2)), Part((3,), True, (3, 4))))
    assert prompt.continued((5, 6)).parts == (*prompt.parts, Part((5, 6)))
    assert prompt.continued(()) == prompt
    assert Prompt(()).continued((5,)).parts == (Part((5,)),)


def test_the_context_is_sent_unless_the_tokens_before_the_first_chunk_are_the_same(
    shapes: Shapes, store: DiskStore
) -> None:
    servers, own = Servers(shapes, store), shapes.encoding.context
    chunk, question = (
        shapes.prompts["chunk first"].chunks[0],
        shapes.prompts["chunk first"].question,
    )
    for prefix in (own, (), (*own, 40)):
        answered(servers, Prompt.of(prefix, [chunk], question), Reuse(), keep=False)
    behind = [made.behind for made in map(sent, servers.bodies) if made is not None]
    assert behind == [None, own, own]


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_stored_after_an_answer(shapes: Shapes, tmp_path: Path, shape: str) -> None:
    """The texts before the first chunk, in one pass; none of a prompt without chunks."""
    prompt, mode = shapes.prompts[shape], Reuse()
    with DiskStore(tmp_path / "store") as store:
        servers = Servers(shapes, store)
        first = answered(servers, prompt, mode)
        assert sent(servers.bodies[0]) is None
        report = first.report
        assert report.reused_tokens == 0
        sizes = report.prefix_tokens, report.chunk_tokens, report.question_tokens
        assert sizes == (
            len(prompt.prefix),
            sum(map(len, prompt.chunks)),
            len(prompt) - sum(sizes[:2]),
        )
        if shape == "no chunk":
            assert servers.encoded == []
            return
        texts = text_keys(prompt, shapes.engine.fingerprint, "encoded")
        assert servers.encoded.count(((), 1)) == bool(texts)
        assert store.missing(texts) == []
        second = answered(servers, prompt, mode)
    expected = embedded(shapes, prompt, mode)
    assert second.tokens == expected.tokens
    assert second.report.computed == expected.report.computed
