"""Compile the Triton kernels for an H100, on a machine without one: a script of test_kernels.py."""

from __future__ import annotations

from typing import Any

from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ragcache.engine.kernels import triton_attention, triton_place

HALF_PRECISION, SINGLE = "*bf16", "*fp32"


def compiled(kernel: Any, pointers: dict[str, str], floats: set[str], **constants: int) -> None:
    names = kernel.arg_names
    signature = {name: pointers.get(name, "fp32" if name in floats else "i32") for name in names}
    signature |= dict.fromkeys(constants, "constexpr")
    given = {(names.index(name),): value for name, value in constants.items()}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    made = compile(
        ASTSource(kernel, signature, given, aligned),
        target=GPUTarget("cuda", 90, 32),
        options={"enable_fp_fusion": True},
    )
    assert made.asm["cubin"]
    print(kernel.__name__)


for kind, half in ((HALF_PRECISION, 64), (SINGLE, 16)):
    tensors = "k_kind", "v_kind", "cos", "sin", "keys", "values"
    pointers = dict.fromkeys(tensors, kind) | {"table": "*i64"}
    compiled(
        triton_place._place, pointers, set(), DIM=128, HALF=half, WIDE=128, TURNS=half, TOKENS=32
    )
for kind, keys in ((HALF_PRECISION, 64), (SINGLE, 32)):
    pointers = dict.fromkeys(("query", "key", "value", "out"), kind) | {"rows": "*i64"}
    sizes = {"SHARE": 7, "DIM": 64, "WIDE": 64, "BLOCK": 32, "KEYS": keys}
    compiled(triton_attention._attend, pointers, {"scale"}, **sizes)
