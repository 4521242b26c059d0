"""Codec `nuq` as nodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from kvxform.codecs.integer import LARGEST_FLOAT16, SMALLEST_SCALE
from kvxform.codecs.lloyd_tables import bounds_of
from kvxform.codecs.nuq import NuqCodec
from kvxform.codegen.onnx.builder import INT64, Builder
from kvxform.codegen.onnx.codec_base import CHANNELS, FLOAT, FLOAT16, HEADS, emits_codec
from kvxform.codegen.onnx.codec_bytes import pack, unpack
from kvxform.codegen.onnx.codec_lookup import count_below, look_up
from kvxform.codegen.onnx.codec_scales import clip

GROUPS = 3  # the axis of a run of tokens in `[B, Hk, T / group, group, D]`


@emits_codec(NuqCodec)
@dataclass(frozen=True)
class NuqEmitter:
    """Codec `nuq`; see `kvxform.codecs.nuq`."""

    codec: NuqCodec
    head_dim: int

    def encode(self, b: Builder, x: ir.Value) -> dict[str, ir.Value]:
        """Emit codes, and ranges where they are stored."""
        groups = self._split(b, b.cast(x, FLOAT))
        if self.codec.has_own_ranges:
            center, width = self._static(b)
            return {"codes": self._codes(b, groups, center, width)}
        center, width = self._ranges(b, groups)
        codes = self._codes(b, groups, b.cast(center, FLOAT), b.cast(width, FLOAT))
        if self.codec.axis == "channel":
            center, width = (b.op("Squeeze", x, b.const([GROUPS])) for x in (center, width))
        return {"codes": codes, "scale": width, "zero": center}

    def decode(self, b: Builder, planes: Mapping[str, ir.Value], dtype: ir.DataType) -> ir.Value:
        """Emit values; everything is computed in float32."""
        codes = b.cast(unpack(b, planes["codes"], self.codec.bits, self.head_dim), INT64)
        levels = self._split(b, look_up(b, codes, self.codec.decoded_levels))
        if self.codec.has_own_ranges:
            center, width = self._static(b)
        else:
            center, width = (b.cast(planes[name], FLOAT) for name in ("zero", "scale"))
            if self.codec.axis == "channel":
                center, width = (b.op("Unsqueeze", x, b.const([GROUPS])) for x in (center, width))
        values = b.op("Add", b.op("Mul", levels, width), center)
        return b.cast(self._join(b, values), dtype)

    def deviation(self, b: Builder, x: ir.Value) -> ir.Value:
        """Emit how far out each element of float32 `x` lies; 1 at static ends."""
        center, width = self._static(b)
        return b.op("Div", b.op("Abs", b.op("Sub", x, center)), width)

    def _codes(self, b: Builder, x: ir.Value, center: ir.Value, width: ir.Value) -> ir.Value:
        scaled = b.op("Div", b.op("Sub", x, center), width)
        codes = count_below(b, scaled, bounds_of(self.codec.compared_levels))
        return pack(b, self._join(b, b.cast(codes, FLOAT)), self.codec.bits, self.head_dim)

    def _ranges(self, b: Builder, groups: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Return centres and half widths in float16, the reduced axes kept as 1."""
        last = GROUPS if self.codec.axis == "channel" else CHANNELS
        axes = b.const([HEADS, last] if self.codec.across_heads else [last])
        low, high = (b.op(op, groups, axes, keepdims=1) for op in ("ReduceMin", "ReduceMax"))
        middle = b.op("Mul", b.op("Add", high, low), b.const(0.5, FLOAT))
        center = b.cast(clip(b, middle, -LARGEST_FLOAT16, LARGEST_FLOAT16), FLOAT16)
        stored = b.cast(center, FLOAT)
        width = b.op("Max", b.op("Sub", high, stored), b.op("Sub", stored, low))
        return center, b.cast(clip(b, width, SMALLEST_SCALE, LARGEST_FLOAT16), FLOAT16)

    def _static(self, b: Builder) -> tuple[ir.Value, ir.Value]:
        """Return static centres and half widths, `[Hk, 1, D]`."""
        center, width = self.codec.static_ranges
        return b.table(center, "center"), b.table(width, "width")

    def _split(self, b: Builder, x: ir.Value) -> ir.Value:
        if self.codec.group is None:
            return x
        return b.op("Reshape", x, b.const([0, 0, -1, self.codec.group, self.head_dim]))

    def _join(self, b: Builder, groups: ir.Value) -> ir.Value:
        if self.codec.group is None:
            return groups
        return b.op("Reshape", groups, b.const([0, 0, -1, self.head_dim]))
