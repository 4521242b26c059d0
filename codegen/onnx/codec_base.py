"""What an emitter of a codec is, and the registry of them.

An emitter is made from the codec and head_dim. Its arithmetic is that of the codec, value for
value: codes differ only where a value lies within float32 rounding of the border of two codes.

Only standard operations are used: bytes are taken apart with Cast, Floor, Mul and Sub in float32,
where they are exact, for shifts and masks have no CUDA kernel.
Every emitter must work on no tokens at all, for an empty cache is a past of length 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import onnx_ir as ir

from kvxform.codecs.base import Codec
from kvxform.codegen.onnx.builder import Builder

FLOAT = ir.DataType.FLOAT
FLOAT16 = ir.DataType.FLOAT16
UINT8 = ir.DataType.UINT8
HEADS, TOKENS, CHANNELS = 1, 2, 3  # axes of vectors and of planes, `[B, Hk, T, D]`


class CodecEmitter(Protocol):
    """Encode and decode of one stream as nodes."""

    def encode(self, b: Builder, x: ir.Value) -> dict[str, ir.Value]:
        """Emit planes of `x` `[B, Hk, T, D]`, T a multiple of the group, which may be zero."""

    def decode(self, b: Builder, planes: Mapping[str, ir.Value], dtype: ir.DataType) -> ir.Value:
        """Emit values of `dtype`, `[B, Hk, T, D]`."""


MakeEmitter = Callable[[Any, int], CodecEmitter]
M = TypeVar("M", bound=MakeEmitter)

CODEC_EMITTERS: dict[type[Codec], MakeEmitter] = {}


def emits_codec(codec: type[Codec]) -> Callable[[M], M]:
    """Enter the decorated class, or function of codec and head_dim, as the emitter of `codec`."""

    def enter(make: M) -> M:
        CODEC_EMITTERS[codec] = make
        return make

    return enter


def emitter_of(codec: Codec, head_dim: int) -> CodecEmitter:
    """Return the emitter of a codec; `capability` has checked that there is one."""
    return CODEC_EMITTERS[type(codec)](codec, head_dim)
