"""Codec `outliers` as nodes: sorting by TopK, filling and putting back by ScatterElements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import onnx_ir as ir

from kvxform.codecs.integer import LARGEST_FLOAT16
from kvxform.codecs.outliers import INDEX, VALUE, OutliersCodec
from kvxform.codegen.onnx.builder import INT64, Builder
from kvxform.codegen.onnx.codec_base import (
    CHANNELS,
    FLOAT,
    FLOAT16,
    UINT8,
    emits_codec,
    emitter_of,
)
from kvxform.codegen.onnx.codec_scales import clip

DOUBLE = ir.DataType.DOUBLE


@runtime_checkable
class RangedEmitter(Protocol):
    """An emitter whose codec may know the usual range of each element."""

    def deviation(self, b: Builder, x: ir.Value) -> ir.Value:
        """Emit how far out each element lies."""


@emits_codec(OutliersCodec)
@dataclass(frozen=True)
class OutliersEmitter:
    """Codec `outliers`; see `kvxform.codecs.outliers`."""

    codec: OutliersCodec
    head_dim: int

    def encode(self, b: Builder, x: ir.Value) -> dict[str, ir.Value]:
        """Emit the planes of the inner codec, values and indices of outliers."""
        x = b.cast(x, FLOAT)
        vectors = self._split(b, x)
        index = self._find(b, x, vectors)
        values = b.op("GatherElements", vectors, index, axis=self._axis)
        values = clip(b, values, -LARGEST_FLOAT16, LARGEST_FLOAT16)
        rest = self._join(b, self._fill(b, vectors, index))
        return {
            **emitter_of(self.codec.inner, self.head_dim).encode(b, rest),
            VALUE: b.cast(self._flatten(b, values), FLOAT16),
            INDEX: b.cast(self._flatten(b, index), UINT8),
        }

    def decode(self, b: Builder, planes: Mapping[str, ir.Value], dtype: ir.DataType) -> ir.Value:
        """Emit values: those of the inner codec, with outliers put back."""
        inner = emitter_of(self.codec.inner, self.head_dim).decode(b, planes, dtype)
        index = self._apart(b, b.cast(planes[INDEX], INT64))
        values = self._apart(b, b.cast(planes[VALUE], dtype))
        vectors = self._split(b, inner)
        return self._join(b, b.op("ScatterElements", vectors, index, values, axis=self._axis))

    @property
    def _is_token(self) -> bool:
        return self.codec.axis == "token"

    @property
    def _axis(self) -> int:
        """The axis of the elements of a vector."""
        return CHANNELS if self._is_token else CHANNELS + 1

    @property
    def _length(self) -> int:
        """Elements of a vector."""
        return self.head_dim if self._is_token else self.codec.run

    def _find(self, b: Builder, x: ir.Value, vectors: ir.Value) -> ir.Value:
        """Return indices of the outliers in their vectors, int64."""
        count = self.codec.count(self._length)
        if self.codec.pick == "extremes":
            _, order = self._sorted(b, vectors, self._length, largest=False)
            sizes = b.const([count // 2, self._length - count, count // 2])
            low, _, high = b.ops("Split", order, sizes, dtypes=[INT64] * 3, axis=self._axis)
            return b.op("Concat", low, high, axis=self._axis)
        inner = emitter_of(self.codec.inner, self.head_dim)
        if self.codec.knows_ranges:
            assert isinstance(inner, RangedEmitter), "codecs with ranges have such emitters"
            distance = self._split(b, inner.deviation(b, x))
        else:
            distance = b.op("Abs", b.op("Sub", vectors, self._median(b, vectors)))
        return self._sorted(b, distance, count, largest=True)[1]

    def _sorted(
        self, b: Builder, x: ir.Value, count: int, *, largest: bool
    ) -> tuple[ir.Value, ...]:
        """Return the first `count` elements in order and their indices; lower indices first."""
        return b.ops(
            "TopK",
            x,
            b.const([count]),
            dtypes=[FLOAT, INT64],
            axis=self._axis,
            largest=int(largest),
            sorted=1,
        )

    def _median(self, b: Builder, vectors: ir.Value) -> ir.Value:
        """Return the lower median of each vector."""
        middle = (self._length - 1) // 2
        low, _ = self._sorted(b, vectors, middle + 1, largest=False)
        return b.op("Gather", low, b.const([middle]), axis=self._axis)

    def _fill(self, b: Builder, vectors: ir.Value, index: ir.Value) -> ir.Value:
        """Return vectors with the mean of the other elements at `index`."""
        wide = b.cast(vectors, DOUBLE)
        shape = b.op("Shape", index, dtype=INT64)
        zeros = b.op("Expand", b.const(0.0, DOUBLE), shape)
        others = b.op("ScatterElements", wide, index, zeros, axis=self._axis)
        total = b.op("ReduceSum", others, b.const([self._axis]), keepdims=1)
        rest = self._length - self.codec.count(self._length)
        mean = b.op("Expand", b.op("Div", total, b.const(float(rest), DOUBLE)), shape)
        return b.cast(b.op("ScatterElements", wide, index, mean, axis=self._axis), FLOAT)

    def _split(self, b: Builder, x: ir.Value) -> ir.Value:
        """Return vectors: `[B, Hk, T, D]`, or `[B, Hk, T / run, D, run]`."""
        if self._is_token:
            return x
        runs = b.op("Reshape", x, b.const([0, 0, -1, self.codec.run, self.head_dim]))
        return b.op("Transpose", runs, perm=[0, 1, 2, 4, 3])

    def _join(self, b: Builder, vectors: ir.Value) -> ir.Value:
        if self._is_token:
            return vectors
        tokens = b.op("Transpose", vectors, perm=[0, 1, 2, 4, 3])
        return b.op("Reshape", tokens, b.const([0, 0, -1, self.head_dim]))

    def _flatten(self, b: Builder, found: ir.Value) -> ir.Value:
        """Return rows of a plane of what was found in each vector."""
        if self._is_token:
            return found
        width = self.head_dim * self.codec.count(self._length)
        return b.op("Reshape", found, b.const([0, 0, 0, width]))

    def _apart(self, b: Builder, plane: ir.Value) -> ir.Value:
        """Return a plane as `_flatten` found it."""
        if self._is_token:
            return plane
        count = self.codec.count(self._length)
        return b.op("Reshape", plane, b.const([0, 0, 0, self.head_dim, count]))
