"""Batches, little memory, and faults: a correct answer or a clear error, and no hang."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ragcache.blend.cacheblend import CacheBlend
from ragcache.blend.full import Full
from ragcache.blend.fused import Fused
from ragcache.blend.prophet import Prophet
from ragcache.blend.reuse import Reuse
from ragcache.store.disk.store import DiskStore
from ragcache.types import Prompt
from ragcache.vllm.handoff import new_ticket
from ragcache.vllm.manifest import Manifest
from ragcache.vllm.salt import cache_salt
from tests.vllm import scene
from tests.vllm.scene import Request, Scene

pytestmark = pytest.mark.vllm

MODES = [Reuse(), Fused(0.3), CacheBlend(0.3), Prophet(0.3)]


def batch(given: Scene, copies: int = 3) -> list[tuple[Request, Prompt, Any]]:
    """Plain and fused requests for prompts of unlike length."""
    made: list[tuple[Request, Prompt, Any]] = []
    for number in range(copies):
        texts = scene.TEXTS[: 1 + number % 3]
        prompt = given.engine.template.prompt(texts, f"{scene.QUESTION} {number}")
        made.append((Request(prompt), prompt, Full()))
        made += [(Request.fused(prompt, mode, given), prompt, mode) for mode in MODES]
    return made


def check_batch(
    given: Scene, llm: Any, tokens: int, copies: int = 3, *, ignore_eos: bool = False
) -> None:
    asked = batch(given, copies)
    requests = [request for request, _, _ in asked]
    said = given.ask(llm, requests, 240, tokens, ignore_eos=ignore_eos)
    for one, (_, prompt, mode) in zip(said, asked, strict=True):
        given.check(one, prompt, mode, tokens)


def test_a_batch(tiny: Scene, llm: Any) -> None:
    check_batch(tiny, llm, scene.TOKENS)


def refused(given: Scene, llm: Any, request: Request, prompt: Prompt | None = None) -> str:
    """Why nothing was loaded; vLLM's own answer is given all the same, and it is exact."""
    [said] = given.ask(llm, [request])
    if prompt is not None:
        given.check(replace(said, refused=None), prompt, Full())
    assert said.refused is not None
    return said.refused


def test_a_wrong_prompt(tiny: Scene, llm: Any) -> None:
    request = Request.fused(tiny.prompt, Reuse(), tiny)
    other = tiny.engine.template.prompt(scene.TEXTS[1:], scene.QUESTION)
    request.tokens = other.tokens
    assert "tokens" in refused(tiny, llm, request, other)
    request = Request.fused(tiny.prompt, Reuse(), tiny)
    request.tokens = (*tiny.prompt.tokens[:-1], 7)
    assert "are not those" in refused(tiny, llm, request)


def test_a_missing_salt(tiny: Scene, llm: Any) -> None:
    request = Request.fused(tiny.prompt, Reuse(), tiny)
    request.salt = None
    assert "no cache_salt" in refused(tiny, llm, request, tiny.prompt)


def test_another_model(tiny: Scene, llm: Any) -> None:
    request = Request.fused(tiny.prompt, Reuse(), tiny, model="0" * 64)
    assert "fingerprint 00000000" in refused(tiny, llm, request, tiny.prompt)


@pytest.mark.parametrize(
    ("mode", "why"),
    [
        ("best", "mode 'best' is unknown"),
        ("fused:ratio=2", "no parameter 'ratio'"),
        ("cacheblend:check_layer=40", "checks layer 40"),
        ("ape", "share positions"),
    ],
)
def test_a_mode_that_cannot_be(tiny: Scene, llm: Any, mode: str, why: str) -> None:
    made = Manifest.fuse(tiny.prompt, mode, tiny.engine.fingerprint.digest, ticket=new_ticket())
    assert why in refused(tiny, llm, Request(tiny.prompt, made, salt=cache_salt(made)), tiny.prompt)


def test_a_manifest_that_cannot_be_read(tiny: Scene, llm: Any) -> None:
    class Wrong(Manifest):
        def params(self) -> dict[str, Any]:
            return {"ragcache": {"version": 1, "task": "dance"}}

    made = Manifest.fuse(tiny.prompt, "reuse", tiny.engine.fingerprint.digest)
    request = Request(tiny.prompt, Wrong(**{f: getattr(made, f) for f in made.__slots__}))
    [said] = tiny.ask(llm, [request])
    tiny.check(said, tiny.prompt, Full())


def test_a_load_that_dies(tiny: Scene, llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM computes what it was promised, once, and the next request is served again."""
    layers, seen = DiskStore.layers, []

    def dies(self: DiskStore, chunks: Any, layer: int) -> Any:
        seen.append(layer)
        if layer == 5:
            raise OSError("the disk is gone")
        return layers(self, chunks, layer)

    with monkeypatch.context() as patch:
        patch.setattr(DiskStore, "layers", dies)
        for made in MODES:
            request = Request.fused(tiny.prompt, made, tiny)
            assert refused(tiny, llm, request, tiny.prompt) == "the disk is gone"
    assert seen.count(5) == len(MODES), "what failed is not tried again"
    llm.reset_prefix_cache()
    for made in MODES:
        [said] = tiny.ask(llm, [Request.fused(tiny.prompt, made, tiny)])
        tiny.check(said, tiny.prompt, made)


def test_a_load_that_dies_in_a_batch(
    tiny: Scene, llm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm.reset_prefix_cache()
    layers = DiskStore.layers

    def dies(self: DiskStore, chunks: Any, layer: int) -> Any:
        if layer == 5 and len(chunks) == 2:  # the prefix and one chunk
            raise OSError("the disk is gone")
        return layers(self, chunks, layer)

    monkeypatch.setattr(DiskStore, "layers", dies)
    asked = batch(tiny)
    said = tiny.ask(llm, [request for request, _, _ in asked], 120)
    for one, (_, prompt, mode) in zip(said, asked, strict=True):
        fails = len(prompt.chunks) == 1 and not isinstance(mode, Full)
        assert (one.refused is not None) == fails
        tiny.check(replace(one, refused=None), prompt, Full() if fails else mode)
