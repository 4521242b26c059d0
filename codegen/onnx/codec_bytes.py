"""Codes in bytes, as `kvxform.codecs.packing` lays them out, in float32 arithmetic."""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor

from kvxform.codecs.packing import part_widths
from kvxform.codegen.onnx.builder import Builder
from kvxform.codegen.onnx.codec_base import CHANNELS, FLOAT, UINT8

EIGHT = torch.arange(8)


def pack(b: Builder, codes: ir.Value, bits: int, count: int) -> ir.Value:
    """Emit uint8 `[..., count * bits / 8]` of float32 codes `[..., count]`."""
    rest, packed = codes, []
    for width in part_widths(bits)[:-1]:
        high = b.op("Floor", b.op("Mul", rest, b.const(0.5**width, FLOAT)))
        low = b.op("Sub", rest, b.op("Mul", high, b.const(2.0**width, FLOAT)))
        packed.append(_pack_part(b, low, width, count))
        rest = high
    packed.append(_pack_part(b, rest, part_widths(bits)[-1], count))
    return join(b, packed)


def unpack(b: Builder, packed: ir.Value, bits: int, count: int) -> ir.Value:
    """Emit float32 codes `[..., count]` of uint8 `[..., count * bits / 8]`."""
    widths = part_widths(bits)
    codes, shift = None, 0
    for part, width in zip(_cut(b, packed, bits, count), widths, strict=True):
        found = join(b, unpack_parts(b, part, width))
        if codes is None:
            codes = found
        else:
            codes = b.op("Add", codes, b.op("Mul", found, b.const(2.0**shift, FLOAT)))
        shift += width
    assert codes is not None, "there is a part"
    return codes


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


def bytes_of(b: Builder, bits: ir.Value, count: int) -> ir.Value:
    """Emit runs of eight bits as bytes, the first bit lowest.

    Float32 `[B, H, T, count]` of 0 and 1 -> uint8 `[B, H, T, ceil(count / 8)]`.
    """
    size = -(-count // 8)
    if size * 8 > count:
        bits = b.op("Pad", bits, b.const([0] * 7 + [size * 8 - count]))
    eights = b.op("Reshape", bits, b.const([0, 0, 0, size, 8]))
    scaled = b.op("Mul", eights, b.table(2.0**EIGHT))
    return b.cast(b.op("ReduceSum", scaled, b.const([CHANNELS + 1]), keepdims=0), UINT8)


def bits_of(b: Builder, packed: ir.Value, count: int) -> ir.Value:
    """Emit the bits of `bytes_of`, those that fill up the last byte included."""
    numbers = b.op("Unsqueeze", b.cast(packed, FLOAT), b.const([CHANNELS + 1]))
    size = -(-count // 8)
    return b.op("Reshape", digit_of(b, numbers, EIGHT), b.const([0, 0, 0, size * 8]))


def digit_of(b: Builder, x: ir.Value, digits: Tensor) -> ir.Value:
    """Emit one binary digit of each float32 number, as 0 or 1.

    Args:
        b: Where nodes go.
        x: Whole numbers.
        digits: Which digit, the lowest being 0; broadcast against `x`.
    """
    rest = b.op("Floor", b.op("Mul", x, b.table(0.5**digits)))
    halves = b.op("Floor", b.op("Mul", rest, b.const(0.5, FLOAT)))
    return b.op("Sub", rest, b.op("Add", halves, halves))


def join(b: Builder, parts: list[ir.Value]) -> ir.Value:
    """Emit parts side by side along the last axis."""
    return parts[0] if len(parts) == 1 else b.op("Concat", *parts, axis=-1)


def _pack_part(b: Builder, codes: ir.Value, bits: int, count: int) -> ir.Value:
    parts = _halves(b, codes, 8 // bits, count)
    packed = parts[0]
    for i, part in enumerate(parts[1:], start=1):
        packed = b.op("Add", packed, b.op("Mul", part, b.const(2.0 ** (bits * i), FLOAT)))
    return b.cast(packed, UINT8)


def _cut(b: Builder, packed: ir.Value, bits: int, count: int) -> tuple[ir.Value, ...]:
    sizes = [count * width // 8 for width in part_widths(bits)]
    if len(sizes) == 1:
        return (packed,)
    return b.ops("Split", packed, b.const(sizes), dtypes=[UINT8] * len(sizes), axis=-1)


def _halves(b: Builder, x: ir.Value, count: int, width: int) -> tuple[ir.Value, ...]:
    if count == 1:
        return (x,)
    sizes = b.const([width // count] * count)
    return b.ops("Split", x, sizes, dtypes=[x.dtype] * count, axis=-1)
