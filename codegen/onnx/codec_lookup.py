"""Nearest entries of tables, and entries by their codes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir
import torch
from torch import Tensor

from kvxform.codegen.onnx.builder import INT64, Builder
from kvxform.codegen.onnx.codec_base import CHANNELS, FLOAT


def count_below(b: Builder, x: ir.Value, bounds: Tensor) -> ir.Value:
    """Emit how many of the bounds lie below each value: `torch.bucketize` as a binary search.

    Args:
        b: Where nodes go.
        x: float32 of any shape.
        bounds: Ascending, float32 `[n]`, n > 0.

    Returns:
        int64, shaped as `x`.
    """
    steps = math.ceil(math.log2(len(bounds) + 1))
    padded = torch.full((2**steps - 1,), float("inf"))
    padded[: len(bounds)] = bounds
    found = None
    for step in (2**i for i in reversed(range(steps))):
        if found is None:
            bound = b.const(float(padded[step - 1]), FLOAT)
        else:
            bound = b.op(
                "Gather", b.table(padded[step - 1 :], "bounds"), found, dtype=FLOAT, axis=0
            )
        above = b.op("Cast", b.op("Greater", x, bound, dtype=ir.DataType.BOOL), dtype=INT64, to=7)
        moved = above if step == 1 else b.op("Mul", above, b.const(step))
        found = moved if found is None else b.op("Add", found, moved)
    assert found is not None, "there is a bound"
    return found


def count_below_each(b: Builder, x: ir.Value, bounds: Sequence[Tensor], which: Tensor) -> ir.Value:
    """Emit how many bounds of its own lie below each value.

    Args:
        b: Where nodes go.
        x: float32.
        bounds: Several rows of ascending bounds, each float32 `[n]`, of any number, even 0.
        which: Row of each value, int64; its axes are the last ones of `x`, or broadcast.

    Returns:
        int64, of the shape that `x` and `which` have together.
    """
    steps = max(1, math.ceil(math.log2(max(map(len, bounds)) + 1)))
    padded = torch.full((len(bounds), 2**steps - 1), float("inf"))
    for row, own in zip(padded, bounds, strict=True):
        row[: len(own)] = own
    found = None
    for step in (2**i for i in reversed(range(steps))):
        if found is None:
            bound = b.table(padded[which, step - 1], "bounds")
        else:
            places = b.op("Add", found, b.table(which * (2**steps - 1) + step - 1))
            bound = b.op("Gather", b.table(padded.flatten(), "bounds"), places, dtype=FLOAT, axis=0)
        above = b.op("Cast", b.op("Greater", x, bound, dtype=ir.DataType.BOOL), dtype=INT64, to=7)
        moved = above if step == 1 else b.op("Mul", above, b.const(step))
        found = moved if found is None else b.op("Add", found, moved)
    assert found is not None, "there is a step"
    return found


def look_up_each(b: Builder, codes: ir.Value, tables: Sequence[Tensor], which: Tensor) -> ir.Value:
    """Emit the entry of each code in a table of its own; `which` as in `count_below_each`."""
    starts = torch.tensor([0, *map(len, tables)]).cumsum(0)
    places = b.op("Add", codes, b.table(starts[which]))
    return look_up(b, places, torch.cat(list(tables)))


def nearest_row(b: Builder, x: ir.Value, table: Tensor) -> ir.Value:
    """Emit which row of a table is nearest to each vector: the largest `x . c - |c|^2 / 2`.

    Args:
        b: Where nodes go.
        x: float32 `[B, Hk, T, n, k]`.
        table: float32 `[N, k]`.

    Returns:
        int64 `[B, Hk, T, n]`.
    """
    scores = b.op("MatMul", x, b.table(table.mT, "words"))
    halves = b.table(table.square().sum(-1) / 2, "halves")
    scores = b.op("Sub", scores, halves)
    return b.op("ArgMax", scores, dtype=INT64, axis=CHANNELS + 1, keepdims=0)


def look_up(b: Builder, codes: ir.Value, table: Tensor) -> ir.Value:
    """Emit the entries of a table: int64 codes of any shape -> `[*codes, *entry]`."""
    return b.op("Gather", b.table(table, "words"), codes, axis=0)
