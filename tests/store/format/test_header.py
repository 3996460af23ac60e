"""Bytes become a valid header or a reason. Changed bytes are always detected."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from xxhash import xxh3_64_intdigest

from ragcache.store.base import Miss
from ragcache.store.format.codecs import codec
from ragcache.store.format.codecs.base import Bytes
from ragcache.store.format.header import (
    Header,
    Payload,
    decode_header,
    decode_layer,
    encode_header,
    layer_checksum,
)
from ragcache.store.format.record import check_kv
from ragcache.store.key import ChunkKey
from ragcache.types import ChunkKV
from tests.store.samples import DIM, HEADS, MODEL, make_key, make_kv

KEY = ChunkKey(MODEL, (5, 0, 2**32 - 1), (1, 2), "prefix", "Zoë")


def encode_layers(key: ChunkKey, kv: ChunkKV) -> list[tuple[Bytes, int]]:
    """Per layer, its bytes and their checksum."""
    pairs = zip(kv.keys, kv.values, strict=True)
    raws = codec(key.codec).encode_layers(list(pairs))
    return [(raw, layer_checksum(key.digest, layer, raw)) for layer, raw in enumerate(raws)]


def encode(key: ChunkKey, dtype: torch.dtype = torch.float32) -> tuple[Header, list[Bytes]]:
    kv = make_kv(key, dtype=dtype)
    layers = encode_layers(key, kv)
    payloads = [Payload(0, len(raw), checksum) for raw, checksum in layers]
    return Header.of(key, kv, payloads), [raw for raw, _ in layers]


def sealed(record: bytes | bytearray) -> bytes:
    """The record with the checksum that its changed bytes need."""
    body = bytes(record[:-8])
    return body + struct.pack("<Q", xxh3_64_intdigest(body))


def test_a_header_comes_back() -> None:
    header, _ = encode(KEY)
    assert decode_header(encode_header(header)) == header
    assert header.foreign(KEY) is None
    assert header.payload_bytes == header.spec.chunk_bytes(3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_layer_comes_back_bit_for_bit(dtype: torch.dtype) -> None:
    header, layers = encode(KEY, dtype)
    kv = make_kv(KEY, dtype=dtype)
    for layer, raw in enumerate(layers):
        pair = decode_layer(header, layer, raw.copy())
        assert not isinstance(pair, Miss)
        assert [t.dtype for t in pair] == [dtype, dtype]
        assert torch.equal(pair[0], kv.keys[layer]) and torch.equal(pair[1], kv.values[layer])


def test_no_number_is_normalised() -> None:
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16)  # all subnormals
    patterns[(patterns & 0x7F80) == 0x7F80] = 0  # all that is not finite
    plane = patterns.view(torch.bfloat16).view(1, -1, 8)
    key = ChunkKey(MODEL, tuple(range(plane.shape[1])))
    kv = ChunkKV(key.tokens, (plane,), (plane,))
    ((raw, checksum),) = encode_layers(key, kv)
    pair = decode_layer(Header.of(key, kv, [Payload(0, len(raw), checksum)]), 0, raw)
    assert not isinstance(pair, Miss)
    assert torch.equal(pair[0].reshape(-1).view(torch.int16), patterns)


def test_the_layout_is_little_endian_keys_then_values() -> None:
    key = ChunkKey(MODEL, (1,))
    keys, values = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0, 4.0]]])
    ((raw, _),) = encode_layers(key, ChunkKV((1,), (keys,), (values,)))
    assert bytes(raw) == struct.pack("<4f", 1, 2, 3, 4)


def test_views_are_stored_in_c_order() -> None:
    key = make_key()
    plane = torch.arange(HEADS * 5 * DIM, dtype=torch.float32).view(5, HEADS, DIM).transpose(0, 1)
    kv = ChunkKV(key.tokens, (plane,), (plane.flip(0),))
    ((raw, _),) = encode_layers(key, kv)
    assert bytes(raw[: len(raw) // 2]) == plane.contiguous().numpy().tobytes()


def test_a_layer_under_another_name_does_not_pass() -> None:
    header, layers = encode(KEY)
    moved = replace(header, key=make_key().digest)
    swapped = replace(header, payloads=header.payloads[::-1])
    for other in (moved, swapped):
        assert isinstance(miss := decode_layer(other, 0, layers[0]), Miss)
        assert miss.reason == "corrupt"
    assert isinstance(decode_layer(swapped, 0, layers[2]), Miss)  # checksum right, place wrong


def test_a_layer_of_another_length_does_not_pass() -> None:
    header, layers = encode(KEY)
    for raw, reason in (
        (layers[0][:-1], "truncated"),
        (layers[0][:0], "truncated"),
        (np.concatenate([layers[0]] * 2), "corrupt"),
    ):
        miss = decode_layer(header, 0, raw)
        assert isinstance(miss, Miss) and miss.reason == reason


def test_every_prefix_of_a_header_is_truncated() -> None:
    record = encode_header(encode(KEY)[0])
    for length in range(len(record)):
        miss = decode_header(record[:length])
        assert isinstance(miss, Miss) and miss.reason == "truncated"


def test_no_flipped_bit_of_a_header_passes() -> None:
    record = encode_header(encode(KEY)[0])
    for bit in range(8 * len(record)):
        changed = bytearray(record)
        changed[bit // 8] ^= 1 << bit % 8
        assert isinstance(decode_header(bytes(changed)), Miss)


def test_no_flipped_bit_of_a_layer_passes() -> None:
    header, layers = encode(KEY)
    for bit in range(8 * len(layers[1])):
        changed = layers[1].copy()
        changed[bit // 8] ^= 1 << bit % 8
        miss = decode_layer(header, 1, changed)
        assert isinstance(miss, Miss) and miss.reason == "corrupt"


def test_a_newer_format_is_foreign_and_says_so() -> None:
    record = bytearray(encode_header(encode(KEY)[0]))
    record[8:12] = struct.pack("<I", 2)
    assert decode_header(sealed(record)) == Miss(
        "foreign", "record format 2; this ragcache reads format 1"
    )
    assert decode_header(bytes(record)) == Miss("corrupt", "the header does not match its checksum")


def test_another_codec_is_foreign_and_says_so() -> None:
    record = encode_header(replace(encode(KEY)[0], codec="q4"))
    assert decode_header(record) == Miss(
        "foreign", "codec 'q4' is unknown to this version of ragcache"
    )


@pytest.mark.parametrize("data", [b"hello", b"RAGCHUNX" + bytes(200), bytes(300)], ids=len)
def test_other_bytes_are_foreign(data: bytes) -> None:
    miss = decode_header(data)
    assert isinstance(miss, Miss) and miss.reason == "foreign"


def noise(rng: random.Random, record: bytes) -> bytes:
    return rng.randbytes(rng.randrange(400))


def framed_noise(rng: random.Random, record: bytes) -> bytes:
    body = rng.randbytes(rng.randrange(400))
    return sealed(struct.pack("<8sII", b"RAGCHUNK", 1, 24 + len(body)) + body + bytes(8))


def mutated(rng: random.Random, record: bytes) -> bytes:
    changed = bytearray(record)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed))
        changed[at : at + rng.randrange(9)] = rng.choice([b"", b"\xff" * 4, rng.randbytes(5)])
    return bytes(changed)


def mutated_and_sealed(rng: random.Random, record: bytes) -> bytes:
    changed = bytearray(mutated(rng, record[16:-8]))
    return sealed(struct.pack("<8sII", b"RAGCHUNK", 1, 24 + len(changed)) + changed + bytes(8))


@pytest.mark.parametrize("make", [noise, framed_noise, mutated])
def test_arbitrary_bytes_are_a_miss(make: Callable[[random.Random, bytes], bytes]) -> None:
    rng = random.Random(1)
    record = encode_header(encode(KEY)[0])
    for _ in range(3000):
        data = make(rng, record)
        assert data == record or isinstance(decode_header(data), Miss)


def test_a_forged_header_is_refused_or_consistent() -> None:
    rng = random.Random(2)
    record = encode_header(encode(KEY)[0])
    for _ in range(3000):
        data = mutated_and_sealed(rng, record)
        header = decode_header(data)
        if isinstance(header, Header):
            assert encode_header(header) == data
            assert len(header.payloads) == header.spec.layers


def test_a_header_names_what_is_foreign_to_a_key() -> None:
    header, _ = encode(KEY)
    for changed, what in (
        (replace(header, key=bytes(32)), "key"),
        (replace(header, fingerprint=bytes(32)), "fingerprint"),
        (replace(header, content=bytes(32)), "content"),
        (replace(header, tokens=(5, 0, 1)), "list of tokens"),
    ):
        miss = changed.foreign(KEY)
        assert miss == Miss("foreign", f"the record under this key names another {what}")


def test_kv_that_cannot_be_stored_is_refused() -> None:
    key = make_key()
    plane = torch.zeros(HEADS, 5, DIM)
    with pytest.raises(ValueError, match="does not belong"):
        check_kv(key, make_kv(make_key(1)))
    with pytest.raises(ValueError, match="KV of dtype float64: use one of"):
        check_kv(key, ChunkKV(key.tokens, (plane.double(),), (plane.double(),)))
    with pytest.raises(ValueError, match="bfloat16, float32"):
        check_kv(key, ChunkKV(key.tokens, (plane,), (plane.bfloat16(),)))
    with pytest.raises(ValueError, match="not finite"):
        check_kv(key, replace(make_kv(key), sensitivity=(1.0, float("nan"), 0.0, 0.0, 0.0)))
    with pytest.raises(ValueError, match="5 tokens but 2 sensitivities"):
        replace(make_kv(key), sensitivity=(1.0, 2.0))
    with pytest.raises(ValueError, match="without tokens"):
        empty = torch.zeros(HEADS, 0, DIM)
        check_kv(ChunkKey(MODEL, ()), ChunkKV((), (empty,), (empty,)))
