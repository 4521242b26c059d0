"""Codec `static-int` as nodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from kvxform.codecs.static_int import StaticIntCodec
from kvxform.codegen.onnx.builder import Builder
from kvxform.codegen.onnx.codec_base import CHANNELS, FLOAT, UINT8, emits_codec
from kvxform.codegen.onnx.codec_bytes import unpack_parts
from kvxform.codegen.onnx.codec_scales import clip

INT8 = ir.DataType.INT8


@emits_codec(StaticIntCodec)
@dataclass(frozen=True)
class StaticIntEmitter:
    """Codec `static-int`; see `kvxform.codecs.static_int`."""

    codec: StaticIntCodec
    head_dim: int

    def encode(self, b: Builder, x: ir.Value) -> dict[str, ir.Value]:
        """Emit codes."""
        half = float(self.codec.half)
        values = b.cast(x, FLOAT)
        if self.codec.center:
            values = b.op("Sub", values, self._offsets(b))
        scaled = b.op("Round", b.op("Div", values, self._scales(b)))
        codes = clip(b, scaled, -half, half - 1)
        return {"codes": b.cast(codes, INT8) if self.codec.bits == 8 else self._pack(b, codes)}

    def decode(self, b: Builder, planes: Mapping[str, ir.Value], dtype: ir.DataType) -> ir.Value:
        """Emit values; everything is computed in float32."""
        packed = planes["codes"]
        codes = b.cast(packed, FLOAT) if self.codec.bits == 8 else self._unpack(b, packed)
        values = b.op("Mul", codes, self._scales(b))
        if self.codec.center:
            values = b.op("Add", values, self._offsets(b))
        return b.cast(values, dtype)

    def _scales(self, b: Builder) -> ir.Value:
        return b.table(self.codec.scales(self.head_dim), "scale")

    def _offsets(self, b: Builder) -> ir.Value:
        return b.table(self.codec.offsets(self.head_dim), "mean")

    def _pack(self, b: Builder, codes: ir.Value) -> ir.Value:
        """Return two codes a byte, neighbours, the first one in the low half."""
        nibbles = b.op("Add", codes, b.const(float(self.codec.half), FLOAT))
        low, high = (
            b.op("Slice", nibbles, *map(b.const, ([first], [self.head_dim], [CHANNELS], [2])))
            for first in (0, 1)
        )
        return b.cast(b.op("Add", low, b.op("Mul", high, b.const(16.0, FLOAT))), UINT8)

    def _unpack(self, b: Builder, packed: ir.Value) -> ir.Value:
        last = b.const([CHANNELS + 1])
        parts = [b.op("Unsqueeze", part, last) for part in unpack_parts(b, packed, 4)]
        pairs = b.op("Concat", *parts, axis=CHANNELS + 1)  # [B, Hk, T, D / 2, 2]
        nibbles = b.op("Reshape", pairs, b.const([0, 0, 0, self.head_dim]))
        return b.op("Sub", nibbles, b.const(float(self.codec.half), FLOAT))
