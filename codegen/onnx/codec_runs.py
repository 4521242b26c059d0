"""Channels in runs, the last one filled up with zeros."""

from __future__ import annotations

import onnx_ir as ir

from kvxform.codegen.onnx.builder import Builder
from kvxform.codegen.onnx.codec_base import CHANNELS


def cut_runs(b: Builder, x: ir.Value, width: int, length: int) -> ir.Value:
    """Emit runs of channels: `[B, Hk, T, width]` -> `[B, Hk, T, n, length]`."""
    count = -(-width // length)
    missing = count * length - width
    if missing:
        x = b.op("Pad", x, b.const([0, 0, 0, 0, 0, 0, 0, missing]))
    return b.op("Reshape", x, b.const([0, 0, 0, count, length]))


def join_runs(b: Builder, runs: ir.Value, width: int, length: int) -> ir.Value:
    """Emit the first `width` channels of runs: the inverse of `cut_runs`."""
    count = -(-width // length)
    x = b.op("Reshape", runs, b.const([0, 0, 0, count * length]))
    if count * length == width:
        return x
    return b.op("Slice", x, b.const([0]), b.const([width]), b.const([CHANNELS]))
