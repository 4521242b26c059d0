"""How GroupQueryAttention and PagedAttention of ONNX Runtime keep a stream, from its codec."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from kvxform.codecs.base import make_codec
from kvxform.codecs.exact import ExactCodec
from kvxform.codecs.fp8 import Fp8Codec
from kvxform.codecs.static_int import StaticIntCodec
from kvxform.codegen.onnx.builder import onnx_dtype
from kvxform.ir.stream_plan import StreamPlan

FP8 = ir.DataType.FLOAT8E4M3FN


@dataclass(frozen=True)
class BlockFormat:
    """The tensor that holds a stream, and what the operators are told of it.

    Attributes:
        dtype: Of the tensor.
        width: Its last axis.
        element: Type of one value in the words of ONNX; empty for that of the model.
        granularity: `NONE`, `PER_TENSOR` or `PER_CHANNEL`: what has one scale.
        codec: Has the scales, if there are some.
    """

    dtype: ir.DataType
    width: int
    element: str
    granularity: str
    codec: Any

    @property
    def scale(self) -> Tensor | None:
        """Scales, float32 `[1]` or `[Hk, 1, D]`; None for an unquantised stream."""
        if isinstance(self.codec, StaticIntCodec):
            is_packed = self.codec.bits == 4
            return self.codec.scales(self.width * 2 if is_packed else self.width)
        return torch.ones(1) if self.dtype == FP8 else None


def block_format(plan: StreamPlan, dtype: torch.dtype) -> BlockFormat | None:
    """Return how a stream of a model of `dtype` is kept, or None if it cannot be.

    Regions, and what is done to vectors when they are read, are not looked at.
    """
    codec, plane = make_codec(plan.codec), plan.planes[0]
    if isinstance(codec, ExactCodec):
        same = plane.torch_dtype == dtype
        return BlockFormat(onnx_dtype(dtype), plane.width, "", "NONE", codec) if same else None
    if isinstance(codec, StaticIntCodec):
        granularity = "PER_TENSOR" if codec.axis == "tensor" else "PER_CHANNEL"
        stored = onnx_dtype(plane.torch_dtype)
        return BlockFormat(stored, plane.width, f"int{codec.bits}", granularity, codec)
    if isinstance(codec, Fp8Codec) and codec.format == "e4m3" and not codec.scaled:
        return BlockFormat(FP8, plane.width, "float8e4m3fn", "PER_TENSOR", codec)
    return None
