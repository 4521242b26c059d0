"""Codec `octahedral` as nodes; the nine neighbours are tried at once, along a last axis."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
import torch

from kvxform.codecs.lloyd_tables import bounds_of
from kvxform.codecs.octahedral import NEIGHBOURS, OctahedralCodec, triplet_count, unit_vectors
from kvxform.codegen.onnx.builder import BOOL, INT64, Builder
from kvxform.codegen.onnx.codec_base import CHANNELS, FLOAT, emits_codec
from kvxform.codegen.onnx.codec_directions import TINY, DirectionEmitter
from kvxform.codegen.onnx.codec_lookup import count_below, look_up
from kvxform.codegen.onnx.codec_radix import pack_levels, unpack_levels
from kvxform.codegen.onnx.codec_runs import cut_runs, join_runs

INSIDE = CHANNELS + 1  # the axis of the numbers of a triplet, `[B, Hk, T, n, 3]`


@emits_codec(OctahedralCodec)
class OctahedralEmitter(DirectionEmitter):
    """Codec `octahedral`; see `kvxform.codecs.octahedral`."""

    def encode_directions(self, b: Builder, u: ir.Value) -> dict[str, ir.Value]:
        """Emit points and lengths of triplets."""
        points, lengths = self.codec.tables(self.head_dim)
        triplets = cut_runs(b, u, self.head_dim, 3)
        codes = [count_below(b, x, bounds_of(points)) for x in _unfold(b, triplets)]
        if self.codec.joint:
            codes, length = self._best_neighbour(b, triplets, codes)
        else:
            length = b.op("ReduceL2", triplets, b.const([INSIDE]), keepdims=0)
        radius = count_below(b, length, bounds_of(lengths))
        joined = b.op("Concat", *codes, axis=CHANNELS)
        count = triplet_count(self.head_dim)
        return {
            "codes": pack_levels(b, joined, len(points), 2 * count),
            "radius": pack_levels(b, radius, len(lengths), count),
        }

    def decode_directions(self, b: Builder, planes: Mapping[str, ir.Value]) -> ir.Value:
        """Emit look-ups of directions and lengths."""
        count = triplet_count(self.head_dim)
        points, lengths = self.codec.tables(self.head_dim)
        codes = unpack_levels(b, planes["codes"], len(points), 2 * count)
        radius = unpack_levels(b, planes["radius"], len(lengths), count)
        sizes = b.const([count, count])
        first, second = b.ops("Split", codes, sizes, dtypes=[INT64] * 2, axis=CHANNELS)
        pair = b.op("Add", b.op("Mul", first, b.const(len(points))), second)
        length = b.op("Unsqueeze", look_up(b, radius, lengths), b.const([INSIDE]))
        triplets = b.op("Mul", look_up(b, pair, unit_vectors(points)), length)
        return join_runs(b, triplets, self.head_dim, 3)

    def _best_neighbour(
        self, b: Builder, triplets: ir.Value, codes: list[ir.Value]
    ) -> tuple[list[ir.Value], ir.Value]:
        """Return codes of the best of nine directions, the first of equals, and its length."""
        points, _ = self.codec.tables(self.head_dim)
        levels = b.const(len(points))
        near = []
        for code, offsets in zip(codes, torch.tensor(NEIGHBOURS).mT, strict=True):
            moved = b.op("Add", b.op("Unsqueeze", code, b.const([INSIDE])), b.table(offsets))
            near.append(b.op("Max", b.op("Min", moved, b.const(len(points) - 1)), b.const(0)))
        pairs = b.op("Add", b.op("Mul", near[0], levels), near[1])  # [B, Hk, T, n, 9]
        apart = b.op("Unsqueeze", triplets, b.const([INSIDE]))
        products = b.op("Mul", apart, look_up(b, pairs, unit_vectors(points)))
        along = b.op("ReduceSum", products, b.const([INSIDE + 1]), keepdims=0)
        best = b.op("ArgMax", along, dtype=INT64, axis=INSIDE, keepdims=1)
        chosen = b.op("GatherElements", pairs, best, axis=INSIDE)
        pair = b.op("Squeeze", chosen, b.const([INSIDE]))
        first = b.op("Div", pair, levels)
        second = b.op("Sub", pair, b.op("Mul", first, levels))
        return [first, second], b.op("ReduceMax", along, b.const([INSIDE]), keepdims=0)


def _unfold(b: Builder, triplets: ir.Value) -> list[ir.Value]:
    """Return the two coordinates of the points of the square, each `[B, Hk, T, n]`."""
    sizes = b.op("ReduceSum", b.op("Abs", triplets), b.const([INSIDE]), keepdims=1)
    p = b.op("Div", triplets, b.op("Max", sizes, b.const(TINY, FLOAT)))
    x, y, z = (b.op("Gather", p, b.const(i), axis=INSIDE) for i in range(3))
    is_above = _is_positive(b, z)
    found = []
    for own, other in ((x, y), (y, x)):
        signs = b.op("Where", _is_positive(b, own), *_ones(b), dtype=FLOAT)
        rest = b.op("Sub", b.const(1.0, FLOAT), b.op("Abs", other))
        found.append(b.op("Where", is_above, own, b.op("Mul", signs, rest), dtype=FLOAT))
    return found


def _is_positive(b: Builder, x: ir.Value) -> ir.Value:
    return b.op("GreaterOrEqual", x, b.const(0.0, FLOAT), dtype=BOOL)


def _ones(b: Builder) -> tuple[ir.Value, ir.Value]:
    return b.const(1.0, FLOAT), b.const(-1.0, FLOAT)
