"""Codec `int` as nodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir
import torch

from kvxform.codecs.integer import (
    CLIPS,
    LARGEST_FLOAT16,
    LARGEST_ZERO,
    IntCodec,
)
from kvxform.codegen.onnx.builder import INT64, Builder
from kvxform.codegen.onnx.codec_base import FLOAT, FLOAT16, HEADS, emits_codec
from kvxform.codegen.onnx.codec_bytes import pack, unpack
from kvxform.codegen.onnx.codec_scales import clip, stored_scale

EXTREMES = ("ReduceMin", "ReduceMax")


@emits_codec(IntCodec)
@dataclass(frozen=True)
class IntEmitter:
    """Codec `int`; see `kvxform.codecs.integer` for the equations."""

    codec: IntCodec
    head_dim: int

    def encode(self, b: Builder, x: ir.Value) -> dict[str, ir.Value]:
        """Emit codes, scale and zero point of whole groups."""
        groups = self._split(b, b.cast(x, FLOAT))
        extremes = [b.op(op, groups, b.const(self._axes), keepdims=1) for op in EXTREMES]
        if self.codec.clip == "search":
            scale, zero = self._search(b, groups, extremes)
        else:
            assert not isinstance(self.codec.clip, str), "a clip that is to be fitted has been"
            scale, zero = self._parameters(b, extremes, b.const(self.codec.clip, FLOAT))
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
        zero = None if self.codec.symmetric else self._unsqueeze(b, b.cast(planes["zero"], FLOAT))
        values = self._values(b, codes, scale, zero or self._middle(b))
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

    @property
    def _rank(self) -> int:
        """Axes of values in groups."""
        return 4 if self._is_one_group else 5

    @property
    def _axes(self) -> list[int]:
        """All axes of one group, heads included where they are taken together."""
        return [HEADS, self._reduced] if self.codec.across_heads else [self._reduced]

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

    def _search(
        self, b: Builder, groups: ir.Value, extremes: list[ir.Value]
    ) -> tuple[ir.Value, ir.Value]:
        """Return the parameters of the clip with the least squared error of each group.

        All clips are tried at once, along a new first axis.
        """
        choices = torch.tensor(CLIPS).reshape(-1, *[1] * self._rank)
        scale, zero = self._parameters(b, extremes, b.table(choices))
        wide = b.cast(scale, FLOAT)
        codes = self._quantise(b, groups, wide, zero)
        off = b.op("Sub", self._values(b, codes, wide, zero), groups)
        square = b.cast(b.op("Mul", off, off), ir.DataType.DOUBLE)
        error = b.op("ReduceSum", square, b.const([i + 1 for i in self._axes]), keepdims=1)
        best = b.op("ArgMin", error, dtype=INT64, axis=0, keepdims=1)
        scale = self._choose(b, scale, best)
        return scale, zero if self.codec.symmetric else self._choose(b, zero, best)

    def _choose(self, b: Builder, x: ir.Value, best: ir.Value) -> ir.Value:
        return b.op("Squeeze", b.op("GatherElements", x, best, axis=0), b.const([0]))

    def _parameters(
        self, b: Builder, extremes: list[ir.Value], factor: ir.Value
    ) -> tuple[ir.Value, ir.Value]:
        """Return the float16 scale and the float32 zero point, which float16 holds exactly."""
        codec = self.codec
        smallest, largest = (x if codec.clip == 1 else b.op("Mul", x, factor) for x in extremes)
        if codec.include_zero:
            smallest = b.op("Min", smallest, b.const(0.0, FLOAT))
            largest = b.op("Max", largest, b.const(0.0, FLOAT))
        levels = b.const(float(2**codec.bits - 1), FLOAT)
        step = b.op("Div", b.op("Sub", largest, smallest), levels)
        if self._adds_zero:
            zero = clip(b, smallest, -LARGEST_FLOAT16, LARGEST_FLOAT16)
            return stored_scale(b, step), b.cast(b.cast(zero, FLOAT16), FLOAT)
        lowest = b.op("Neg", smallest)
        magnitude = b.op("Max", lowest, largest)
        if codec.symmetric:
            step = b.op("Div", magnitude, b.const(float(2 ** (codec.bits - 1) - 1), FLOAT))
            return stored_scale(b, step), self._middle(b)
        narrow = b.op("Div", magnitude, b.const(LARGEST_ZERO - 1, FLOAT))
        scale = stored_scale(b, b.op("Max", step, narrow))
        ratio = b.op("Div", lowest, b.cast(scale, FLOAT))
        return scale, clip(b, b.op("Round", ratio), -LARGEST_ZERO, LARGEST_ZERO)

    def _middle(self, b: Builder) -> ir.Value:
        """Return the zero point of symmetric codes."""
        return b.const(float(2 ** (self.codec.bits - 1)), FLOAT)

    def _values(self, b: Builder, codes: ir.Value, scale: ir.Value, zero: ir.Value) -> ir.Value:
        if self._adds_zero:
            return b.op("Add", b.op("Mul", codes, scale), zero)
        return b.op("Mul", b.op("Sub", codes, zero), scale)

    def _quantise(self, b: Builder, groups: ir.Value, scale: ir.Value, zero: ir.Value) -> ir.Value:
        if self._adds_zero:
            codes = b.op("Round", b.op("Div", b.op("Sub", groups, zero), scale))
        else:
            codes = b.op("Add", b.op("Round", b.op("Div", groups, scale)), zero)
        return clip(b, codes, float(self.codec.symmetric), float(2**self.codec.bits - 1))
