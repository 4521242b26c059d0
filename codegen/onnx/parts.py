"""Attention from MatMul and Softmax, over streams in several parts or several copies.

It serves scores with a softcap, ALiBi or sink logits, bodies that are read without decoding, and
calls in which an earlier query saw a token before it was encoded: then K and V of that token exist
twice, and each query takes the copy that was live at its time. K and V may differ in that.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from kvxform.codegen.onnx.aten_shape import END
from kvxform.codegen.onnx.emission import Emission, Size
from kvxform.codegen.onnx.masks import (
    attention_mask,
    body_end,
    fresh_mask,
    key_distance,
    total_length,
)
from kvxform.codegen.onnx.streams import StreamView, leaving_length
from kvxform.ir.plan import SitePlan
from kvxform.ir.scoring import Span

COLUMNS = 3  # the axis of keys in scores and weights


@dataclass(frozen=True)
class Scoring:
    """`kvxform.ir.scoring.Scoring` with ONNX values instead of tensors."""

    scale: float
    span: Span
    softcap: float | None = None
    sink_logits: ir.Value | None = None
    alibi_slopes: ir.Value | None = None

    @property
    def is_plain(self) -> bool:
        """Whether ONNX Attention has the same meaning."""
        return self.softcap is None and self.sink_logits is None and self.alibi_slopes is None


@dataclass(frozen=True)
class Heads:
    """Query heads as rows of their KV head: `[B, H, S, n] <-> [B, Hk, H / Hk * S, n]`."""

    num_q_heads: int
    num_kv_heads: int

    def join(self, e: Emission, x: ir.Value, width: ir.Value | int) -> ir.Value:
        """Return `[B, Hk, H / Hk * S, width]`; a width of 0 means that of `x`."""
        count = self.num_q_heads // self.num_kv_heads
        if count == 1:
            return x

        def rows() -> ir.Value:
            return e.builder.op("Mul", e.symbol("S"), e.builder.const(count))

        return self._reshape(e, x, self.num_kv_heads, e.shared(("rows", count), rows), width)

    def split(self, e: Emission, x: ir.Value, width: ir.Value | int) -> ir.Value:
        """Return `[B, H, S, width]`; a width of 0 means that of `x`."""
        if self.num_q_heads == self.num_kv_heads:
            return x
        return self._reshape(e, x, self.num_q_heads, e.symbol("S"), width)

    def _reshape(
        self, e: Emission, x: ir.Value, heads: int, rows: ir.Value, width: ir.Value | int
    ) -> ir.Value:
        last = width if isinstance(width, int) else Size(width)
        return e.builder.op("Reshape", x, e.shape([0, heads, Size(rows), last]))


def attend_by_parts(
    e: Emission,
    site: SitePlan,
    q: ir.Value,
    key: StreamView,
    value: StreamView,
    scoring: Scoring,
) -> ir.Value:
    """Emit attention of q `[B, H, S, D]`; returns `[B, H, S, Dv]`."""
    heads = Heads(site.num_q_heads, site.num_kv_heads)
    assert q.dtype is not None, "graph values have a dtype"
    with e.builder.part("attention"):
        scaled = e.builder.op("Mul", q, e.builder.const(scoring.scale, q.dtype))
        scores = _scores(e, heads, scaled, key)
        weights = _softmax(e, scores, scoring)
        return _mix(e, heads, weights, value)


def _scores(e: Emission, heads: Heads, q: ir.Value, key: StreamView) -> ir.Value:
    """Return `q k^T`, `[B, H, S, T]`, each key in the copy live at its query."""
    b, rows = e.builder, heads.join(e, q, 0)
    found = [segment.scores(b, rows) for segment in key.segments]
    joined = found[0] if len(found) == 1 else b.op("Concat", *found, axis=COLUMNS)
    scores = heads.split(e, joined, total_length(e))
    if key.fresh is None:
        return scores
    fresh = heads.split(e, key.fresh.scores(b, rows), leaving_length(e, key.plan))
    before, settled, after = _cut_fresh(e, key, scores)
    chosen = b.op("Where", fresh_mask(e, key.plan), fresh, settled, dtype=q.dtype)
    return b.op("Concat", before, chosen, after, axis=COLUMNS)


def _mix(e: Emission, heads: Heads, weights: ir.Value, value: StreamView) -> ir.Value:
    """Return `weights v`, `[B, H, S, Dv]`, each value in the copy live at its query."""
    b, parts = e.builder, []
    if value.fresh is not None:
        assert weights.dtype is not None, "graph values have a dtype"
        is_fresh, zero = fresh_mask(e, value.plan), b.const(0.0, weights.dtype)
        before, both, after = _cut_fresh(e, value, weights)
        fresh = b.op("Where", is_fresh, both, zero, dtype=weights.dtype)
        settled = b.op("Where", is_fresh, zero, both, dtype=weights.dtype)
        weights = b.op("Concat", before, settled, after, axis=COLUMNS)
        rows = heads.join(e, fresh, leaving_length(e, value.plan))
        parts.append(value.fresh.mix(b, rows))
    rows = heads.join(e, weights, total_length(e))
    bounds: list[ir.Value | int] = [0, *value.bounds, END]
    for first, last, segment in zip(bounds, bounds[1:], value.segments, strict=False):
        columns = rows if len(value.segments) == 1 else e.slice(rows, first, last, COLUMNS)
        parts.append(segment.mix(b, columns))
    total = parts[0]
    for part in parts[1:]:
        total = b.op("Add", total, part)
    return heads.split(e, total, 0)


def _cut_fresh(e: Emission, view: StreamView, x: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Cut columns into those before the tokens encoded in this call, these, and the rest."""
    first, last = (body_end(e, view.plan, name) for name in ("past", "total"))
    return (
        e.slice(x, 0, first, COLUMNS),
        e.slice(x, first, last, COLUMNS),
        e.slice(x, last, END, COLUMNS),
    )


def _softmax(e: Emission, scores: ir.Value, scoring: Scoring) -> ir.Value:
    """Return weights of visible keys, `[B, H, S, T]`."""
    b, dtype = e.builder, scores.dtype
    assert dtype is not None, "graph values have a dtype"
    if scoring.softcap is not None:
        cap = b.const(scoring.softcap, dtype)
        scores = b.op("Mul", b.op("Tanh", b.op("Div", scores, cap)), cap)
    if scoring.alibi_slopes is not None:
        scores = b.op("Add", scores, _distance_bias(e, scoring.alibi_slopes, dtype))
    mask = attention_mask(e, scoring.span)
    scores = b.op("Where", mask, scores, b.const(float("-inf"), dtype), dtype=dtype)
    if scoring.sink_logits is None:
        return b.op("Softmax", scores, axis=COLUMNS)
    sink = b.op("Unsqueeze", b.cast(scoring.sink_logits, dtype), b.const([0, 2, 3]))
    sizes = [Size(e.dim(scores, axis)) for axis in range(COLUMNS)]
    column = b.op("Expand", sink, e.shape([*sizes, 1]))
    weights = b.op("Softmax", b.op("Concat", scores, column, axis=COLUMNS), axis=COLUMNS)
    return e.slice(weights, 0, -1, COLUMNS)


def _distance_bias(e: Emission, slopes: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Return what ALiBi adds to scores, `-slope * distance`, `[B, H, S, T]`."""
    b, wide = e.builder, slopes.dtype
    assert wide is not None, "weights have a dtype"

    def make() -> ir.Value:
        back = b.op("Neg", b.cast(key_distance(e), wide))
        column = b.op("Unsqueeze", slopes, b.const([1, 2]))  # [H] -> [H, 1, 1]
        return b.cast(b.op("Mul", back, column), dtype)

    return e.shared(("alibi", slopes.name, dtype), make)
