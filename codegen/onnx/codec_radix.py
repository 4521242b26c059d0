"""Codes of any number of levels in bytes, as `kvxform.codecs.radix` lays them out, in int64.

A word of up to 7 bytes is exact in int64 alone, which stock ONNX Runtime adds, multiplies, divides
and sums up. Its digits come from division, for a base need not be a power of two.
"""

from __future__ import annotations

import onnx_ir as ir

from kvxform.codecs.radix import whole_bits, words_of
from kvxform.codegen.onnx.builder import INT64, Builder
from kvxform.codegen.onnx.codec_base import CHANNELS, FLOAT, UINT8
from kvxform.codegen.onnx.codec_bytes import join, pack, unpack

BYTE = 256


def pack_levels(b: Builder, codes: ir.Value, levels: int, count: int) -> ir.Value:
    """Emit the bytes of codes: int64 `[B, Hk, T, count]` -> uint8."""
    bits = whole_bits(count, levels)
    if bits:
        return pack(b, b.cast(codes, FLOAT), bits, count)
    words = words_of(count, levels)
    runs = _cut(b, codes, [digits * number for digits, _, number in words])
    packed = []
    for run, (digits, size, number) in zip(runs, words, strict=True):
        values = _join_digits(b, run, levels, digits, number)
        packed.append(b.cast(_split_digits(b, values, BYTE, size, number), UINT8))
    return join(b, packed)


def unpack_levels(b: Builder, packed: ir.Value, levels: int, count: int) -> ir.Value:
    """Emit the codes of bytes, int64 `[B, Hk, T, count]`."""
    bits = whole_bits(count, levels)
    if bits:
        return b.cast(unpack(b, packed, bits, count), INT64)
    words = words_of(count, levels)
    runs = _cut(b, packed, [size * number for _, size, number in words])
    codes = []
    for run, (digits, size, number) in zip(runs, words, strict=True):
        values = _join_digits(b, b.cast(run, INT64), BYTE, size, number)
        codes.append(_split_digits(b, values, levels, digits, number))
    return join(b, codes)


def _join_digits(b: Builder, x: ir.Value, base: int, digits: int, number: int) -> ir.Value:
    """Return words `[B, Hk, T, number, 1]` of their digits `[B, Hk, T, number * digits]`."""
    apart = b.op("Reshape", x, b.const([0, 0, 0, number, digits]))
    scaled = b.op("Mul", apart, b.const([base**i for i in range(digits)]))
    # ReduceSum of int64 loses low bits in ONNX Runtime 1.31; CumSum does not
    sums = b.op("CumSum", scaled, b.const(CHANNELS + 1))
    return b.op("Gather", sums, b.const([digits - 1]), axis=CHANNELS + 1)


def _split_digits(b: Builder, words: ir.Value, base: int, digits: int, number: int) -> ir.Value:
    """Return the digits of words, `[B, Hk, T, number * digits]`."""
    quotients = b.op("Div", words, b.const([base**i for i in range(digits)]))
    higher = b.op("Div", quotients, b.const(base))
    found = b.op("Sub", quotients, b.op("Mul", higher, b.const(base)))
    return b.op("Reshape", found, b.const([0, 0, 0, number * digits]))


def _cut(b: Builder, x: ir.Value, sizes: list[int]) -> tuple[ir.Value, ...]:
    if len(sizes) == 1:
        return (x,)
    return b.ops("Split", x, b.const(sizes), dtypes=[x.dtype] * len(sizes), axis=-1)
