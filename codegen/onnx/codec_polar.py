"""Codec `polar` as nodes; the code of an angle follows from signs and a tangent.

An angle of the first quadrant lies above a bound where the quotient of its two lengths is larger
than the tangent of the bound; other quadrants of level 1 are turned into the first. So no inverse
function is needed, which not every execution provider has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir
import torch

from kvxform.codecs.lloyd_tables import bounds_of
from kvxform.codecs.polar import LARGEST_LENGTH, LEVELS, PolarCodec
from kvxform.codegen.onnx.builder import BOOL, INT64, Builder
from kvxform.codegen.onnx.codec_base import CHANNELS, FLOAT, FLOAT16, UINT8, emits_codec
from kvxform.codegen.onnx.codec_lookup import count_below, look_up
from kvxform.codegen.onnx.codec_radix import pack_levels, unpack_levels

PAIRS = CHANNELS + 1  # the axis of the two lengths of an angle, `[B, Hk, T, n, 2]`
TINY = torch.finfo(torch.float32).tiny


@emits_codec(PolarCodec)
@dataclass(frozen=True)
class PolarEmitter:
    """Codec `polar`; see `kvxform.codecs.polar`."""

    codec: PolarCodec
    head_dim: int

    def encode(self, b: Builder, x: ir.Value) -> dict[str, ir.Value]:
        """Emit the codes of angles, level after level, and the lengths of blocks."""
        length, packed = b.cast(x, FLOAT), []
        for level, bits in enumerate(self.codec.bits):
            count = self.head_dim >> (level + 1)
            pairs = b.op("Reshape", length, b.const([0, 0, 0, count, 2]))
            first, second = (b.op("Gather", pairs, b.const(i), axis=PAIRS) for i in (0, 1))
            codes = self._codes(b, level, first, second)
            packed.append(pack_levels(b, codes, 2**bits, count))
            squares = (b.op("Mul", part, part) for part in (first, second))
            length = b.op("Sqrt", b.op("Add", *squares))
        stored = b.cast(b.op("Min", length, b.const(LARGEST_LENGTH, FLOAT)), FLOAT16)
        return {"codes": b.op("Concat", *packed, axis=CHANNELS), "norm": stored}

    def decode(self, b: Builder, planes: Mapping[str, ir.Value], dtype: ir.DataType) -> ir.Value:
        """Emit values, top down; everything is computed in float32."""
        widths = b.const(self.codec.widths(self.head_dim))
        parts = b.ops("Split", planes["codes"], widths, dtypes=[UINT8] * LEVELS, axis=CHANNELS)
        length = b.cast(planes["norm"], FLOAT)
        for level in reversed(range(LEVELS)):
            count = self.head_dim >> (level + 1)
            codes = unpack_levels(b, parts[level], 2 ** self.codec.bits[level], count)
            angles = self.codec.table(level)
            shares = [look_up(b, codes, table) for table in (angles.cos(), angles.sin())]
            sides = [b.op("Mul", length, share) for share in shares]
            apart = [b.op("Unsqueeze", side, b.const([PAIRS])) for side in sides]
            joined = b.op("Concat", *apart, axis=PAIRS)
            length = b.op("Reshape", joined, b.const([0, 0, 0, 2 * count]))
        return b.cast(length, dtype)

    def _codes(self, b: Builder, level: int, first: ir.Value, second: ir.Value) -> ir.Value:
        """Return the codes of the angles from `first` to `second`, int64."""
        if level:
            bounds = bounds_of(self.codec.table(level))
            return count_below(b, _quotient(b, second, first), bounds.double().tan().float())
        count = 2 ** self.codec.bits[0]
        zero = b.const(0.0, FLOAT)
        is_below = b.op("Less", second, zero, dtype=BOOL)
        is_left = b.op("Less", first, zero, dtype=BOOL)
        is_right = b.op("Greater", first, zero, dtype=BOOL)
        is_second = b.op("And", b.op("Not", is_below), is_left)
        is_turned = b.op("Or", is_second, b.op("And", is_below, is_right))  # quadrants 2 and 4
        codes = b.op("Mul", b.cast(is_below, INT64), b.const(count // 2))
        if count == 2:
            return codes
        codes = b.op("Add", codes, b.op("Mul", b.cast(is_turned, INT64), b.const(count // 4)))
        if count == 4:
            return codes
        x, y = b.op("Abs", first), b.op("Abs", second)
        top = b.op("Where", is_turned, x, y, dtype=FLOAT)
        bottom = b.op("Where", is_turned, y, x, dtype=FLOAT)
        angles = torch.arange(1, count // 4, dtype=torch.float64) * (2 * math.pi / count)
        return b.op("Add", codes, count_below(b, _quotient(b, top, bottom), angles.tan().float()))


def _quotient(b: Builder, top: ir.Value, bottom: ir.Value) -> ir.Value:
    return b.op("Div", top, b.op("Max", bottom, b.const(TINY, FLOAT)))
