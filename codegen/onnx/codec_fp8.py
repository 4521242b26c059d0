"""Codec `fp8` as nodes: bytes are counted, for no operation shows the bits of a float.

Codes of numbers that are not negative ascend with them, so that the code of |x| is the number of
borders between neighbouring numbers below it. A border rounds to the even code, as in torch. A
negative zero is stored as zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor

from kvxform.codecs.fp8 import FORMATS, Fp8Codec
from kvxform.codegen.onnx.builder import INT64, Builder
from kvxform.codegen.onnx.codec_base import CHANNELS, FLOAT, UINT8, emits_codec
from kvxform.codegen.onnx.codec_lookup import count_below, look_up
from kvxform.codegen.onnx.codec_scales import stored_scale

SIGN = 128  # what a byte of a negative number has more


@emits_codec(Fp8Codec)
@dataclass(frozen=True)
class Fp8Emitter:
    """Codec `fp8`; see `kvxform.codecs.fp8`."""

    codec: Fp8Codec
    head_dim: int

    def encode(self, b: Builder, x: ir.Value) -> dict[str, ir.Value]:
        """Emit bytes, and the scale if there is one."""
        x = b.cast(x, FLOAT)
        if not self.codec.scaled:
            return {"codes": self._bytes(b, x)}
        largest = b.op("ReduceMax", b.op("Abs", x), b.const([CHANNELS]), keepdims=1)
        end = torch.finfo(FORMATS[self.codec.format]).max
        scale = stored_scale(b, b.op("Div", largest, b.const(end, FLOAT)))
        return {"codes": self._bytes(b, b.op("Div", x, b.cast(scale, FLOAT))), "scale": scale}

    def decode(self, b: Builder, planes: Mapping[str, ir.Value], dtype: ir.DataType) -> ir.Value:
        """Emit a look-up of every byte; everything is computed in float32."""
        values = look_up(b, b.cast(planes["codes"], INT64), self._numbers())
        if self.codec.scaled:
            values = b.op("Mul", values, b.cast(planes["scale"], FLOAT))
        return b.cast(values, dtype)

    def _bytes(self, b: Builder, x: ir.Value) -> ir.Value:
        code = count_below(b, b.op("Abs", x), _borders(self._numbers()))
        negative = b.op("Less", x, b.const(0.0, FLOAT), dtype=ir.DataType.BOOL)
        sign = b.op("Mul", b.cast(negative, INT64), b.const(SIGN))
        return b.cast(b.op("Add", code, sign), UINT8)

    def _numbers(self) -> Tensor:
        """Return the number of every byte, float32 `[256]`."""
        every = torch.arange(256, dtype=torch.uint8)
        return every.view(FORMATS[self.codec.format]).float()


def _borders(numbers: Tensor) -> Tensor:
    """Return for each code but the last the largest float32 that is rounded to it."""
    positive = numbers[:SIGN]
    ascending = positive[positive.isfinite()]
    middle = (ascending[1:] + ascending[:-1]) / 2
    below = torch.nextafter(middle, torch.tensor(0.0))
    is_even = torch.arange(len(middle)) % 2 == 0
    return torch.where(is_even, middle, below)
