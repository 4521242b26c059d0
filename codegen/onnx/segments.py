"""Runs of cached tokens as attention reads them: values, or codes scaled outside of the product.

With x = s (c - z) per token and group of channels:

- scores = sum over groups of s (q . c - z sum(q))
- output = (p s) . c - sum(p s z)

so that no scale and no zero point is applied per cached value. Codes that lie in different parts of
a byte stay apart: each part meets its own channels of the query. These are the identities of
`kvxform.codecs.folded`; only rounding differs from decoding first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import onnx_ir as ir

from kvxform.codecs.integer import IntCodec
from kvxform.codegen.onnx.builder import Builder
from kvxform.codegen.onnx.codec_bytes import unpack_parts

FLOAT = ir.DataType.FLOAT


class Segment(Protocol):
    """A run of cached tokens; rows R are the queries of one KV head."""

    def scores(self, b: Builder, q: ir.Value) -> ir.Value:
        """Emit `q k^T`: q `[B, Hk, R, D]` -> `[B, Hk, R, t]`, in the dtype of q."""

    def mix(self, b: Builder, p: ir.Value) -> ir.Value:
        """Emit `p v`: p `[B, Hk, R, t]` -> `[B, Hk, R, D]`, in the dtype of p."""


@dataclass(frozen=True)
class ExactSegment:
    """Values as they are, `[B, Hk, t, D]`."""

    values: ir.Value

    def scores(self, b: Builder, q: ir.Value) -> ir.Value:
        """Emit one product."""
        return b.op("MatMul", q, b.op("Transpose", self.values, perm=[0, 1, 3, 2]))

    def mix(self, b: Builder, p: ir.Value) -> ir.Value:
        """Emit one product."""
        return b.op("MatMul", p, self.values)


@dataclass(frozen=True)
class FoldedSegment:
    """Codes of the token axis; see the module.

    Attributes:
        codec: How they are encoded; `can_fold` holds.
        head_dim: Channels.
        planes: The stored planes.
    """

    codec: IntCodec
    head_dim: int
    planes: Mapping[str, ir.Value]

    def scores(self, b: Builder, q: ir.Value) -> ir.Value:
        """Emit products with codes; scale and zero point act on columns."""
        assert q.dtype is not None, "graph values have a dtype"
        codes, queries = self._codes(b), self._split(b, b.cast(q, FLOAT))
        found = []
        for group, parts in enumerate(self._groups()):
            rows = [queries[i] for i in parts]
            products = [
                b.op("MatMul", row, b.op("Transpose", codes[i], perm=[0, 1, 3, 2]))
                for row, i in zip(rows, parts, strict=True)
            ]
            dot = _add_all(b, products)
            total = b.op("ReduceSum", _add_all(b, rows), b.const([3]), keepdims=1)
            scale, shift = (
                self._row(b, "scale", group),
                b.op("Mul", total, self._zero_row(b, group)),
            )
            if self._adds_zero:
                found.append(b.op("Add", b.op("Mul", dot, scale), shift))
            else:
                found.append(b.op("Mul", b.op("Sub", dot, shift), scale))
        return b.cast(_add_all(b, found), q.dtype)

    def mix(self, b: Builder, p: ir.Value) -> ir.Value:
        """Emit products with codes; scales act on the weights, zero points on their sum."""
        assert p.dtype is not None, "graph values have a dtype"
        codes, weights, outputs = self._codes(b), b.cast(p, FLOAT), []
        for group, parts in enumerate(self._groups()):
            scaled = b.op("Mul", weights, self._row(b, "scale", group))
            mixed = _join(b, [b.op("MatMul", scaled, codes[i]) for i in parts])
            op_type, shift = self._shift(b, weights, scaled, group)
            outputs.append(b.op(op_type, mixed, shift))
        return b.cast(_join(b, outputs), p.dtype)

    @property
    def _num_parts(self) -> int:
        return 8 // self.codec.bits

    @property
    def _adds_zero(self) -> bool:
        return self.codec.zero == "float" and not self.codec.symmetric

    def _groups(self) -> list[range]:
        """Return the parts of a byte that belong to each group of channels."""
        group = self.codec.group or self.head_dim
        count = group * self._num_parts // self.head_dim
        return [range(i, i + count) for i in range(0, self._num_parts, count)]

    def _codes(self, b: Builder) -> list[ir.Value]:
        return unpack_parts(b, self.planes["codes"], self.codec.bits)

    def _split(self, b: Builder, x: ir.Value) -> tuple[ir.Value, ...]:
        if self._num_parts == 1:
            return (x,)
        sizes = b.const([self.head_dim // self._num_parts] * self._num_parts)
        return b.ops("Split", x, sizes, dtypes=[FLOAT] * self._num_parts, axis=3)

    def _shift(
        self, b: Builder, weights: ir.Value, scaled: ir.Value, group: int
    ) -> tuple[str, ir.Value]:
        """Return what zero points change in every channel, `[B, Hk, R, 1]`: Add or Sub it."""
        if self._adds_zero:
            return "Add", b.op("MatMul", weights, self._column(b, "zero", group))
        if not self.codec.symmetric:
            return "Sub", b.op("MatMul", scaled, self._column(b, "zero", group))
        sums = b.op("MatMul", weights, self._column(b, "scale", group))
        return "Sub", b.op("Mul", sums, b.const(float(2 ** (self.codec.bits - 1)), FLOAT))

    def _zero_row(self, b: Builder, group: int) -> ir.Value:
        if self.codec.symmetric:
            return b.const(float(2 ** (self.codec.bits - 1)), FLOAT)
        return self._row(b, "zero", group)

    def _column(self, b: Builder, plane: str, group: int) -> ir.Value:
        """Return one column of a per-token plane, float32 `[B, Hk, t, 1]`."""
        x = self.planes[plane]
        if len(self._groups()) > 1:
            x = b.op("Gather", x, b.const([group]), axis=3)
        return b.cast(x, FLOAT)

    def _row(self, b: Builder, plane: str, group: int) -> ir.Value:
        """Return the same as a row over tokens, `[B, Hk, 1, t]`."""
        return b.op("Transpose", self._column(b, plane, group), perm=[0, 1, 3, 2])


def can_fold(codec: IntCodec, head_dim: int) -> bool:
    """Whether a part of a byte lies within one group, so that `FoldedSegment` applies."""
    if codec.axis != "token" or codec.bits == 3:
        return False
    group, part = codec.group or head_dim, head_dim * codec.bits // 8
    return group % part == 0


def _add_all(b: Builder, values: list[ir.Value]) -> ir.Value:
    total = values[0]
    for value in values[1:]:
        total = b.op("Add", total, value)
    return total


def _join(b: Builder, values: list[ir.Value]) -> ir.Value:
    return values[0] if len(values) == 1 else b.op("Concat", *values, axis=3)
