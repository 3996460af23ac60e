"""Fused KV is never used for plain prompts: vLLM's prefix cache is on, and prompts are shared."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from ragcache.blend import Blender
from ragcache.blend.epic import Epic
from ragcache.blend.fused import Fused
from ragcache.blend.reuse import Reuse
from ragcache.types import Prompt
from ragcache.vllm import planner
from tests.vllm import scene
from tests.vllm.scene import EXACT, Request, Said, Scene

pytestmark = pytest.mark.vllm

MODES: list[Blender] = [Reuse(), Fused(0.3), Epic(3)]
QUESTIONS = (scene.QUESTION, "Where is the old mill?", "Who built boats?")
INTERLEAVINGS = 20


class References:
    """What every request must give, whatever was asked before it: one vLLM for each would do, and
    the embedded engine does as well."""

    def __init__(self, given: Scene) -> None:
        self.scene = given
        self._known: dict[tuple[Prompt, Blender | None], Any] = {}

    def wrong(self, said: Said, prompt: Prompt, mode: Blender | None) -> bool:
        from ragcache.blend.full import Full

        if (prompt, mode) not in self._known:
            self._known[prompt, mode] = self.scene.embedded(prompt, mode or Full())
        answer, logprobs = self._known[prompt, mode]
        first = said.logprobs[0]
        error = max(abs(got - float(logprobs[token])) for token, got in first.items())
        return said.tokens != answer.tokens or error > EXACT


def prompts(given: Scene) -> list[Prompt]:
    """The same chunks, with questions of several kinds."""
    template = given.engine.template
    return [template.prompt(scene.TEXTS[:3], question) for question in QUESTIONS]


def order(number: int) -> list[tuple[int, Blender | None]]:
    """One interleaving of plain and fused requests: which prompt, and how."""
    draw = random.Random(number)
    asked = [(which, mode) for which in range(len(QUESTIONS)) for mode in (None, *MODES)]
    draw.shuffle(asked)
    return asked[:6]


def interleaved(given: Scene, llm: Any, *, salted: bool) -> int:
    """Ask in 20 orders, some one by one and some together; how many answers are wrong."""
    known, wrong, all_prompts = References(given), 0, prompts(given)
    for number in range(INTERLEAVINGS):
        llm.reset_prefix_cache()
        asked = order(number)
        requests = []
        for which, mode in asked:
            request = Request(all_prompts[which])
            if mode is not None:
                request = Request.fused(all_prompts[which], mode, given)
            if not salted:
                request.salt = None
            requests.append(request)
        size = 1 + number % 3
        said: list[Said] = []
        for first in range(0, len(requests), size):
            said += given.ask(llm, requests[first : first + size])
        for (which, mode), one in zip(asked, said, strict=True):
            assert one.refused is None
            wrong += known.wrong(one, all_prompts[which], mode)
    return wrong


def test_twenty_interleavings_pollute_nothing(tiny: Scene, llm: Any) -> None:
    assert interleaved(tiny, llm, salted=True) == 0


def test_without_the_salt_they_would(
    tiny: Scene, llm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner, "check_salt", lambda manifest, given: None)
    assert interleaved(tiny, llm, salted=False) > 0


def test_the_same_recipe_is_found_in_the_cache(tiny: Scene, llm: Any) -> None:
    llm.reset_prefix_cache()
    long = tiny.engine.template.prompt(scene.TEXTS[:3] * 3, scene.QUESTION)
    made = Fused(0.3)
    for _ in range(3):
        request = Request.fused(long, made, tiny)
        [said] = tiny.ask(llm, [request])
        tiny.check(said, long, made)


def test_tenants_share_nothing(tiny: Scene, llm: Any, tmp_path: Path) -> None:
    """A tenant's store is another one: here it has none, so nothing is loaded for it."""
    [said] = tiny.ask(llm, [Request.fused(tiny.prompt, Reuse(), tiny, tenant="other")])
    assert "no store in" in (said.refused or "")
