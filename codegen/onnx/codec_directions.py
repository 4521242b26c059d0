"""What emitters of codecs of directions share: norms, and factors of decoded directions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch

from kvxform.codecs.directions import LARGEST_NORM
from kvxform.codegen.onnx.builder import Builder
from kvxform.codegen.onnx.codec_base import CHANNELS, FLOAT, FLOAT16

TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class DirectionEmitter(ABC):
    """A codec of directions; see `kvxform.codecs.directions`.

    Attributes:
        codec: A `DirectionCodec`.
        head_dim: Channels.
    """

    codec: Any
    head_dim: int

    @abstractmethod
    def encode_directions(self, b: Builder, u: ir.Value) -> dict[str, ir.Value]:
        """Emit the code planes of float32 `u` `[B, Hk, T, D]`."""

    @abstractmethod
    def decode_directions(self, b: Builder, planes: Mapping[str, ir.Value]) -> ir.Value:
        """Emit directions, float32 `[B, Hk, T, D]`."""

    def encode(self, b: Builder, x: ir.Value) -> dict[str, ir.Value]:
        """Emit code planes and norm."""
        x = b.cast(x, FLOAT)
        norm = b.op("ReduceL2", x, b.const([CHANNELS]), keepdims=1)
        u = b.op("Div", x, b.op("Max", norm, b.const(TINY, FLOAT)))
        planes = self.encode_directions(b, u)
        if self.codec.gain != "norm":
            norm = b.op("Mul", norm, self._factor(b, u, planes))
        stored = b.cast(b.op("Min", norm, b.const(LARGEST_NORM, FLOAT)), FLOAT16)
        return {**planes, "norm": stored}

    def decode(self, b: Builder, planes: Mapping[str, ir.Value], dtype: ir.DataType) -> ir.Value:
        """Emit values; everything is computed in float32."""
        directions = self.decode_directions(b, planes)
        return b.cast(b.op("Mul", directions, b.cast(planes["norm"], FLOAT)), dtype)

    def _factor(self, b: Builder, u: ir.Value, planes: Mapping[str, ir.Value]) -> ir.Value:
        """Return what the norm is multiplied by, `[B, Hk, T, 1]`."""
        decoded = self.decode_directions(b, planes)
        square = b.op("ReduceSumSquare", decoded, b.const([CHANNELS]), keepdims=1)
        square = b.op("Max", square, b.const(SMALLEST_SQUARE, FLOAT))
        if self.codec.gain == "corrected":
            return b.op("Reciprocal", b.op("Sqrt", square))
        product = b.op("ReduceSum", b.op("Mul", u, decoded), b.const([CHANNELS]), keepdims=1)
        return b.op("Max", b.op("Div", product, square), b.const(0.0, FLOAT))


SMALLEST_SQUARE = 1e-12  # of a decoded direction that is divided by
