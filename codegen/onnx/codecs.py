"""Codecs as ONNX nodes: the arithmetic of `kvxform.codecs`, value for value.

Only operations that run on every execution provider are used: bytes are taken apart with Cast,
Floor, Mul and Sub in float32, where they are exact; shifts and masks have no CUDA kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import onnx_ir as ir

from kvxform.codecs.base import Codec, make_codec
from kvxform.codecs.exact import ExactCodec
from kvxform.codecs.integer import (
    LARGEST_FLOAT16,
    LARGEST_ZERO,
    SMALLEST_SCALE,
    IntCodec,
)
from kvxform.codegen.onnx.builder import Builder, onnx_dtype
from kvxform.ir.plan import StreamPlan

FLOAT = ir.DataType.FLOAT
FLOAT16 = ir.DataType.FLOAT16
UINT8 = ir.DataType.UINT8


class CodecEmitter(Protocol):
    """Encode and decode of one stream as nodes."""

    def encode(self, b: Builder, x: ir.Value) -> dict[str, ir.Value]:
        """Emit planes of `x` `[B, Hk, T, D]`, T a multiple of the group, which may be zero."""

    def decode(self, b: Builder, planes: Mapping[str, ir.Value], dtype: ir.DataType) -> ir.Value:
        """Emit values of `dtype`, `[B, Hk, T, D]`."""


@dataclass(frozen=True)
class ExactEmitter:
    """Codec `none`: a conversion."""

    plan: StreamPlan

    def encode(self, b: Builder, x: ir.Value) -> dict[str, ir.Value]:
        """Emit the conversion to the stored dtype."""
        return {"value": b.cast(x, onnx_dtype(self.plan.planes[0].torch_dtype))}

    def decode(self, b: Builder, planes: Mapping[str, ir.Value], dtype: ir.DataType) -> ir.Value:
        """Emit the conversion back."""
        return b.cast(planes["value"], dtype)


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
            zero = _clip(b, smallest, -LARGEST_FLOAT16, LARGEST_FLOAT16)
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
        return scale, _clip(b, b.op("Round", ratio), -LARGEST_ZERO, LARGEST_ZERO)

    def _extreme(self, b: Builder, groups: ir.Value, op_type: str) -> ir.Value:
        found = b.op(op_type, groups, b.const([self._reduced]), keepdims=1)
        clip = self.codec.clip
        return found if clip == 1 else b.op("Mul", found, b.const(clip, FLOAT))

    def _quantise(self, b: Builder, groups: ir.Value, scale: ir.Value, zero: ir.Value) -> ir.Value:
        if self._adds_zero:
            codes = b.op("Round", b.op("Div", b.op("Sub", groups, zero), scale))
        else:
            codes = b.op("Add", b.op("Round", b.op("Div", groups, scale)), zero)
        return _clip(b, codes, float(self.codec.symmetric), float(2**self.codec.bits - 1))


def pack(b: Builder, codes: ir.Value, bits: int, width: int) -> ir.Value:
    """Emit uint8 `[..., width * bits / 8]` of float32 codes `[..., width]`."""
    if bits == 3:
        high = b.op("Floor", b.op("Mul", codes, b.const(0.25, FLOAT)))
        low = b.op("Sub", codes, b.op("Mul", high, b.const(4.0, FLOAT)))
        return b.op("Concat", pack(b, low, 2, width), pack(b, high, 1, width), axis=-1)
    parts = _halves(b, codes, 8 // bits, width)
    packed = parts[0]
    for i, part in enumerate(parts[1:], start=1):
        packed = b.op("Add", packed, b.op("Mul", part, b.const(float(2 ** (bits * i)), FLOAT)))
    return b.cast(packed, UINT8)


def unpack(b: Builder, packed: ir.Value, bits: int, width: int) -> ir.Value:
    """Emit float32 codes `[..., width]` of uint8 `[..., width * bits / 8]`."""
    if bits == 3:
        sizes = b.const([width // 4, width // 8])
        low, high = b.ops("Split", packed, sizes, dtypes=[UINT8, UINT8], axis=-1)
        fours = b.op("Mul", unpack(b, high, 1, width), b.const(4.0, FLOAT))
        return b.op("Add", unpack(b, low, 2, width), fours)
    parts = unpack_parts(b, packed, bits)
    return parts[0] if len(parts) == 1 else b.op("Concat", *parts, axis=-1)


def unpack_parts(b: Builder, packed: ir.Value, bits: int) -> list[ir.Value]:
    """Emit the codes of a byte plane as float32, one tensor per code of a byte, lowest first."""
    rest = b.cast(packed, FLOAT)
    parts = []
    for i in reversed(range(1, 8 // bits)):
        unit = 2.0 ** (bits * i)
        part = b.op("Floor", b.op("Mul", rest, b.const(1 / unit, FLOAT)))
        rest = b.op("Sub", rest, b.op("Mul", part, b.const(unit, FLOAT)))
        parts.append(part)
    return [rest, *reversed(parts)]


def codec_emitter(plan: StreamPlan) -> CodecEmitter:
    """Return the emitter of the codec of a stream; `capability` has checked that there is one."""
    codec = make_codec(plan.codec)
    return CODEC_EMITTERS[type(codec)](codec, plan)


CODEC_EMITTERS: dict[type[Codec], Callable[[Codec, StreamPlan], CodecEmitter]] = {
    ExactCodec: lambda _, plan: ExactEmitter(plan),
    IntCodec: lambda codec, plan: IntEmitter(codec, plan.head_dim),  # type: ignore[arg-type]
}


def _halves(b: Builder, x: ir.Value, count: int, width: int) -> tuple[ir.Value, ...]:
    if count == 1:
        return (x,)
    sizes = b.const([width // count] * count)
    return b.ops("Split", x, sizes, dtypes=[x.dtype] * count, axis=-1)


def _clip(b: Builder, x: ir.Value, low: float, high: float) -> ir.Value:
    return b.op("Clip", x, b.const(low, FLOAT), b.const(high, FLOAT))


def _to_scale(b: Builder, step: ir.Value) -> ir.Value:
    return b.cast(_clip(b, step, SMALLEST_SCALE, LARGEST_FLOAT16), FLOAT16)
