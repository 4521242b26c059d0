"""Codec `klt-trellis` as nodes: the search is a tree of min-plus products, as in torch.

Costs are `[B, 1, T, n, S, S]`, from state to state over a run of components; a product joins the
runs of two neighbours. The best path is found from the whole row back to single components.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch
from torch import Tensor

from kvxform.codecs.klt_trellis import TrellisKltCodec
from kvxform.codecs.lloyd_tables import bounds_of
from kvxform.codecs.trellis import SUBSETS, Trellis, make_trellis, trellis_levels
from kvxform.codegen.onnx.builder import INT64, Builder
from kvxform.codegen.onnx.codec_base import CHANNELS, FLOAT, emits_codec
from kvxform.codegen.onnx.codec_klt import KltEmitter
from kvxform.codegen.onnx.codec_lookup import (
    count_below_each,
    look_up,
    look_up_each,
)

FROM, TO = CHANNELS + 1, CHANNELS + 2  # axes of states in costs; of subsets, FROM


@emits_codec(TrellisKltCodec)
class TrellisKltEmitter(KltEmitter):
    """Codec `klt-trellis`; see `kvxform.codecs.klt_trellis`."""

    codec: TrellisKltCodec

    def quantise(self, b: Builder, unit: ir.Value) -> ir.Value:
        """Emit the codes of the path of least error, int64 `[B, 1, T, n]`."""
        x = b.op("Unsqueeze", unit, b.const([FROM]))
        levels = [own for table in self._tables for own in _by_subset(table)]
        which = self.size_of[:, None] * SUBSETS + torch.arange(SUBSETS)  # [n, 4]
        nearest = count_below_each(b, x, [bounds_of(own) for own in levels], which)
        off = b.op("Sub", x, look_up_each(b, nearest, levels, which))
        weights = self.codec.error_weights[self.used].float()
        errors = b.op("Mul", b.op("Mul", off, off), b.table(weights[:, None]))
        before, after = _best_path(b, errors, self._trellis, len(self.used))
        states = b.const(len(self._trellis.closed))
        pair = b.op("Add", b.op("Mul", before, states), after)
        subset = look_up(b, pair, self._trellis.between.flatten())
        inside = _pick(b, nearest, subset)
        low = b.op("Sub", after, b.op("Mul", b.op("Div", after, b.const(2)), b.const(2)))
        return b.op("Add", b.op("Mul", inside, b.const(2)), low)

    def dequantise(self, b: Builder, codes: ir.Value) -> ir.Value:
        """Emit components: the subset of a level follows from the low bits of codes before it."""
        memory, count = self._trellis.memory, len(self.used)
        high = b.op("Div", codes, b.const(2))
        low = b.op("Sub", codes, b.op("Mul", high, b.const(2)))
        # Pad has no CUDA kernel for integers.
        padded = b.op("Pad", b.cast(low, FLOAT), b.const([0, 0, 0, memory, 0, 0, 0, 0]))
        path = b.cast(padded, INT64)
        register = low
        for age in range(1, memory + 1):
            bounds = (b.const([memory - age]), b.const([memory - age + count]))
            older = b.op("Slice", path, *bounds, b.const([CHANNELS]))
            register = b.op("Add", register, b.op("Mul", older, b.const(2**age)))
        subset = look_up(b, register, self._trellis.subsets)
        level = b.op("Add", b.op("Mul", high, b.const(SUBSETS)), subset)
        return look_up_each(b, level, self._tables, self.size_of)

    @property
    def _trellis(self) -> Trellis:
        return make_trellis(self.codec.memory)

    @property
    def _tables(self) -> list[Tensor]:
        """Levels of components of each of `sizes`."""
        return [trellis_levels(self.codec.tails, size) for size in self.sizes]


def _by_subset(levels: Tensor) -> list[Tensor]:
    return [levels[subset::SUBSETS] for subset in range(SUBSETS)]


def _best_path(
    b: Builder, errors: ir.Value, trellis: Trellis, count: int
) -> tuple[ir.Value, ir.Value]:
    """Return the states before and after each component of the best path from state 0.

    Args:
        b: Where nodes go.
        errors: Error of each subset, float32 `[B, 1, T, count, 4]`.
        trellis: The states.
        count: Components.

    Returns:
        Two int64 `[B, 1, T, count]`.
    """
    states = len(trellis.closed)
    between = b.table(trellis.between)
    cost = b.op("Add", b.op("Gather", errors, between, axis=FROM), b.table(trellis.closed))
    length = 1 << max(count - 1, 0).bit_length()
    cost, choices = _filled(b, cost, length - count, states), []
    while length > 1:
        length //= 2
        cost, middle = _min_plus(b, cost, length, states)
        choices.append(b.op("Reshape", middle, b.const([0, 0, 0, length, states * states])))
    ends = b.op("Gather", cost, b.const(0), axis=FROM)  # [B, 1, T, 1, S], from state 0
    after = b.op("ArgMin", ends, dtype=INT64, axis=FROM, keepdims=0)
    before = b.op("Mul", after, b.const(0))
    for middle in reversed(choices):
        pair = b.op("Add", b.op("Mul", before, b.const(states)), after)
        found = _pick(b, middle, pair)
        length *= 2
        before = _interleaved(b, (before, found), length)
        after = _interleaved(b, (found, after), length)
    if length == count:
        return before, after
    bounds = b.const([0]), b.const([count]), b.const([CHANNELS])
    return b.op("Slice", before, *bounds), b.op("Slice", after, *bounds)


def _filled(b: Builder, cost: ir.Value, missing: int, states: int) -> ir.Value:
    """Return costs with `missing` components more that stay in their state at no cost."""
    if not missing:
        return cost
    stay = torch.full((states, states), float("inf")).fill_diagonal_(0.0)
    rows = b.op("Shape", cost, dtype=INT64, start=0, end=CHANNELS)
    shape = b.op("Concat", rows, b.const([missing, states, states]), axis=0)
    filler = b.op("Expand", b.table(stay), shape, dtype=FLOAT)
    return b.op("Concat", cost, filler, axis=CHANNELS)


def _min_plus(b: Builder, cost: ir.Value, length: int, states: int) -> tuple[ir.Value, ir.Value]:
    """Return the products of neighbours, and the states between them, the first of equals."""
    pairs = b.op("Reshape", cost, b.const([0, 0, 0, length, 2, states, states]))
    left, right = (b.op("Gather", pairs, b.const(i), axis=FROM) for i in (0, 1))
    through = b.op(  # [B, 1, T, length, from, between, to]
        "Add",
        b.op("Unsqueeze", left, b.const([TO + 1])),
        b.op("Unsqueeze", right, b.const([FROM])),
    )
    best = b.op("ReduceMin", through, b.const([TO]), keepdims=0)
    return best, b.op("ArgMin", through, dtype=INT64, axis=TO, keepdims=0)


def _pick(b: Builder, x: ir.Value, index: ir.Value) -> ir.Value:
    """Return one entry of the last axis of `x` `[B, 1, T, n, k]` for each index `[B, 1, T, n]`."""
    column = b.op("Unsqueeze", index, b.const([FROM]))
    return b.op("Squeeze", b.op("GatherElements", x, column, axis=FROM), b.const([FROM]))


def _interleaved(b: Builder, parts: Sequence[ir.Value], length: int) -> ir.Value:
    apart = [b.op("Unsqueeze", part, b.const([FROM])) for part in parts]
    joined = b.op("Concat", *apart, axis=FROM)
    return b.op("Reshape", joined, b.const([0, 0, 0, length]))
