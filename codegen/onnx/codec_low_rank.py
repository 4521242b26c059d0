"""Codec `low-rank-residual` as nodes: subspace iteration with Gram-Schmidt, in float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from kvxform.codecs.integer import LARGEST_FLOAT16
from kvxform.codecs.low_rank import LOW_RANK_CHANNELS, LOW_RANK_TOKENS, LowRankResidualCodec, start
from kvxform.codegen.onnx.builder import Builder
from kvxform.codegen.onnx.codec_base import FLOAT, FLOAT16, emits_codec, emitter_of

DOUBLE = ir.DataType.DOUBLE
ROWS, COLUMNS = 3, 4  # axes of matrices of blocks, `[B, Hk, T / block, rows, columns]`
SWEEPS = 2  # of Gram-Schmidt: the second removes what rounding left in the first
SMALLEST = 1e-290  # norm of a column that is divided by; such columns are zero


@emits_codec(LowRankResidualCodec)
@dataclass(frozen=True)
class LowRankResidualEmitter:
    """Codec `low-rank-residual`; see `kvxform.codecs.low_rank`.

    Columns of A come out of Gram-Schmidt, so that their signs may be others than those of the
    codec; B then has the same signs, and the product is the same.
    """

    codec: LowRankResidualCodec
    head_dim: int

    def encode(self, b: Builder, x: ir.Value) -> dict[str, ir.Value]:
        """Emit the planes of the inner codec, and the factors of its error."""
        x, codec = b.cast(x, FLOAT), self.codec
        inner = emitter_of(codec.inner, self.head_dim)
        planes = inner.encode(b, x)
        error = b.op("Sub", b.cast(x, DOUBLE), b.cast(inner.decode(b, planes, FLOAT), DOUBLE))
        blocks = b.op("Reshape", error, b.const([0, 0, -1, codec.block, self.head_dim]))
        back = _transposed(b, blocks)
        product = b.op("MatMul", blocks, b.table(start(self.head_dim)[:, : codec.rank]))
        basis = self._orthonormal(b, product)
        for _ in range(codec.loops - 1):
            basis = self._orthonormal(b, b.op("MatMul", blocks, b.op("MatMul", back, basis)))
        channels = b.op("MatMul", back, basis)
        return {
            **planes,
            LOW_RANK_TOKENS: _rows(b, basis, codec.rank, -1),
            LOW_RANK_CHANNELS: _rows(b, channels, codec.rank * self.head_dim, 0),
        }

    def decode(self, b: Builder, planes: Mapping[str, ir.Value], dtype: ir.DataType) -> ir.Value:
        """Emit values; everything is computed in float32."""
        codec, dim = self.codec, self.head_dim
        values = emitter_of(codec.inner, dim).decode(b, planes, FLOAT)
        tokens = b.cast(planes[LOW_RANK_TOKENS], FLOAT)
        tokens = b.op("Reshape", tokens, b.const([0, 0, -1, codec.block, codec.rank]))
        channels = b.cast(planes[LOW_RANK_CHANNELS], FLOAT)
        channels = b.op("Reshape", channels, b.const([0, 0, 0, dim, codec.rank]))
        product = b.op("MatMul", tokens, _transposed(b, channels))
        correction = b.op("Reshape", product, b.const([0, 0, -1, dim]))
        return b.cast(b.op("Add", values, correction), dtype)

    def _orthonormal(self, b: Builder, x: ir.Value) -> ir.Value:
        """Return an orthonormal basis of the columns of `x`; a column of zeros stays."""
        rank = self.codec.rank
        columns = [x]
        if rank > 1:
            columns = list(b.ops("Split", x, b.const([1] * rank), dtypes=[DOUBLE] * rank, axis=4))
        done: list[ir.Value] = []
        for column in columns:
            for _ in range(SWEEPS if done else 0):
                known = done[0] if len(done) == 1 else b.op("Concat", *done, axis=COLUMNS)
                shares = b.op("MatMul", _transposed(b, known), column)
                column = b.op("Sub", column, b.op("MatMul", known, shares))
            norm = b.op("ReduceL2", column, b.const([ROWS]), keepdims=1)
            done.append(b.op("Div", column, b.op("Max", norm, b.const(SMALLEST, DOUBLE))))
        return done[0] if rank == 1 else b.op("Concat", *done, axis=COLUMNS)


def _transposed(b: Builder, x: ir.Value) -> ir.Value:
    return b.op("Transpose", x, perm=[0, 1, 2, 4, 3])


def _rows(b: Builder, x: ir.Value, width: int, rows: int) -> ir.Value:
    """Return a factor as rows of a float16 plane."""
    bounds = (b.const(bound, DOUBLE) for bound in (-LARGEST_FLOAT16, LARGEST_FLOAT16))
    held = b.cast(b.op("Clip", x, *bounds), FLOAT16)
    return b.op("Reshape", held, b.const([0, 0, rows, width]))
