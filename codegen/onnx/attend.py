"""Emitters of `kvx::cache_append` and `kvx::cached_attention`.

Three forms, chosen from the plan and the options of the node, never by trial:

- `fused`: one Attention that appends by itself; plain streams that one layer reads;
- `standard`: append, then one Attention over all values; every query sees the same copy of a token;
- `primitive`: MatMul and Softmax; scores with softcap or sink logits, and streams in which an earlier
  query of the call saw a token before it was encoded.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from torch import fx

import kvxform.ir.ops as kvx
from kvxform.codegen.onnx.aten_shape import END
from kvxform.codegen.onnx.emission import Emission, Size, dtype_of, emits
from kvxform.codegen.onnx.masks import (
    attention_mask,
    body_length,
    fresh_mask,
    past_length,
    total_length,
)
from kvxform.codegen.onnx.ports import is_plain
from kvxform.codegen.onnx.streams import StreamView, append, leaving_length
from kvxform.ir.plan import SitePlan


@dataclass(frozen=True)
class Scoring:
    """Options of a cached_attention node that shape its scores."""

    scale: float
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    sink_logits: ir.Value | None = None

    @property
    def is_standard(self) -> bool:
        """Whether ONNX Attention has the same meaning."""
        return self.softcap is None and self.sink_logits is None


@dataclass(frozen=True)
class NewTokens:
    """Keys and values of the new tokens of a layer whose Attention appends by itself."""

    k: ir.Value
    v: ir.Value


def appends_itself(e: Emission, node: fx.Node) -> bool:
    """Whether the Attention of the layer of a cache_append node can do the append."""
    assert e.program.plan is not None, "insert-cache has run"
    site = e.program.plan.site(int(node.kwargs["layer"]))  # type: ignore[arg-type]
    readers = [s for s in e.program.plan.sites if s.owner == site.layer]
    dtype = dtype_of(node.args[0])  # type: ignore[arg-type]
    attention = e.program.attention_node(site.layer).kwargs
    plain = all(is_plain(plan, dtype) for plan in site.streams.values())
    special = attention.get("softcap") is not None or attention.get("sink_logits") is not None
    return plain and len(readers) == 1 and not special


@emits(kvx.CACHE_APPEND)
def emit_cache_append(
    e: Emission, node: fx.Node, k: ir.Value, v: ir.Value, cache: object, *, layer: int
) -> None:
    """Emit the append of both streams, or leave it to the Attention of the layer."""
    assert e.program.plan is not None, "insert-cache has run"
    site = e.program.plan.site(layer)
    if appends_itself(e, node):
        e.caches[layer] = NewTokens(k, v)
    else:
        e.caches[layer] = (append(e, site, "key", k), append(e, site, "value", v))


@emits(kvx.CACHED_ATTENTION)
def emit_cached_attention(
    e: Emission,
    node: fx.Node,
    q: ir.Value,
    cache: object,
    positions: ir.Value,
    *,
    layer: int,
    v_head_dim: int,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sink_logits: ir.Value | None = None,
) -> ir.Value:
    """Emit attention of the new queries over the cache of the owner of this layer."""
    assert e.program.plan is not None, "insert-cache has run"
    site = e.program.plan.site(layer)
    scoring = Scoring(scale, causal, window, softcap, sink_logits)
    found = e.caches[site.owner]
    if isinstance(found, NewTokens):
        return _fused(e, site, q, found, scoring)
    key, value = found
    if scoring.is_standard and key.fresh is None and value.fresh is None:
        mask = attention_mask(e, causal=causal, window=window)
        return e.builder.op(
            "Attention", q, key.values, value.values, mask, role="attention", scale=scale
        )
    return _primitive(e, site, q, key, value, scoring)


def _fused(
    e: Emission, site: SitePlan, q: ir.Value, new: NewTokens, scoring: Scoring
) -> ir.Value:
    past_k = e.ports.enter(site, "key")["value"]
    past_v = e.ports.enter(site, "value")["value"]
    mask = attention_mask(e, causal=scoring.causal, window=scoring.window)
    y, k, v = e.builder.ops(
        "Attention",
        q,
        new.k,
        new.v,
        mask,
        past_k,
        past_v,
        dtypes=[q.dtype] * 3,
        role="attention",
        scale=scoring.scale,
    )
    e.ports.leave(site, "key", "value", k)
    e.ports.leave(site, "value", "value", v)
    return y


def _primitive(
    e: Emission,
    site: SitePlan,
    q: ir.Value,
    key: StreamView,
    value: StreamView,
    scoring: Scoring,
) -> ir.Value:
    b, groups = e.builder, _Groups(site.num_q_heads, site.num_kv_heads)
    assert q.dtype is not None, "graph values have a dtype"
    scaled = b.op("Mul", q, b.const(scoring.scale, q.dtype))
    scores = _scores(e, groups, scaled, key.values, total_length(e))
    if key.fresh is not None:
        count = leaving_length(e, key.plan)
        fresh = _scores(e, groups, scaled, key.fresh, count)
        before, settled, after = _cut(e, key, scores)
        chosen = b.op("Where", fresh_mask(e, key.plan), fresh, settled, dtype=q.dtype)
        scores = b.op("Concat", before, chosen, after, axis=3)
    weights = _softmax(e, scores, scoring)
    if value.fresh is None:
        return _mix(e, groups, weights, value.values, total_length(e))
    is_fresh, zero = fresh_mask(e, value.plan), b.const(0.0, q.dtype)
    before, both, after = _cut(e, value, weights)
    settled = b.op("Where", is_fresh, zero, both, dtype=q.dtype)
    fresh = b.op("Where", is_fresh, both, zero, dtype=q.dtype)
    y = _mix(
        e,
        groups,
        b.op("Concat", before, settled, after, axis=3),
        value.values,
        total_length(e),
    )
    y_fresh = _mix(e, groups, fresh, value.fresh, leaving_length(e, value.plan))
    return b.op("Add", y, y_fresh)


@dataclass(frozen=True)
class _Groups:
    """Query heads as rows of their KV head: `[B, H, S, n] <-> [B, Hk, H / Hk * S, n]`."""

    num_q_heads: int
    num_kv_heads: int

    def join(self, e: Emission, x: ir.Value, width: ir.Value | int) -> ir.Value:
        """Return `[B, Hk, H / Hk * S, width]`."""
        count = self.num_q_heads // self.num_kv_heads
        if count == 1:
            return x
        rows = e.shared(
            ("group rows", count), lambda: e.builder.op("Mul", e.symbol("S"), e.builder.const(count))
        )
        return self._reshape(e, x, self.num_kv_heads, rows, width)

    def split(self, e: Emission, x: ir.Value, width: ir.Value | int) -> ir.Value:
        """Return `[B, H, S, width]`."""
        if self.num_q_heads == self.num_kv_heads:
            return x
        return self._reshape(e, x, self.num_q_heads, e.symbol("S"), width)

    def _reshape(
        self, e: Emission, x: ir.Value, heads: int, rows: ir.Value, width: ir.Value | int
    ) -> ir.Value:
        last = width if isinstance(width, int) else Size(width)
        return e.builder.op("Reshape", x, e.shape([0, heads, Size(rows), last]))


def _scores(
    e: Emission, groups: _Groups, q: ir.Value, k: ir.Value, columns: ir.Value
) -> ir.Value:
    """Return `q k^T`, `[B, H, S, columns]`."""
    turned = e.builder.op("Transpose", k, perm=[0, 1, 3, 2])
    product = e.builder.op("MatMul", groups.join(e, q, 0), turned)
    return groups.split(e, product, columns)


def _mix(
    e: Emission, groups: _Groups, weights: ir.Value, v: ir.Value, columns: ir.Value
) -> ir.Value:
    """Return `weights v`, `[B, H, S, Dv]`."""
    product = e.builder.op("MatMul", groups.join(e, weights, columns), v)
    return groups.split(e, product, 0)


def _cut(e: Emission, view: StreamView, x: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Cut columns into those before the tokens encoded in this call, these, and the rest."""
    sink = e.builder.const(view.plan.regions.sink)
    past, total = (
        body_length(e, view.plan, length(e), name)
        for name, length in (("past", past_length), ("total", total_length))
    )
    first, last = e.builder.op("Add", past, sink), e.builder.op("Add", total, sink)
    return (
        e.slice(x, 0, first, axis=3),
        e.slice(x, first, last, axis=3),
        e.slice(x, last, END, axis=3),
    )


def _softmax(e: Emission, scores: ir.Value, scoring: Scoring) -> ir.Value:
    """Return weights of visible keys, `[B, H, S, T]`."""
    b, dtype = e.builder, scores.dtype
    assert dtype is not None, "graph values have a dtype"
    if scoring.softcap is not None:
        cap = b.const(scoring.softcap, dtype)
        scores = b.op("Mul", b.op("Tanh", b.op("Div", scores, cap)), cap)
    mask = attention_mask(e, causal=scoring.causal, window=scoring.window)
    scores = b.op("Where", mask, scores, b.const(float("-inf"), dtype), dtype=dtype)
    if scoring.sink_logits is None:
        return b.op("Softmax", scores, axis=-1)
    sink = b.op("Unsqueeze", b.cast(scoring.sink_logits, dtype), b.const([0, 2, 3]))
    lead = e.shape([Size(e.dim(scores, axis)) for axis in range(3)] + [1])
    column = b.op("Expand", sink, lead)
    weights = b.op("Softmax", b.op("Concat", scores, column, axis=-1), axis=-1)
    return e.slice(weights, 0, -1, axis=3)
