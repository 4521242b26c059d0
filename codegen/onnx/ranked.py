"""Append of streams whose tokens are ranked by the attention that they get from probes.

The scores of tokens at hand are a plane of the cache, `scores`, until their chunk is complete. Such
an append comes with the queries of its tokens, so that it is emitted where attention is.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
import torch

from kvxform.codecs.base import make_codec
from kvxform.codecs.saliency import SaliencyCodec
from kvxform.codegen.onnx.aten_shape import END
from kvxform.codegen.onnx.builder import BOOL
from kvxform.codegen.onnx.codec_base import FLOAT
from kvxform.codegen.onnx.codec_saliency import SaliencyEmitter
from kvxform.codegen.onnx.emission import Emission
from kvxform.codegen.onnx.masks import body_end, query_slots, slot_range, total_length
from kvxform.codegen.onnx.streams import PARTS, StreamView, at_hand, leaving_length, store
from kvxform.ir.plan import SitePlan
from kvxform.ir.stream_plan import StreamPlan

DOUBLE = ir.DataType.DOUBLE
QUERIES, TOKENS, KEYS = 2, 2, 3  # axes of queries, of tokens in planes, and of keys in scores


def is_ranked(site: SitePlan) -> bool:
    """Whether an append needs the queries of its tokens."""
    return any(stream.score_bytes > 0 for stream in site.streams.values())


def append_ranked(
    e: Emission, site: SitePlan, k: ir.Value, v: ir.Value | None, q: ir.Value, scale: float
) -> tuple[StreamView, StreamView]:
    """Emit the append of new tokens `[B, Hk, S, D]` with their queries `[B, H, S, D]`."""
    new = {"key": k} if v is None else {"key": k, "value": v}
    past = {name: e.ports.enter(site, name) for name in new}
    hands = {name: at_hand(e, site.streams[name], x, past[name]) for name, x in new.items()}
    with e.builder.part("probes"):
        attention = _attention(e, site, hands["key"], q, scale)
    views = []
    for name, x in new.items():
        with e.builder.part(PARTS[name]):
            scores = _keep_scores(e, site, name, past[name], attention)
            encode = _Encode(e, site.streams[name], scores)
            views.append(store(e, site, name, x, past[name], hands[name], encode))
    return views[0], views[-1]


class _Encode:
    """Encodes tokens by their scores, `[B, Hk, t]`."""

    def __init__(self, e: Emission, plan: StreamPlan, scores: ir.Value) -> None:
        self._builder, self._scores = e.builder, scores
        codec = make_codec(plan.codec)
        assert isinstance(codec, SaliencyCodec), "no other codec ranks tokens"
        self._emitter = SaliencyEmitter(codec, plan.head_dim)

    def __call__(self, leaving: ir.Value) -> Mapping[str, ir.Value]:
        return self._emitter.encode_ranked(self._builder, leaving, self._scores)


def _keep_scores(
    e: Emission, site: SitePlan, stream: str, past: Mapping[str, ir.Value], attention: ir.Value
) -> ir.Value:
    """Add attention to the scores of tokens at hand; return those of the tokens encoded now."""
    b, plan = e.builder, site.streams[stream]
    old = b.op("Squeeze", past["scores"], b.const([KEYS]))
    tail = e.dim(old, TOKENS)
    both = b.op("Add", b.cast(old, DOUBLE), e.slice(attention, 0, tail, TOKENS))
    every = b.op("Concat", both, e.slice(attention, tail, END, TOKENS), axis=TOKENS)
    scores, count = b.cast(every, FLOAT), leaving_length(e, plan)
    staying = b.op("Unsqueeze", e.slice(scores, count, END, TOKENS), b.const([KEYS]))
    e.ports.leave(site, stream, "scores", staying)
    return e.slice(scores, 0, count, TOKENS)


def _attention(e: Emission, site: SitePlan, keys: ir.Value, q: ir.Value, scale: float) -> ir.Value:
    """Return the attention that tokens at hand get from the probes among new queries.

    Float64 `[B, Hk, n]`, for exact keys `[B, Hk, n, D]`; see `kvxform.codegen.eager.probes`.
    """
    b, plan = e.builder, site.key
    is_probe, mask = _probes(e, plan)
    probes = b.op("Compress", b.cast(q, DOUBLE), is_probe, axis=QUERIES)
    rows = b.op("Reshape", probes, b.const([0, site.num_kv_heads, -1, plan.head_dim]))
    scores = b.op("MatMul", rows, b.op("Transpose", b.cast(keys, DOUBLE), perm=[0, 1, 3, 2]))
    scores = b.op("Mul", scores, b.const(scale, DOUBLE))
    group = site.num_q_heads // site.num_kv_heads
    visible = mask if group == 1 else b.op("Concat", *[mask] * group, axis=0)
    hidden = b.const(float("-inf"), DOUBLE)
    weights = b.op("Softmax", b.op("Where", visible, scores, hidden, dtype=DOUBLE), axis=KEYS)
    return b.op("ReduceSum", weights, b.const([QUERIES]), keepdims=0)


def _probes(e: Emission, plan: StreamPlan) -> tuple[ir.Value, ir.Value]:
    """Return which new queries are probes, bool `[S]`, and what these see, bool `[P, n]`.

    A probe sees the tokens of its own chunk up to itself.
    """
    codec = make_codec(plan.codec)
    assert isinstance(codec, SaliencyCodec), "no other codec ranks tokens"
    rule = (plan.regions.sink, *plan.keep_and_chunk, codec.chunk, codec.probes)
    b, chunk = e.builder, e.builder.const(codec.chunk)

    def places() -> ir.Value:
        """Return how far queries are behind the sink, int64 `[S, 1]`."""
        return b.op("Sub", query_slots(e), b.const(plan.regions.sink))

    def starts() -> ir.Value:
        """Return the first place of the chunk of each query."""
        return b.op("Mul", b.op("Div", e.shared(("places", rule), places), chunk), chunk)

    def probes() -> ir.Value:
        at = e.shared(("places", rule), places)
        is_place = torch.zeros(codec.chunk, dtype=torch.bool)
        is_place[list(codec.probes)] = True
        within = b.op("Sub", at, e.shared(("chunk starts", rule), starts))
        found = b.op("Gather", b.table(is_place), within, dtype=BOOL, axis=0)
        behind = b.op("GreaterOrEqual", at, b.const(0), dtype=BOOL)
        return b.op("Squeeze", b.op("And", found, behind), b.const([1]))

    def mask() -> ir.Value:
        first = body_end(e, plan, "past")
        tokens = b.op("Sub", slot_range(e, first, total_length(e)), b.const(plan.regions.sink))
        at, start = e.shared(("places", rule), places), e.shared(("chunk starts", rule), starts)
        own = b.op("GreaterOrEqual", tokens, start, dtype=BOOL)
        seen = b.op("And", own, b.op("LessOrEqual", tokens, at, dtype=BOOL))
        return b.op("Compress", seen, e.shared(("probes", rule), probes), axis=0)

    return e.shared(("probes", rule), probes), e.shared(("probe mask", rule), mask)
