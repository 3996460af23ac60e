"""Rules that choose rows: those of the shipped method, and what oracles observe."""

from __future__ import annotations

import pytest
import torch

from bench import rules
from bench.agreement import reply
from bench.observed import Observed, in_full, observe
from bench.rules import RULES, ask, computed
from ragcache.blend import blender
from ragcache.planning.context import EncodingContext, encoding_context
from ragcache.testing import models
from ragcache.types import Prompt

ENGINE = models.engine()
TEXTS = [
    "Mira Holt keeps a parrot and plays the cello. " * 4,
    "She was born in Oslo, where her father built boats. " * 4,
    "The river Avon runs past the old mill in Bexley. " * 4,
]
PROMPT = ENGINE.template.prompt(TEXTS, "Where does she live?")


def seen(prompt: Prompt, encoding: EncodingContext) -> Observed:
    return observe(ENGINE, computed(ENGINE, encoding, prompt), encoding, prompt, (5, 6, 7))


def test_sensitivity_is_the_shipped_method_without_attention(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ratio = 0.6
    chosen = {name: (RULES[name], ratio) for name in ("sensitivity", "half")}
    monkeypatch.setattr(rules, "VARIANTS", chosen)
    encoding = encoding_context("prefix", ENGINE)
    found = ask(ENGINE, encoding, PROMPT, chosen)
    store = computed(ENGINE, encoding, PROMPT)
    full = reply(ENGINE, store, encoding, PROMPT, blender("full"), ())
    method = blender("fused:attention=0", ratio)
    said = reply(ENGINE, store, encoding, PROMPT, method, full.tokens)
    assert found["sensitivity"] == pytest.approx(said.agreement(full), abs=1e-7)
    assert found["half"]["kl"] != pytest.approx(found["sensitivity"]["kl"], rel=0.01)


def test_kv_that_is_exact_has_no_error() -> None:
    one = ENGINE.template.prompt(TEXTS[:1], "Where does she live?")
    exact = seen(one, EncodingContext("exact", one.prefix))
    assert exact.key_error.max() < 1e-9 and exact.value_error.max() < 1e-9
    # of the question alone, a probe over exact KV sees what full prefill sees
    _, peaks = in_full(ENGINE, one, ())
    torch.testing.assert_close(exact.peak, peaks)


def test_only_the_first_chunk_is_exact_behind_the_prefix() -> None:
    found = seen(PROMPT, EncodingContext("prefix", PROMPT.prefix))
    first = found.chunk == 0
    for errors in (found.key_error, found.value_error):
        assert errors.shape == (ENGINE.spec.layers, len(found.rows))
        assert errors[:, first].max() < 1e-9 < errors[1:, ~first].min()


@pytest.mark.parametrize("name", RULES)
def test_a_rule_scores_every_row(name: str) -> None:
    n, layers = 12, 3
    values = torch.rand(n)
    each = torch.rand(layers, n)
    chunk = torch.arange(n) // 5
    made = Observed(torch.arange(n), chunk, values, values, each, each, each, each, count=6)
    scores = RULES[name](made)
    assert scores.shape == (n,) and scores.isfinite().all()
    if name == "first chunk, then sensitivity":
        assert scores[:5].min() > scores[5:].max()
