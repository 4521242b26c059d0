"""Codec `lloyd-max` as nodes."""

from __future__ import annotations

import math
from collections.abc import Mapping

import onnx_ir as ir

from kvxform.codecs.lloyd_max import LloydMaxCodec, projection
from kvxform.codecs.lloyd_tables import bounds_of, sphere_table
from kvxform.codegen.onnx.builder import Builder
from kvxform.codegen.onnx.codec_base import CHANNELS, FLOAT, FLOAT16, emits_codec
from kvxform.codegen.onnx.codec_bytes import pack, unpack
from kvxform.codegen.onnx.codec_directions import DirectionEmitter
from kvxform.codegen.onnx.codec_lookup import count_below, look_up
from kvxform.codegen.onnx.codec_radix import pack_levels, unpack_levels


@emits_codec(LloydMaxCodec)
class LloydMaxEmitter(DirectionEmitter):
    """Codec `lloyd-max`; see `kvxform.codecs.lloyd_max`."""

    def encode_directions(self, b: Builder, u: ir.Value) -> dict[str, ir.Value]:
        """Emit the nearest level of every coordinate, and the signs of what is left."""
        levels, dim = self.codec.levels, self.head_dim
        table = sphere_table(levels, dim)
        codes = count_below(b, u, bounds_of(table))
        planes = {"codes": pack_levels(b, codes, levels, dim)}
        if not self.codec.qjl:
            return planes
        rest = b.op("Sub", u, look_up(b, codes, table))
        sketch = b.op("MatMul", rest, b.table(projection(dim).mT, "projection"))
        positive = b.op("GreaterOrEqual", sketch, b.const(0.0, FLOAT), dtype=ir.DataType.BOOL)
        signs = pack(b, b.cast(positive, FLOAT), 1, dim)
        norm = b.op("ReduceL2", rest, b.const([CHANNELS]), keepdims=1)
        return {**planes, "signs": signs, "residual": b.cast(norm, FLOAT16)}

    def decode_directions(self, b: Builder, planes: Mapping[str, ir.Value]) -> ir.Value:
        """Emit a look-up of every coordinate, and the correction by signs."""
        dim = self.head_dim
        codes = unpack_levels(b, planes["codes"], self.codec.levels, dim)
        found = look_up(b, codes, sphere_table(self.codec.levels, dim))
        if not self.codec.qjl:
            return found
        ones = unpack(b, planes["signs"], 1, dim)
        signs = b.op("Sub", b.op("Add", ones, ones), b.const(1.0, FLOAT))
        back = b.op("MatMul", signs, b.table(projection(dim), "projection"))
        unit = b.const(math.sqrt(math.pi / 2) / dim, FLOAT)
        rest = b.op("Mul", b.cast(planes["residual"], FLOAT), unit)
        return b.op("Add", found, b.op("Mul", rest, back))
