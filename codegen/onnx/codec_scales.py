"""Scales of codecs: float16, inside a range, used as they are stored."""

from __future__ import annotations

import onnx_ir as ir

from kvxform.codecs.integer import LARGEST_FLOAT16, SMALLEST_SCALE
from kvxform.codegen.onnx.builder import Builder
from kvxform.codegen.onnx.codec_base import FLOAT, FLOAT16


def clip(b: Builder, x: ir.Value, low: float, high: float) -> ir.Value:
    """Emit float32 `x` held between two numbers."""
    return b.op("Clip", x, b.const(low, FLOAT), b.const(high, FLOAT))


def stored_scale(b: Builder, step: ir.Value) -> ir.Value:
    """Emit a step as a positive float16."""
    return b.cast(clip(b, step, SMALLEST_SCALE, LARGEST_FLOAT16), FLOAT16)
