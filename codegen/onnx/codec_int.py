"""Codec `int` as nodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from kvxform.codecs.integer import (
    LARGEST_FLOAT16,
    LARGEST_ZERO,
    SMALLEST_SCALE,
    IntCodec,
)
from kvxform.codegen.onnx.builder import Builder
from kvxform.codegen.onnx.codec_base import FLOAT, FLOAT16, emits_codec
from kvxform.codegen.onnx.codec_bytes import clip, pack, unpack


@emits_codec(IntCodec)
@dataclass(frozen=True)
class IntEmitter:
    """Codec `int`; see `kvxform.codecs.integer` for the equations."""

    codec: IntCodec
    head_dim: int

    def encode(self, b: Builder, x: ir.Value) -> dict[str, ir.Value]:
        """Emit codes, scale and zero point of whole groups."""
        groups = self._split(b, b.cast(x, FLOAT))
        scale, zero = self._parameters(b, groups)
        codes = self._quantise(b, groups, b.cast(scale, FLOAT), zero)
        packed = pack(b, self._join(b, codes), self.codec.bits, self.head_dim)
        planes = {"codes": packed, "scale": self._squeeze(b, scale)}
        if not self.codec.symmetric:
            planes["zero"] = self._squeeze(b, b.cast(zero, FLOAT16))
        return planes

    def decode(self, b: Builder, planes: Mapping[str, ir.Value], dtype: ir.DataType) -> ir.Value:
        """Emit values; everything is computed in float32."""
        codes = self._split(b, unpack(b, planes["codes"], self.codec.bits, self.head_dim))
        scale = self._unsqueeze(b, b.cast(planes["scale"], FLOAT))
        if self.codec.symmetric:
            zero = b.const(float(2 ** (self.codec.bits - 1)), FLOAT)
        else:
            zero = self._unsqueeze(b, b.cast(planes["zero"], FLOAT))
        if self._adds_zero:
            values = b.op("Add", b.op("Mul", codes, scale), zero)
        else:
            values = b.op("Mul", b.op("Sub", codes, zero), scale)
        return b.cast(self._join(b, values), dtype)

    @property
    def _adds_zero(self) -> bool:
        return self.codec.zero == "float" and not self.codec.symmetric

    @property
    def _is_one_group(self) -> bool:
        """Whether a token of one head is one group, so that no axis has to be split."""
        return self.codec.axis == "token" and self.codec.group in (None, self.head_dim)

    @property
    def _reduced(self) -> int:
        """The axis of one group; never counted from the end.

        ONNX Runtime up to 1.31 does not reduce an empty tensor along an axis given as negative.
        """
        return 4 if self.codec.axis == "token" and not self._is_one_group else 3

    def _split(self, b: Builder, x: ir.Value) -> ir.Value:
        """Return `[B, Hk, T, D / g, g]` or `[B, Hk, T / g, g, D]`; see `_is_one_group`."""
        if self._is_one_group:
            return x
        group = self.codec.group or self.codec.tokens_per_group
        if self.codec.axis == "token":
            return b.op("Reshape", x, b.const([0, 0, 0, self.head_dim // group, group]))
        return b.op("Reshape", x, b.const([0, 0, -1, group, self.head_dim]))

    def _join(self, b: Builder, groups: ir.Value) -> ir.Value:
        if self._is_one_group:
            return groups
        return b.op("Reshape", groups, b.const([0, 0, -1, self.head_dim]))

    def _squeeze(self, b: Builder, x: ir.Value) -> ir.Value:
        return x if self._is_one_group else b.op("Squeeze", x, b.const([self._reduced]))

    def _unsqueeze(self, b: Builder, x: ir.Value) -> ir.Value:
        return x if self._is_one_group else b.op("Unsqueeze", x, b.const([self._reduced]))

    def _parameters(self, b: Builder, groups: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Return the float16 scale and the float32 zero point, which float16 holds exactly."""
        codec = self.codec
        smallest, largest = (self._extreme(b, groups, op) for op in ("ReduceMin", "ReduceMax"))
        if codec.include_zero:
            smallest = b.op("Min", smallest, b.const(0.0, FLOAT))
            largest = b.op("Max", largest, b.const(0.0, FLOAT))
        levels = b.const(float(2**codec.bits - 1), FLOAT)
        step = b.op("Div", b.op("Sub", largest, smallest), levels)
        if self._adds_zero:
            zero = clip(b, smallest, -LARGEST_FLOAT16, LARGEST_FLOAT16)
            return _to_scale(b, step), b.cast(b.cast(zero, FLOAT16), FLOAT)
        lowest = b.op("Neg", smallest)
        magnitude = b.op("Max", lowest, largest)
        if codec.symmetric:
            half = 2 ** (codec.bits - 1)
            step = b.op("Div", magnitude, b.const(float(half - 1), FLOAT))
            return _to_scale(b, step), b.const(float(half), FLOAT)
        narrow = b.op("Div", magnitude, b.const(LARGEST_ZERO - 1, FLOAT))
        scale = _to_scale(b, b.op("Max", step, narrow))
        ratio = b.op("Div", lowest, b.cast(scale, FLOAT))
        return scale, clip(b, b.op("Round", ratio), -LARGEST_ZERO, LARGEST_ZERO)

    def _extreme(self, b: Builder, groups: ir.Value, op_type: str) -> ir.Value:
        found = b.op(op_type, groups, b.const([self._reduced]), keepdims=1)
        clip = self.codec.clip
        return found if clip == 1 else b.op("Mul", found, b.const(clip, FLOAT))

    def _quantise(self, b: Builder, groups: ir.Value, scale: ir.Value, zero: ir.Value) -> ir.Value:
        if self._adds_zero:
            codes = b.op("Round", b.op("Div", b.op("Sub", groups, zero), scale))
        else:
            codes = b.op("Add", b.op("Round", b.op("Div", groups, scale)), zero)
        return clip(b, codes, float(self.codec.symmetric), float(2**self.codec.bits - 1))


def _to_scale(b: Builder, step: ir.Value) -> ir.Value:
    return b.cast(clip(b, step, SMALLEST_SCALE, LARGEST_FLOAT16), FLOAT16)
