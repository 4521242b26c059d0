"""Codec `token-norm` as nodes: norms of tokens, in front of the nodes of another codec."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from kvxform.codecs.directions import LARGEST_NORM
from kvxform.codecs.token_norm import SMALLEST_NORM, TokenNormCodec
from kvxform.codegen.onnx.builder import Builder
from kvxform.codegen.onnx.codec_base import CHANNELS, FLOAT, FLOAT16, HEADS, emits_codec, emitter_of
from kvxform.codegen.onnx.codec_scales import clip

REDUCTIONS = {"l2": "ReduceL2", "max": "ReduceMax", "mean": "ReduceMean"}


@emits_codec(TokenNormCodec)
@dataclass(frozen=True)
class TokenNormEmitter:
    """Codec `token-norm`; see `kvxform.codecs.token_norm`."""

    codec: TokenNormCodec
    head_dim: int

    def encode(self, b: Builder, x: ir.Value) -> dict[str, ir.Value]:
        """Emit the norms, and the planes of the inner codec."""
        x = b.cast(x, FLOAT)
        norm = clip(b, self._norms(b, x), SMALLEST_NORM, LARGEST_NORM)
        inner = emitter_of(self.codec.inner, self.head_dim).encode(b, b.op("Div", x, norm))
        return {**inner, "norm": b.cast(norm, FLOAT16)}

    def decode(self, b: Builder, planes: Mapping[str, ir.Value], dtype: ir.DataType) -> ir.Value:
        """Emit values; everything is computed in float32."""
        inner = emitter_of(self.codec.inner, self.head_dim).decode(b, planes, FLOAT)
        return b.cast(b.op("Mul", inner, b.cast(planes["norm"], FLOAT)), dtype)

    def _norms(self, b: Builder, x: ir.Value) -> ir.Value:
        """Return norms `[B, 1 or Hk, T, 1]`."""
        axes = b.const([HEADS, CHANNELS] if self.codec.over == "site" else [CHANNELS])
        magnitude = x if self.codec.norm == "l2" else b.op("Abs", x)
        return b.op(REDUCTIONS[self.codec.norm], magnitude, axes, keepdims=1)
