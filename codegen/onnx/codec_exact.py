"""Codec `none` as nodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from kvxform.codecs.base import dtype_from_name
from kvxform.codecs.exact import ExactCodec
from kvxform.codegen.onnx.builder import Builder, onnx_dtype
from kvxform.codegen.onnx.codec_base import emits_codec


@emits_codec(ExactCodec)
@dataclass(frozen=True)
class ExactEmitter:
    """Codec `none`: a conversion."""

    codec: ExactCodec
    head_dim: int

    def encode(self, b: Builder, x: ir.Value) -> dict[str, ir.Value]:
        """Emit the conversion to the stored dtype."""
        return {"value": b.cast(x, onnx_dtype(dtype_from_name(self.codec.dtype)))}

    def decode(self, b: Builder, planes: Mapping[str, ir.Value], dtype: ir.DataType) -> ir.Value:
        """Emit the conversion back."""
        return b.cast(planes["value"], dtype)
