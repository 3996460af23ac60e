"""What is wrong with reused KV: parts of the error, estimated errors, and kinds of tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench.causes import (
    CHANGES,
    ESTIMATES,
    KINDS,
    LABELS,
    NEAR,
    OWN,
    SHARES,
    ask,
    extrapolated,
    kinds,
    without_common,
)
from ragcache.planning.context import encoding_context
from ragcache.testing import models
from ragcache.types import ChunkKV

ENGINE = models.engine()
TEXTS = [
    "Mira Holt keeps a parrot and plays the cello. " * 4,
    "She was born in Oslo in 1987, where her father built boats. " * 4,
    "The river Avon runs past the old mill in Bexley. " * 4,
]
PROMPT = ENGINE.template.prompt(TEXTS, "Where does she live?")


def test_exact_kv_that_is_stored_and_placed_is_full_prefill() -> None:
    encoding = encoding_context("prefix", ENGINE)
    labels = ["reuse", "exact KV, stored and placed", "after the exact prefix", *ESTIMATES]
    found = ask(ENGINE, encoding, PROMPT, labels)
    assert found["exact KV, stored and placed"]["kl"] < 1e-6 < found["reuse"]["kl"]
    # what is stored was computed after the exact prefix
    assert found["after the exact prefix"] == pytest.approx(found["reuse"], abs=1e-5)
    recomputed = [found[label]["kl"] for label in ESTIMATES]
    assert len(set(recomputed)) == len(recomputed)
    for share in SHARES:  # every token has one kind
        assert sum(found[f"kind: {kind}"][share] for kind in KINDS) == pytest.approx(1)


def test_every_label_is_a_variant_of_its_own() -> None:
    assert len(set(LABELS)) == len(LABELS)


def test_a_third_of_the_layers_is_exact() -> None:
    changed = CHANGES["exact in the middle third"]((kv(0.0), kv(1.0)), 4)
    assert [float(keys.mean()) for keys in changed.keys] == [0, 1, 0, 0]
    assert [float(values.mean()) for values in changed.values] == [0, 1, 0, 0]
    keys_alone = CHANGES["exact keys"]((kv(0.0), kv(1.0)), 4)
    assert {float(v.mean()) for v in keys_alone.values} == {0.0}


def test_the_common_error_is_the_mean_over_rows() -> None:
    stored, exact = kv(0.0), kv(0.0)
    noise = torch.randn(2, 6, 4)
    shifted = replace(
        exact, keys=tuple(k + noise for k in exact.keys), values=tuple(v + 3 for v in exact.values)
    )
    moved = without_common(True, True)((stored, shifted), 4)
    left = shifted.keys[1] - moved.keys[1]
    torch.testing.assert_close(left, noise - noise.mean(1, keepdim=True))
    torch.testing.assert_close(moved.values[2], shifted.values[2])  # all of it was common


def test_errors_are_extrapolated_as_a_gaussian_process_predicts() -> None:
    generator = torch.Generator().manual_seed(1)
    sensitivity = torch.rand(9, generator=generator) + 0.1
    known = torch.tensor([1, 0, 0, 1, 0, 1, 0, 0, 0], dtype=torch.bool)
    error = torch.randn(2, 3, 4, generator=generator)
    got = extrapolated(error, torch.arange(9), sensitivity, known)
    size = sensitivity**0.25
    place = torch.arange(9)
    covariance = size[:, None] * size * (1 + torch.exp(-(place[:, None] - place).abs() / NEAR))
    among = covariance[known][:, known] + torch.diag(OWN * size[known] ** 2)
    want = torch.einsum("nk,hkd->hnd", covariance[:, known] @ torch.linalg.inv(among), error)
    torch.testing.assert_close(got, want)


def test_kinds_of_tokens() -> None:
    pieces = ["The", " riv", "er", " runs", " past", " Oslo", " in", " 19", ",", "\n\n", "ly", " "]
    assert kinds(pieces, first=3) == [
        *["first"] * 3,
        *("word", "word", "name", "word", "digit", "punctuation", "line break"),
        *("rest of a word", "punctuation"),
    ]


def kv(value: float) -> ChunkKV:
    planes = tuple(torch.full((2, 6, 4), value) for _ in range(4))
    return ChunkKV(tuple(range(6)), planes, planes)
