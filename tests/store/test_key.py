"""Everything that a chunk's KV depends on changes its key, each part by itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ragcache.store.key import IN_CONTEXT, ChunkKey, digest_tokens, variant_key
from ragcache.types import Fingerprint

FIELDS = {
    "weights": "a8b6",
    "config": "c0",
    "tokenizer": "t0",
    "template": "",
    "dtype": "bfloat16",
    "codec": "raw",
    "adapter": "",
    "format": "1",
}
MODEL = Fingerprint(tuple(FIELDS.items()), "tiny")
KEY = ChunkKey(MODEL, (1, 2, 3), (7, 8), "prefix", "acme")


@pytest.mark.parametrize("field", FIELDS)
def test_every_fingerprint_field_changes_the_key(field: str) -> None:
    other = Fingerprint(tuple((FIELDS | {field: "other"}).items()), "tiny")
    assert other.digest != MODEL.digest
    assert replace(KEY, fingerprint=other).digest != KEY.digest


@pytest.mark.parametrize("field", FIELDS)
def test_a_missing_fingerprint_field_changes_the_key(field: str) -> None:
    fewer = Fingerprint(tuple(item for item in FIELDS.items() if item[0] != field))
    assert fewer.digest != MODEL.digest


def test_order_and_name_of_a_fingerprint_do_not_matter() -> None:
    assert Fingerprint(tuple(reversed(MODEL.fields)), "renamed").digest == MODEL.digest


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": (1, 2, 4)},
        {"tokens": (1, 2)},
        {"tokens": (3, 2, 1)},
        {"behind": (7, 9)},
        {"behind": ()},
        {"mode": "context"},
        {"tenant": "other"},
        {"tenant": ""},
    ],
    ids=str,
)
def test_every_key_field_changes_the_key(change: dict[str, Any]) -> None:
    assert replace(KEY, **change).digest != KEY.digest


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"behind": ()}, True),
        ({"mode": "context"}, True),
        ({"fingerprint": Fingerprint(())}, True),
        ({"tenant": "other"}, False),
        ({"tokens": (1, 2)}, False),
    ],
    ids=str,
)
def test_content_is_tenant_and_tokens(change: dict[str, Any], same: bool) -> None:
    assert (replace(KEY, **change).content == KEY.content) is same


def test_equal_keys_have_equal_digests() -> None:
    again = ChunkKey(Fingerprint(tuple(FIELDS.items())), (1, 2, 3), (7, 8), "prefix", "acme")
    assert again == KEY and again.digest == KEY.digest


def test_tokens_do_not_move_between_prefix_and_chunk() -> None:
    left = ChunkKey(MODEL, tokens=(2, 3), behind=(1,))
    right = ChunkKey(MODEL, tokens=(3,), behind=(1, 2))
    assert left.digest != right.digest


def test_text_does_not_move_between_fields() -> None:
    split = [Fingerprint((("ab", "c"),)), Fingerprint((("a", "bc"),)), Fingerprint((("abc", ""),))]
    joined = [Fingerprint((("a", "b"), ("c", "d"))), Fingerprint((("a", "bc"), ("", "d")))]
    assert len({fingerprint.digest for fingerprint in split + joined}) == 5
    modes = [ChunkKey(MODEL, (1,), mode="a", tenant="b"), ChunkKey(MODEL, (1,), mode="ab")]
    assert modes[0].digest != modes[1].digest


def test_a_tenant_is_not_taken_for_tokens() -> None:
    tenant = digest_tokens((1,)).hex()
    assert ChunkKey(MODEL, (1,), tenant=tenant).digest != ChunkKey(MODEL, (1,)).digest


def test_a_token_id_is_its_value_not_its_bytes() -> None:
    assert digest_tokens((256,)) != digest_tokens((0, 1)) != digest_tokens((1, 0))
    assert digest_tokens((0,)) != digest_tokens(()) != digest_tokens((0, 0))


@pytest.mark.parametrize("token", [-1, 1 << 32])
def test_no_such_token_id(token: int) -> None:
    with pytest.raises(OverflowError):
        digest_tokens((token,))


def test_a_variants_key_names_its_company_and_its_tenant() -> None:
    key = variant_key(MODEL, (1, 2), (3, 4), "ann")
    assert (key.fingerprint, key.tokens, key.behind, key.tenant) == (MODEL, (1, 2), (), "ann")
    assert key.mode == f"{IN_CONTEXT}:{digest_tokens((3, 4)).hex()[:32]}"
    assert key.digest != variant_key(MODEL, (1, 2), (4, 3), "ann").digest
    assert variant_key(MODEL, (1, 2), (3, 4)).tenant == ""
