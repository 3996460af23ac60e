"""The codec kvtc: what it computes, what it refuses, and how little it takes."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ragcache.engine.hf.engine import TransformersEngine
from ragcache.errors import ConfigError, StoreError
from ragcache.planning.context import DEFAULT_CONTEXT, encoding_context
from ragcache.store.base import Miss
from ragcache.store.disk.store import DiskStore
from ragcache.store.format.codecs import CODECS, codec
from ragcache.store.format.codecs import basis as basis_module
from ragcache.store.format.codecs.base import Bytes
from ragcache.store.format.codecs.basis import (
    FOLDER,
    Basis,
    basis_files,
    find_basis,
    register_bases,
)
from ragcache.store.format.codecs.kvtc import KVTC, LEVELS, ROUND_UP, _Recent
from ragcache.store.key import ChunkKey
from ragcache.types import ChunkKV, KVPair

TEXT = (
    "The lighthouse keeper of Brennan Point wrote down the weather every evening. His notes cover "
    "forty years, and people who study storms now read them. He never saw the mainland after his "
    "second winter there, and said that he did not miss it. "
)


@pytest.fixture(scope="module")
def engine(tiny_model_dir: Path) -> TransformersEngine:
    return TransformersEngine.load(str(tiny_model_dir), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def fitted(learned_basis: Path) -> Basis:
    [path] = basis_files(learned_basis)
    return Basis.parse(path.read_bytes())


@pytest.fixture(scope="module")
def kv(engine: TransformersEngine) -> ChunkKV:
    """Of a text that the basis was not fitted to."""
    tokens = tuple(engine.tokenize(TEXT * 2))
    [found] = engine.encode([tokens], context=encoding_context(DEFAULT_CONTEXT, engine).context)
    return found


def pairs(kv: ChunkKV) -> list[KVPair]:
    return list(zip(kv.keys, kv.values, strict=True))


def encoded(coded: KVTC, kv: ChunkKV) -> list[Bytes]:
    return list(coded.encode_layers(pairs(kv)))


def decoded(coded: KVTC, kv: ChunkKV, raws: list[Bytes]) -> list[KVPair]:
    return [
        coded.decode(raws[coded.payload_of(layer)].copy(), kv.spec, len(kv.tokens), layer)
        for layer in range(kv.spec.layers)
    ]


def off(now: list[KVPair], kv: ChunkKV) -> float:
    """The error of all planes, relative to how much each varies over tokens; a mean over planes."""
    found = []
    for pair, before in zip(now, pairs(kv), strict=True):
        for one, other in zip(pair, before, strict=True):
            varies = (other - other.mean(1, keepdim=True)).square().mean()
            found.append(float((one - other).square().mean() / varies))
    return float(np.mean(found) ** 0.5)


def bits(raws: list[Bytes], kv: ChunkKV) -> float:
    return 8 * sum(map(len, raws)) / sum(2 * keys.numel() for keys in kv.keys)


def test_a_level_takes_about_its_share_of_bfloat16(fitted: Basis, kv: ChunkKV) -> None:
    """On text that is unlike that of the basis; and the more it takes, the nearer it is."""
    errors = []
    for level in sorted(LEVELS.values()):
        raws = encoded(KVTC(fitted, level), kv)
        assert 16 / level * 0.6 < bits(raws, kv) < 16 / level * 1.4
        errors.append(off(decoded(KVTC(fitted, level), kv, raws), kv))
    assert errors == sorted(errors) and errors[0] < 0.25


def test_it_is_nearer_than_cachegen_at_half_the_bytes(fitted: Basis, kv: ChunkKV) -> None:
    other = CODECS["cachegen"]
    raws = list(other.encode_layers(pairs(kv)))
    now = [
        other.decode(raw.copy(), kv.spec, len(kv.tokens), layer) for layer, raw in enumerate(raws)
    ]
    own = encoded(KVTC(fitted, 8), kv)
    assert bits(own, kv) < bits(raws, kv)
    assert off(decoded(KVTC(fitted, 8), kv, own), kv) < off(now, kv)


def reference(basis: Basis, level: int, kv: ChunkKV) -> list[KVPair]:
    """What decoding gives, by the definition, in double precision."""
    found: list[KVPair] = []
    for number, group in enumerate(basis.groups):
        layers = basis.layers_of(number)
        planes = torch.stack([plane for layer in layers for plane in pairs(kv)[layer]]).double()
        weights = basis.weights[layers.start : layers.stop].double().reshape(-1, 1, 1, 1)
        rows = (planes * weights).permute(2, 0, 1, 3).flatten(1)
        components = group.components[: len(group.spreads[level])].double()
        numbers = (rows - group.mean) @ components.T
        step = basis.steps[level]
        levels = (numbers.abs() / step + ROUND_UP).floor()
        scales = group.scales[: len(components)].double() / step
        # The mean of exp(-x / scale) over a cell of one step.
        shift = scales - 1 / (torch.exp(1 / scales) - 1)
        sizes = torch.where(levels > 0, levels - ROUND_UP + shift, 0.0) * step
        back = (sizes * numbers.sign()) @ components + group.mean
        shape = len(kv.tokens), 2 * len(layers), basis.kv_heads, basis.head_dim
        restored = back.reshape(shape).permute(1, 2, 0, 3) / weights
        found += [(restored[2 * n], restored[2 * n + 1]) for n in range(len(layers))]
    return found


def test_it_computes_what_is_defined(fitted: Basis, kv: ChunkKV) -> None:
    coded = KVTC(fitted, 12)
    now = decoded(coded, kv, encoded(coded, kv))
    for pair, other in zip(now, reference(fitted, 12, kv), strict=True):
        for one, true in zip(pair, other, strict=True):
            size = float(true.square().mean().sqrt())
            # bfloat16 products, and numbers at the edge of a cell.
            assert float((one - true).square().mean().sqrt()) < 0.02 * size


def test_the_layers_of_a_group_share_the_bytes_of_its_first(fitted: Basis, kv: ChunkKV) -> None:
    coded = KVTC(fitted, 16)
    raws = encoded(coded, kv)
    together = fitted.together
    assert together > 1 and len(raws) == kv.spec.layers
    for layer, raw in enumerate(raws):
        first = layer - layer % together
        assert coded.payload_of(layer) == first and (len(raw) > 0) == (layer == first)


def test_rows_that_the_basis_does_not_describe_are_stored_as_they_are(
    fitted: Basis, kv: ChunkKV
) -> None:
    keys = [one.clone() for one in kv.keys]
    generator = torch.Generator().manual_seed(0)
    keys[1][:, 3] += 40 * torch.randn(keys[1][:, 3].shape, generator=generator)
    keys[1][:, 7] = torch.finfo(torch.float32).max
    strange = replace(kv, keys=tuple(keys))
    coded = KVTC(fitted, 16)
    now = decoded(coded, strange, encoded(coded, strange))
    for layer in range(fitted.together):
        for row in (3, 7):
            assert torch.equal(now[layer][0][:, row], strange.keys[layer][:, row])
            assert torch.equal(now[layer][1][:, row], strange.values[layer][:, row])
    usual = decoded(coded, kv, encoded(coded, kv))
    assert torch.equal(now[1][0][:, 4], usual[1][0][:, 4])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_encoded(fitted: Basis, kv: ChunkKV, bad: float) -> None:
    values = [one.clone() for one in kv.values]
    values[2][0, 1, 5] = bad
    with pytest.raises(ValueError, match="no answer may come from it"):
        encoded(KVTC(fitted, 16), replace(kv, values=tuple(values)))


@pytest.mark.parametrize("tokens", [1, 2, 33])
def test_any_number_of_tokens(fitted: Basis, kv: ChunkKV, tokens: int) -> None:
    short = ChunkKV(
        kv.tokens[:tokens],
        tuple(one[:, :tokens] for one in kv.keys),
        tuple(one[:, :tokens] for one in kv.values),
    )
    coded = KVTC(fitted, 8)
    raws = encoded(coded, short)
    whole = decoded(coded, kv, encoded(coded, kv))
    for now, one in zip(decoded(coded, short, raws), whole, strict=True):
        assert torch.allclose(now[0], one[0][:, :tokens], atol=0.05 * float(one[0].abs().max()))
    assert all(len(raw) <= coded.most_bytes(short.spec, tokens) for raw in raws)


def test_kv_of_another_shape_is_refused(fitted: Basis, kv: ChunkKV) -> None:
    coded = KVTC(fitted, 16)
    raws = encoded(coded, kv)
    with pytest.raises(ValueError, match="another shape"):
        encoded(coded, replace(kv, keys=kv.keys[:-1], values=kv.values[:-1]))
    with pytest.raises(ValueError, match="another shape"):
        coded.decode(raws[0].copy(), replace(kv.spec, head_dim=32), len(kv.tokens), 0)


def test_damaged_bytes_are_refused_or_numbers_of_the_shape(fitted: Basis, kv: ChunkKV) -> None:
    """Their checksum would not match: this is about bytes that somebody made."""
    coded, rng = KVTC(fitted, 16), random.Random(1)
    data, refused = encoded(coded, kv)[0], 0
    for _ in range(600):
        bad = data.copy()
        for _ in range(rng.randrange(1, 4)):
            bad[rng.randrange(min(64, len(bad)) if rng.random() < 0.5 else len(bad))] ^= (
                1 << rng.randrange(8)
            )
        if rng.random() < 0.3:
            bad = bad[: rng.randrange(len(bad) + 1)].copy()
        try:
            now = coded.decode(bad, kv.spec, len(kv.tokens), 0)
        except ValueError:
            refused += 1
            continue
        assert all(one.shape == kv.keys[0].shape and one.isfinite().all() for one in now)
    assert refused > 100


def test_rows_that_do_not_rise_or_are_not_there_are_refused(fitted: Basis, kv: ChunkKV) -> None:
    coded, spec = KVTC(fitted, 16), kv.spec
    width = 2 * fitted.together * spec.kv_heads * spec.head_dim * spec.itemsize
    words = encoded(coded, kv)[0][8:]
    for rows in ([5, 5], [6, 5], [0, len(kv.tokens)]):
        head = np.frombuffer(b"kvt\x01" + len(rows).to_bytes(4, "little"), np.uint8)
        at = np.array(rows, "<u4").view(np.uint8)
        data = np.concatenate([head, at, np.zeros(width * len(rows), np.uint8), words])
        with pytest.raises(ValueError, match="do not rise"):
            coded.decode(data, spec, len(kv.tokens), 0)


def test_the_same_numbers_in_every_thread(fitted: Basis, kv: ChunkKV) -> None:
    coded = KVTC(fitted, 16)
    raws = encoded(coded, kv)
    expected = decoded(coded, kv, raws)
    with ThreadPoolExecutor(4) as threads:
        for now in threads.map(lambda _: decoded(coded, kv, raws), range(12)):
            for one, other in zip(now, expected, strict=True):
                assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_what_is_remembered_is_bounded_and_errors_are_not() -> None:
    recent, made = _Recent(1000), []

    def number(value: int) -> Tensor:
        made.append(value)
        return torch.full((100,), float(value))

    for value in (1, 2, 1, 3, 4, 3):
        assert recent.get(value, lambda value=value: number(value))[0] == value
    assert made == [1, 2, 3, 4] and len(recent._known) <= 2

    def fails() -> Tensor:
        raise ValueError("no")

    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            recent.get("bad", fails)


def test_a_basis_is_what_was_written(fitted: Basis, tmp_path: Path) -> None:
    fitted.write(tmp_path)
    register_bases(tmp_path)
    [path] = (tmp_path / FOLDER).iterdir()
    assert path.read_bytes() == fitted.data and fitted.is_in(tmp_path)
    found = find_basis(fitted.digest)
    assert isinstance(found, Basis) and found.digest == fitted.digest
    assert isinstance(codec(f"kvtc16:{fitted.digest}"), KVTC)


def test_where_a_basis_cannot_be_written_it_says_so(fitted: Basis, tmp_path: Path) -> None:
    (tmp_path / FOLDER).write_text("a file")
    with pytest.raises(StoreError, match="the basis of the codec cannot be written to .*codecs: "):
        fitted.write(tmp_path)


@pytest.mark.parametrize("how", ["gone", "flipped", "short", "other", "empty"])
def test_a_basis_that_cannot_be_used_is_a_miss_with_its_reason(
    fitted: Basis,
    kv: ChunkKV,
    engine: TransformersEngine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    own = replace(fitted, model=f"{how} {tmp_path}")  # none that another test has loaded
    name = f"kvtc16:{own.digest}"
    key = ChunkKey(engine.fingerprint.with_codec(name), kv.tokens)
    with DiskStore(tmp_path / "store") as store:
        with pytest.raises(ConfigError, match="the basis of codec"):
            store.put(key, kv)
        own.write(tmp_path / "store")
        store.put(key, kv)
        assert isinstance(store.get(key), ChunkKV) and store.verify() == {}
    monkeypatch.setattr(basis_module, "_LOADED", {})  # as in another process
    [path] = (tmp_path / "store" / FOLDER).iterdir()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if how == "gone":
        path.unlink()
    else:
        bad = {"flipped": bytes(data), "short": bytes(data[:99]), "other": b"{}"}
        path.write_bytes(bad.get(how, b""))
    with DiskStore(tmp_path / "store") as store:
        miss = store.get(key)
        assert isinstance(miss, Miss) and miss.reason == "foreign"
        assert miss.detail.startswith(f"the basis of codec {name} is missing: ")
        assert ("is damaged: copy it" in miss.detail) == (how != "gone")
        assert store.stats().misses["foreign"] == 1
        assert list(store.verify().values()) == [f"foreign: {miss.detail}"]


def test_what_is_no_basis_is_refused(fitted: Basis) -> None:
    Basis.parse(fitted.data)
    for bad in (b"", b"{}", fitted.data[:-1], fitted.data.replace(b"ragcache basis 1", b"x" * 16)):
        with pytest.raises(ValueError):
            Basis.parse(bad)
    group = fitted.groups[0]
    wrong = {
        "tables": replace(fitted, tables=-fitted.tables),
        "step": replace(fitted, steps={**fitted.steps, 16: 0.0}),
        "weights": replace(fitted, weights=fitted.weights * 0),
        "mean": replace(fitted, groups=[replace(group, mean=group.mean[1:]), *fitted.groups[1:]]),
        "nan": replace(
            fitted, groups=[replace(group, mean=group.mean * torch.nan), *fitted.groups[1:]]
        ),
        "kinds": replace(
            fitted,
            groups=[
                replace(group, spreads={n: s + 200 for n, s in group.spreads.items()}),
                *fitted.groups[1:],
            ],
        ),
    }
    for one in wrong.values():
        with pytest.raises(ValueError):
            Basis.parse(one.data)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown: use one of raw, .*kvtc16"):
        codec("kvtc17")
    with pytest.raises(ConfigError, match="needs a basis, which `ragcache index --codec kvtc16`"):
        codec("kvtc16")
    with pytest.raises(ConfigError, match="no store that is open has it"):
        codec("kvtc16:0123456789abcdef")
