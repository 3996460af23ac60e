"""GPU kernels, by value: in Triton's interpreter (make test-triton), and on CUDA (-m gpu)."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from ragcache.engine.hf.attention_hook import PartialForward
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.engine.hf.rope import Rope
from ragcache.engine.kernels import choose as kernels
from ragcache.engine.kernels.choose import (
    AttentionShape,
    Kernels,
    _measure_kernels,
    choose,
    place_by_torch,
    relative_error,
)
from ragcache.engine.kernels.row_attention import BLOCKS, RowAttention, TritonRowAttention
from ragcache.errors import ConfigError, ModelError
from ragcache.testing.engine import IDS, FewFromLayer2
from tests import models
from tests.engine.hf.test_architectures import plain_logits

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None
ROPE = Rope(apply_rotary_pos_emb, halves=True)
CPU = torch.device("cpu")
#: Heads, KV heads, head_dim: one KV head each, a share that is no power of two, odd widths.
SHAPES = (4, 4, 16), (14, 2, 64), (6, 2, 24), (8, 1, 80)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where Triton's kernels run: interpreted, or on a GPU."""
    if request.param == "cpu" and not INTERPRETED:
        pytest.skip("Triton is not installed, or does not interpret: make test-triton")
    return torch.device(request.param)


@pytest.mark.parametrize("turned", [1.0, 0.5, 0.25, 0.0], ids="{} of a head turns".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_parts_are_placed_as_torch_places_them(
    device: torch.device, dtype: torch.dtype, turned: float
) -> None:
    from ragcache.engine.kernels.triton_place import place

    for _, heads, dim in SHAPES:
        draw = partial(torch.randn, device=device)
        parts = [
            (draw(heads, n, dim).to(dtype), draw(heads, n, dim).to(dtype)) for n in (5, 40, 1, 33)
        ]
        parts.append((draw(heads, 9, 2 * dim).to(dtype)[..., dim:], draw(heads, 9, dim).to(dtype)))
        width = int(turned * dim) // 2 * 2
        angles = (draw(88, width), draw(88, width)) if width else None
        got, want = torch.zeros(2, 2, heads, 100, dim, device=device, dtype=dtype)
        place(parts, angles, (got[0][:, 7:95], got[1][:, 7:95]))
        place_by_torch(ROPE, parts, angles, (want[0][:, 7:95], want[1][:, 7:95]))
        assert torch.equal(got[1], want[1])
        bits = {torch.float32: 22, torch.float16: 10, torch.bfloat16: 7}[dtype]  # one may differ
        torch.testing.assert_close(got[0], want[0], rtol=2.0**-bits, atol=1e-6)


@pytest.mark.parametrize("blocks", [BLOCKS, (16,), (32,)])
@pytest.mark.parametrize("rows", [[0, 149], [*range(150)], [3, 7, *range(60, 90), 149], [149]])
def test_rows_attend_to_the_keys_up_to_themselves(
    device: torch.device, rows: list[int], blocks: tuple[int, ...]
) -> None:
    from ragcache.engine.kernels.triton_attention import attend

    for heads, kv_heads, dim in SHAPES[:1] if len(rows) > 40 and device == CPU else SHAPES:
        query, key, value, at = drawn(heads, kv_heads, dim, rows, torch.float32, device)
        got = attend(query, key, value, at, 0.3, blocks)
        torch.testing.assert_close(got, right(query, key, value, at, 0.3), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=str
)
def test_rows_attend_in_the_models_dtype(device: torch.device, dtype: torch.dtype) -> None:
    """Not in bfloat16 in the interpreter, which multiplies its bits."""
    from ragcache.engine.kernels.triton_attention import attend

    if dtype == torch.bfloat16 and device == CPU:
        pytest.skip("Triton's interpreter multiplies no bfloat16")
    for heads, kv_heads, dim in SHAPES:
        given = drawn(heads, kv_heads, dim, [0, 5, 63, 64, 140], dtype, device)
        query, key, value, at = given
        want = right(query.float(), key.float(), value.float(), at, 0.3)
        for block in BLOCKS:
            assert relative_error(attend(*given, 0.3, (block,)), want) < kernels.TOLERANCE[dtype]


class Noted(RowAttention):
    """Attends as the reference does, and notes that it was asked."""

    asked = 0

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        Noted.asked += 1
        return right(query, key, value, self.rows, scale)


def test_only_a_mask_that_is_causal_is_taken() -> None:
    query, key, value, rows = drawn(4, 2, 16, [1, 5, 9], torch.float32, CPU, keys=10)
    causal = (torch.arange(10) <= rows[:, None])[None, None]
    window = causal & (torch.arange(10) > rows[:, None] - 4)
    wide = causal & (torch.arange(10) > rows[:, None] - 10)  # a window that hides nothing
    sees_more = causal.clone()
    sees_more[0, 0, 0, 2] = True
    selected = Noted(rows)
    want = right(query, key, value, rows, 0.25)
    for mask in (causal, wide, causal):
        got = selected.sdpa(query, key, value, mask, None)
        assert got is not None
        torch.testing.assert_close(got, want)
    for other in (window, sees_more, causal.float(), causal.expand(1, 4, -1, -1)):
        assert selected.sdpa(query, key, value, other, None) is None
    assert selected.sdpa(query, key, value[..., :8], causal, None) is None


@pytest.mark.parametrize("more", ["softcap", "s_aux", "position_bias", "dropout"])
def test_attention_that_is_more_stays_with_the_model(more: str) -> None:
    model = models.model("llama", attention="sdpa")
    driven = PartialForward(None, model.config, selected=Noted)
    driven.model_attention = lambda module: lambda *args, **kwargs: ("the model's own", None)  # type: ignore
    query, key, value, rows = drawn(4, 2, 16, [1, 5, 9], torch.float32, CPU, keys=10)
    mask = (torch.arange(10) <= rows[:, None])[None, None]
    driven.begin_layer(0, rows, partial=True)
    module = model.model.layers[0].self_attn
    out, _ = driven.attend(module, query, key, value, mask, **{more: 0.5})
    assert out == "the model's own"
    assert isinstance(driven.attend(module, query, key, value, mask, **{more: None})[0], Tensor)


@pytest.mark.parametrize(
    ("architecture", "kernel"),
    [("llama", True), ("qwen2", True), ("phi", True), ("mistral", False), ("cohere2", True)],
)
def test_an_engine_with_other_kernels_gives_the_models_own_logits(
    architecture: str, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window on every layer (mistral), or on some (cohere2), is the model's own business."""
    places: list[int] = []

    def place(*args: Any) -> None:
        places.append(len(args[0]))
        place_by_torch(engine._forward.layers.rope, *args)

    engine = models.engine(architecture, attention="sdpa")
    want, stored = plain_logits(engine, IDS), engine.encode([IDS])[0]
    engine._forward = replace(
        engine._forward, layers=replace(engine._forward.layers, kernels=Kernels(place, Noted))
    )
    monkeypatch.setattr(Noted, "asked", 0)
    for inside in (False, True):
        got = engine.prefill(IDS, FewFromLayer2(stored, inside)).logits
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert places == [1] * 8
    assert bool(Noted.asked) is kernel


@pytest.mark.parametrize("architecture", ["llama", "phi", "smollm3", "mistral"])
def test_an_engine_with_our_kernels_gives_the_models_own_logits(
    device: torch.device, architecture: str
) -> None:
    """Those that turn keys in halves; phi turns a part of them, smollm3 not on all layers."""
    model = models.model(architecture, attention="sdpa").to(device)
    engine = TransformersEngine(model, models.tokenizer(), name=architecture)
    assert engine._forward.layers.rope.halves
    with torch.inference_mode():
        want = model(torch.tensor([IDS], device=device), use_cache=False).logits[0, -1]
    stored = engine.encode([IDS])[0]
    engine._forward = replace(
        engine._forward,
        layers=replace(
            engine._forward.layers, kernels=Kernels(kernels.place_by_triton, TritonRowAttention)
        ),
    )
    for inside in (False, True):
        got = engine.prefill(IDS, FewFromLayer2(stored, inside)).logits
        torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)


TINY_SHAPE = AttentionShape(4, 2, 16, torch.float32, CPU)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A typical prompt of few tokens."""
    monkeypatch.setattr(kernels, "_TOKENS", 16)


def test_a_cpu_chooses_nothing() -> None:
    for wanted in ("auto", "torch"):
        assert choose(wanted, TINY_SHAPE, ROPE) == Kernels(about="torch, on a CPU")
    assert models.engine().kernels == "torch, on a CPU"
    for unknown in ("fast", "flex"):
        with pytest.raises(ConfigError, match=f"{unknown!r} are unknown: use auto, torch, triton"):
            choose(unknown, TINY_SHAPE, ROPE)
    with pytest.raises(ConfigError, match="kernels triton were asked for, but they need CUDA"):
        choose("triton", TINY_SHAPE, ROPE)


def test_the_reference_may_be_forced() -> None:
    shape = replace(TINY_SHAPE, device=torch.device("cuda"))
    assert choose("torch", shape, ROPE) == Kernels()


class Wrong(RowAttention):
    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        return right(query, key, value, self.rows + 1, scale)


class Failing(RowAttention):
    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        raise RuntimeError("no kernel image")


@pytest.mark.parametrize(
    ("kind", "why"), [(Wrong, "is off by"), (Failing, "fails (RuntimeError: no kernel image)")]
)
def test_a_kernel_that_is_wrong_is_not_used(
    small: None,
    kind: type[RowAttention],
    why: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(kernels, "_ATTENTION", {"triton": kind})
    monkeypatch.setattr(kernels, "place_by_triton", lambda *args: None)
    with caplog.at_level(logging.WARNING):
        chosen = _measure_kernels("auto", TINY_SHAPE, ROPE)
    assert chosen.place is None and chosen.attention is None
    assert "attention by torch" in chosen.about and "placing by torch" in chosen.about
    assert why in caplog.text and "placing by triton is off by 1.0e+00" in caplog.text
    with pytest.raises(ModelError, match="kernels triton were asked for, but attention .*use auto"):
        _measure_kernels("triton", TINY_SHAPE, ROPE)


def test_without_triton_there_is_torch(
    small: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for module in ("triton_attention", "triton_place"):
        monkeypatch.setitem(sys.modules, f"ragcache.engine.kernels.{module}", None)
    chosen = _measure_kernels("auto", TINY_SHAPE, ROPE)
    assert chosen.place is None and chosen.attention is None
    assert caplog.text.count("by triton fails (ModuleNotFoundError") == 2


def test_the_fastest_is_used(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_ATTENTION", {"triton": Noted})
    place = partial(place_by_torch, ROPE)
    monkeypatch.setattr(kernels, "place_by_triton", place)
    times = iter([3.0, 2.0, 2.0, 1.0])
    monkeypatch.setattr(kernels, "_seconds", lambda work: next(times))
    chosen = _measure_kernels("auto", TINY_SHAPE, ROPE)
    assert chosen.attention is Noted and chosen.place is place
    assert "attention by triton (torch 3000.00 ms, triton 2000.00 ms)" in chosen.about


def test_keys_that_turn_otherwise_are_placed_by_torch(
    small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_ATTENTION", {"triton": Noted})
    assert _measure_kernels("triton", TINY_SHAPE, Rope(apply_rotary_pos_emb)).place is None


@pytest.mark.gpu
@pytest.mark.parametrize("wanted", ["auto", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_an_engine_on_a_gpu_says_what_it_chose(wanted: str, dtype: torch.dtype) -> None:
    model = models.model().to("cuda", dtype)
    engine = TransformersEngine(model, models.tokenizer(), name="llama", kernels=wanted)
    assert "attention by" in engine.kernels and "triton" in engine.kernels
    if wanted == "triton":
        assert (
            engine._forward.layers.kernels.attention is TritonRowAttention
            and engine._forward.layers.kernels.place
        )


def test_kernels_compile_for_a_gpu() -> None:
    """What the interpreter takes, the compiler may not. It needs no GPU to say so."""
    if not INTERPRETED:
        pytest.skip("Triton is not installed, or does not interpret: make test-triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.kernels.compile_kernels"],
        cwd=Path(__file__).parents[3],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["_place", "_place", "_attend", "_attend"]


def drawn(
    heads: int,
    kv_heads: int,
    dim: int,
    rows: list[int],
    dtype: torch.dtype,
    device: torch.device,
    keys: int = 150,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries as a model lays them out, keys and values as a PlacedKV does, and rows."""
    generator = torch.Generator().manual_seed(1)
    draw: Callable[..., Tensor] = partial(torch.randn, generator=generator)
    query = draw(1, len(rows), heads, dim).to(device, dtype).transpose(1, 2)
    kv = draw(2, 1, kv_heads, keys + 9, dim).to(device, dtype)[..., :keys, :]
    return query, kv[0], kv[1], torch.tensor(rows, device=device)


def right(query: Tensor, key: Tensor, value: Tensor, rows: Tensor, scale: float) -> Tensor:
    """The reference: softmax over the keys up to each row."""
    share = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)
    hidden = torch.arange(key.shape[2], device=rows.device) > rows[:, None]
    scores = (query @ key.transpose(2, 3) * scale).masked_fill(hidden, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2)
