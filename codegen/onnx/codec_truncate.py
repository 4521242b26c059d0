"""Codec `truncate` as nodes: the first channels of joined heads, and constants for the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from kvxform.codecs.truncate import TruncateCodec
from kvxform.codegen.onnx.aten_shape import END
from kvxform.codegen.onnx.builder import INT64, Builder
from kvxform.codegen.onnx.codec_base import CHANNELS, HEADS, emits_codec, emitter_of


@emits_codec(TruncateCodec)
@dataclass(frozen=True)
class TruncateEmitter:
    """Codec `truncate`; see `kvxform.codecs.truncate`."""

    codec: TruncateCodec
    head_dim: int

    def encode(self, b: Builder, x: ir.Value) -> dict[str, ir.Value]:
        """Emit the planes of the inner codec."""
        rank, heads = self.codec.rank, self.codec.heads
        parts = []
        for head in range(min(heads, -(-rank // self.head_dim))):  # those that are stored at all
            end = min(self.head_dim, rank - head * self.head_dim)
            bounds = ([head, 0], [END, end], [HEADS, CHANNELS], [heads, 1])
            parts.append(b.op("Slice", x, *map(b.const, bounds)))
        joined = parts[0] if len(parts) == 1 else b.op("Concat", *parts, axis=CHANNELS)
        return emitter_of(self.codec.inner, rank).encode(b, joined)

    def decode(self, b: Builder, planes: Mapping[str, ir.Value], dtype: ir.DataType) -> ir.Value:
        """Emit values, computed as the inner codec does."""
        codec, heads, dim = self.codec, self.codec.heads, self.head_dim
        joined = kept = emitter_of(codec.inner, codec.rank).decode(b, planes, dtype)
        if codec.missing:
            joined = b.op("Pad", kept, b.const([0] * 7 + [codec.missing]))
        if codec.missing and codec.fill:
            joined = b.op("Add", joined, b.cast(b.table(codec.filling()), dtype))
        if heads == 1:
            return joined
        parts = b.ops("Split", joined, b.const([dim] * heads), dtypes=[dtype] * heads, axis=3)
        apart = b.op(
            "Concat", *(b.op("Unsqueeze", part, b.const([HEADS + 1])) for part in parts), axis=2
        )
        # [B, Hk / g, g, T, D] -> [B, Hk, T, D], where T may be 0: all sizes are given
        batch, groups, tokens = (
            b.op("Shape", kept, dtype=INT64, start=axis, end=axis + 1) for axis in range(3)
        )
        every = b.op("Mul", groups, b.const([heads]))
        shape = b.op("Concat", batch, every, tokens, b.const([dim]), axis=0)
        return b.op("Reshape", apart, shape, allowzero=1)
