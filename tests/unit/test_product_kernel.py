"""Machine code of the kernel that multiplies a few rows by a weight."""

from __future__ import annotations

import pytest
from sass import Build, compile_kernels, count

from kvxform.codegen.triton.emit import emit
from kvxform.codegen.triton.product import CONFIGS, ProductSpec

MAX_SHARED = 227 * 1024  # bytes a CTA may have on sm_90


def build(config: tuple[int, int, int, int], rows: int, *, has_bias: bool = False) -> Build:
    spec = ProductSpec(4096, 4096, "bfloat16", has_bias)
    tile = dict(zip(("BLOCK", "DEPTH", "WARPS", "STAGES"), config, strict=True))
    tensors = ["x", "weight", "out", *(["bias"] if has_bias else [])]
    return Build(
        text=emit(spec).text,
        kernel="product_kernel",
        types=(*((name, "*bf16") for name in tensors), ("num_rows", "i32"), ("x_stride", "i32:16")),
        constants=(("ROWS", rows), *tile.items()),
        num_warps=tile["WARPS"],
    )


def check(*builds: Build) -> None:
    for code in compile_kernels(*builds):
        assert code.spills == 0
        assert code.shared_bytes <= MAX_SHARED
        loop = code.loops[0]
        assert count(loop, "HMMA", "16816") > 0
        assert count(loop, "LDGSTS", "128") > 0
        assert count(loop, "LDG") == 0, "nothing waits for memory in the loop"
        assert count(loop, "PRMT") == 0, "operands come as mma takes them"


def test_the_loop_copies_ahead_and_multiplies() -> None:
    check(build(CONFIGS[0], 8), build(CONFIGS[0], 16, has_bias=True))


@pytest.mark.slow
def test_every_launch_parameter() -> None:
    check(*(build(config, rows) for config in CONFIGS for rows in (8, 16)))
