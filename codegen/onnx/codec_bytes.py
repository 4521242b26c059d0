"""Codes in bytes, as `kvxform.codecs.packing` lays them out, in float32 arithmetic."""

from __future__ import annotations

import onnx_ir as ir

from kvxform.codegen.onnx.builder import Builder
from kvxform.codegen.onnx.codec_base import FLOAT, UINT8


def pack(b: Builder, codes: ir.Value, bits: int, width: int) -> ir.Value:
    """Emit uint8 `[..., width * bits / 8]` of float32 codes `[..., width]`."""
    if bits == 3:
        high = b.op("Floor", b.op("Mul", codes, b.const(0.25, FLOAT)))
        low = b.op("Sub", codes, b.op("Mul", high, b.const(4.0, FLOAT)))
        return b.op("Concat", pack(b, low, 2, width), pack(b, high, 1, width), axis=-1)
    parts = _halves(b, codes, 8 // bits, width)
    packed = parts[0]
    for i, part in enumerate(parts[1:], start=1):
        packed = b.op("Add", packed, b.op("Mul", part, b.const(float(2 ** (bits * i)), FLOAT)))
    return b.cast(packed, UINT8)


def unpack(b: Builder, packed: ir.Value, bits: int, width: int) -> ir.Value:
    """Emit float32 codes `[..., width]` of uint8 `[..., width * bits / 8]`."""
    if bits == 3:
        sizes = b.const([width // 4, width // 8])
        low, high = b.ops("Split", packed, sizes, dtypes=[UINT8, UINT8], axis=-1)
        fours = b.op("Mul", unpack(b, high, 1, width), b.const(4.0, FLOAT))
        return b.op("Add", unpack(b, low, 2, width), fours)
    parts = unpack_parts(b, packed, bits)
    return parts[0] if len(parts) == 1 else b.op("Concat", *parts, axis=-1)


def unpack_parts(b: Builder, packed: ir.Value, bits: int) -> list[ir.Value]:
    """Emit the codes of a byte plane as float32, one tensor per code of a byte, lowest first."""
    rest = b.cast(packed, FLOAT)
    parts = []
    for i in reversed(range(1, 8 // bits)):
        unit = 2.0 ** (bits * i)
        part = b.op("Floor", b.op("Mul", rest, b.const(1 / unit, FLOAT)))
        rest = b.op("Sub", rest, b.op("Mul", part, b.const(unit, FLOAT)))
        parts.append(part)
    return [rest, *reversed(parts)]


def clip(b: Builder, x: ir.Value, low: float, high: float) -> ir.Value:
    """Emit `x` held between two numbers."""
    return b.op("Clip", x, b.const(low, FLOAT), b.const(high, FLOAT))


def _halves(b: Builder, x: ir.Value, count: int, width: int) -> tuple[ir.Value, ...]:
    if count == 1:
        return (x,)
    sizes = b.const([width // count] * count)
    return b.ops("Split", x, sizes, dtypes=[x.dtype] * count, axis=-1)
