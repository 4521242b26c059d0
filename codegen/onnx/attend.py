"""Emitters of `kvx::cache_append` and `kvx::cached_attention`.

Five forms, chosen from what the package is, the plan and the options of the node, never by trial:

- one PagedAttention over a paged cache;
- one GroupQueryAttention over buffers;
- one Attention that appends by itself: plain streams that one layer reads;
- append, then one Attention over all values: streams that are decoded first, and in which every
  query sees the same copy of a token;
- `parts.attend_by_parts`: everything else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from torch import fx

import kvxform.ir.ops as kvx
from kvxform.codegen.onnx.contrib import NewNodes
from kvxform.codegen.onnx.emission import Emission, dtype_of, emits
from kvxform.codegen.onnx.gqa import attend_grouped
from kvxform.codegen.onnx.masks import attention_mask, written_lengths
from kvxform.codegen.onnx.paged import attend_paged
from kvxform.codegen.onnx.parts import Scoring, attend_by_parts
from kvxform.codegen.onnx.ports import is_plain
from kvxform.codegen.onnx.ranked import append_ranked, is_ranked
from kvxform.codegen.onnx.streams import StreamView, append_both
from kvxform.codegen.onnx.turning import KeyRead, values_as_read
from kvxform.ir.plan import SitePlan
from kvxform.ir.scoring import Span
from kvxform.ir.stream_plan import KeyView

# Options of kvx::cached_attention that an Attention that appends does not have.
NOT_OF_ATTENTION = (
    "softcap",
    "sink_logits",
    "alibi_slopes",
    "inv_freq",
    "key_basis",
    "value_basis",
)

CONTRIB_ATTENTION = {"L3": attend_grouped, "L4": attend_paged}  # by level


@dataclass(frozen=True)
class NewTokens:
    """Keys and values of the new tokens of a layer whose Attention appends by itself."""

    k: ir.Value
    v: ir.Value


@dataclass(frozen=True)
class WaitingTokens:
    """Keys and values of new tokens whose append needs the queries of their layer."""

    k: ir.Value
    v: ir.Value | None


def appends_itself(e: Emission, node: fx.Node) -> bool:
    """Whether the Attention of the layer of a cache_append node can do the append."""
    assert e.program.plan is not None, "insert-cache has run"
    site = e.program.plan.site(int(node.kwargs["layer"]))  # type: ignore[arg-type]
    readers = [s for s in e.program.plan.sites if s.owner == site.layer]
    dtype = dtype_of(node.args[0])  # type: ignore[arg-type]
    options = e.program.attention_node(site.layer).kwargs
    plain = all(is_plain(plan, dtype) for plan in site.streams.values())
    special = any(options.get(name) is not None for name in NOT_OF_ATTENTION)
    grows = e.form.cache == "grow" and not e.form.is_primitive
    return grows and plain and len(readers) == 1 and not special


@emits(kvx.CACHE_APPEND)
def emit_cache_append(
    e: Emission, node: fx.Node, k: ir.Value, v: ir.Value | None, cache: object, *, layer: int
) -> None:
    """Emit the append of both streams, or leave it to the Attention of the layer."""
    assert e.program.plan is not None, "insert-cache has run"
    site = e.program.plan.site(layer)
    if e.form.level in CONTRIB_ATTENTION:
        e.caches[layer] = NewNodes.of(node)
    elif v is not None and appends_itself(e, node):
        e.caches[layer] = NewTokens(k, v)
    elif is_ranked(site):
        e.caches[layer] = WaitingTokens(k, v)
    else:
        e.caches[layer] = append_both(e, site, k, v)


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
    chunk: int | None = None,
    inv_freq: ir.Value | None = None,
    rotary_dim: int = 0,
    attention_scaling: float = 1.0,
    interleaved: bool = False,
    key_basis: ir.Value | None = None,
    value_basis: ir.Value | None = None,
    **others: Any,
) -> ir.Value:
    """Emit attention of the new queries over the cache of the owner of this layer."""
    assert e.program.plan is not None, "insert-cache has run"
    site = e.program.plan.site(layer)
    scoring = Scoring(scale, Span(causal, window, chunk), **others)
    found = e.caches[site.owner]
    if isinstance(found, NewNodes):
        return CONTRIB_ATTENTION[e.form.level](e, node, site, found, scoring)
    if isinstance(found, NewTokens):
        return _fused(e, site, q, found, scoring)
    if isinstance(found, WaitingTokens):
        found = e.caches[site.owner] = append_ranked(e, site, found.k, found.v, q, scale)
    key, value = found
    read = KeyRead(inv_freq, rotary_dim, attention_scaling, interleaved, key_basis)
    key, value = read.apply(e, site, key), values_as_read(e, site, value, value_basis)
    is_whole = key.values is not None and value.values is not None
    if scoring.is_plain and is_whole and not e.form.is_primitive:
        y = _attend_whole(e, q, key, value, scoring)
    else:
        y = attend_by_parts(e, site, q, key, value, scoring)
    # Where values are the first channels of the keys, these were read whole.
    return e.slice(y, 0, v_head_dim, axis=3) if isinstance(site.value, KeyView) else y


def _attend_whole(
    e: Emission, q: ir.Value, key: StreamView, value: StreamView, scoring: Scoring
) -> ir.Value:
    """Emit one Attention over all values, `[B, Hk, T, D]` each.

    Over buffers, causal attention ends at the last slot that was written; it needs no mask if the
    runtime knows where it starts.
    """
    span = scoring.span
    operands, causal = [q, key.values, value.values], 0
    if e.form.ends_itself and span == Span(causal=True):
        operands, causal = [*operands, None, None, None, written_lengths(e)], 1
    else:
        operands.append(attention_mask(e, span))
    return e.builder.op(
        "Attention", *operands, role="attention", scale=scoring.scale, is_causal=causal
    )


def _fused(e: Emission, site: SitePlan, q: ir.Value, new: NewTokens, scoring: Scoring) -> ir.Value:
    past_k = e.ports.enter(site, "key")["value"]
    past_v = e.ports.enter(site, "value")["value"]
    mask = attention_mask(e, scoring.span)
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
