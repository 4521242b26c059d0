"""Append to one stream of the cache: planes in, new tokens joined, planes out.

A stream with `t` cached tokens is stored as its first `sink` tokens unencoded, `body_tokens(t)`
tokens encoded, and the rest unencoded. Planes grow along their token axis by concatenation, or are
buffers with room that tokens are written into.

A token that is encoded in this call was still exact for the earlier queries of the same call. So a
view has `segments`, every token as the last query sees it, and `fresh`, exact copies of the tokens
encoded in this call; `attend` picks per query.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from kvxform.codecs.base import make_codec
from kvxform.codecs.integer import IntCodec
from kvxform.codegen.onnx.aten_shape import END
from kvxform.codegen.onnx.codecs import codec_emitter
from kvxform.codegen.onnx.emission import Emission
from kvxform.codegen.onnx.masks import (
    body_length,
    first_positions,
    past_length,
    reads_whole_buffers,
    total_length,
)
from kvxform.codegen.onnx.ports import has_tail
from kvxform.codegen.onnx.segments import ExactSegment, FoldedSegment, Segment, can_fold
from kvxform.ir.plan import SitePlan
from kvxform.ir.stream_plan import KeyView, StreamPlan

HEADS, TOKENS = 1, 2  # axes of every plane
PARTS = {"key": "k", "value": "v"}  # of the names of nodes
Encode = Callable[[ir.Value], Mapping[str, ir.Value]]  # tokens [B, Hk, t, D] to planes


@dataclass(frozen=True)
class StreamView:
    """What attention reads of one stream.

    Attributes:
        plan: The plan of the stream.
        segments: Every token as the last query sees it; sink, body, tail, or all in one.
        bounds: First token of each segment but the first, int64 `[1]`.
        fresh: Exact copies of the tokens encoded in this call, or None if no query sees them.
    """

    plan: StreamPlan
    segments: tuple[Segment, ...]
    bounds: tuple[ir.Value, ...]
    fresh: ExactSegment | None

    @property
    def values(self) -> ir.Value | None:
        """All tokens as one tensor `[B, Hk, total, D]`, if every query sees just that."""
        only = self.segments[0]
        if len(self.segments) > 1 or self.fresh is not None or not isinstance(only, ExactSegment):
            return None
        return only.values


def append_both(
    e: Emission, site: SitePlan, k: ir.Value, v: ir.Value | None
) -> tuple[StreamView, StreamView]:
    """Emit the append of new keys and values, each `[B, Hk, S, D]`; return what attention reads.

    Without values, they are a view of the keys, and attention reads these twice. Streams that are
    encoded alike are encoded together, for in a decode step a node costs more than the few values
    it works on.
    """
    key, value = site.key, site.value
    if v is None or isinstance(value, KeyView):
        view = append(e, site, "key", k)
        return view, view
    alike = (key.codec, key.head_dim, key.regions) == (value.codec, value.head_dim, value.regions)
    exact = key.codec["codec"] == "none" or key.regions.sink or has_tail(key)
    if not alike or exact or not make_codec(key.codec).is_headwise:
        return append(e, site, "key", k), append(e, site, "value", v)
    with e.builder.part("kv/encode"):
        both = codec_emitter(key).encode(e.builder, e.builder.op("Concat", k, v, axis=HEADS))
        sizes = e.builder.const([site.num_kv_heads] * 2)
        halves = {
            name: e.builder.ops("Split", plane, sizes, dtypes=[plane.dtype] * 2, axis=HEADS)
            for name, plane in both.items()
        }
    return (
        append(e, site, "key", k, lambda _: {name: half[0] for name, half in halves.items()}),
        append(e, site, "value", v, lambda _: {name: half[1] for name, half in halves.items()}),
    )


def append(
    e: Emission, site: SitePlan, stream: str, new: ir.Value, encode: Encode | None = None
) -> StreamView:
    """Emit the append to one stream.

    Args:
        e: The emission.
        site: The owner of the cache.
        stream: `key` or `value`.
        new: New tokens, `[B, Hk, S, D]`.
        encode: Emits their planes; by default that of the codec.
    """
    past, plan = e.ports.enter(site, stream), site.streams[stream]
    if encode is None:
        encode = functools.partial(codec_emitter(plan).encode, e.builder)
    with e.builder.part(PARTS[stream]):
        hand = at_hand(e, plan, new, past)
        return store(e, site, stream, new, past, hand, encode)


def at_hand(e: Emission, plan: StreamPlan, new: ir.Value, past: Mapping[str, ir.Value]) -> ir.Value:
    """Return the exact tokens after the sink, those that are encoded in this call first.

    What a buffer holds has been rounded to its dtype, so with a tail all tokens are rounded first.
    """
    after_sink = e.slice(new, _new_in_sink(e, plan), END, TOKENS) if "sink" in past else new
    if "recent" not in past:
        return after_sink
    tail = past["recent"]
    assert tail.dtype is not None, "inputs have a dtype"
    return e.builder.op("Concat", tail, e.builder.cast(after_sink, tail.dtype), axis=TOKENS)


def store(
    e: Emission,
    site: SitePlan,
    stream: str,
    new: ir.Value,
    past: Mapping[str, ir.Value],
    hand: ir.Value,
    encode: Encode,
) -> StreamView:
    """Emit what becomes of new tokens, and return what attention reads.

    Args:
        e: The emission.
        site: The owner of the cache.
        stream: `key` or `value`.
        new: New tokens, `[B, Hk, S, D]`.
        past: The stored planes.
        hand: What `at_hand` returned.
        encode: Emits the planes of tokens.
    """
    plan, b, dtype = site.streams[stream], e.builder, new.dtype
    assert dtype is not None, "graph values have a dtype"
    sink = _append_sink(e, site, stream, new, past["sink"]) if "sink" in past else None
    leaving, tail = hand, None
    if "recent" in past:
        count = leaving_length(e, plan)
        leaving = e.slice(hand, 0, count, TOKENS)
        tail = e.ports.leave(site, stream, "recent", e.slice(hand, count, END, TOKENS))
    with b.part("encode"):
        encoded, planes = encode(leaving), {}
    for spec in plan.planes:
        joined = join_tokens(e, past[spec.name], encoded[spec.name])
        planes[spec.name] = in_use(e, e.ports.leave(site, stream, spec.name, joined))
    exact = [None if x is None else b.cast(x, dtype) for x in (sink, tail)]
    fresh = None if tail is None else ExactSegment(b.cast(leaving, dtype))
    body = _folded(plan, planes)
    if body is not None:
        return _separate_view(e, plan, exact[0], body, exact[1], fresh)
    with b.part("decode"):
        decoded = codec_emitter(plan).decode(b, planes, dtype)
    parts = [x for x in (exact[0], decoded, exact[1]) if x is not None]
    values = parts[0] if len(parts) == 1 else b.op("Concat", *parts, axis=TOKENS)
    return StreamView(plan, (ExactSegment(values),), (), fresh)


def join_tokens(e: Emission, past: ir.Value, new: ir.Value) -> ir.Value:
    """Return a plane with new rows: behind the old ones, or written in place."""
    if e.form.capacity is None:
        return e.builder.op("Concat", past, new, role="append", axis=TOKENS)
    slots = first_positions(e)
    return e.builder.op("TensorScatter", past, new, slots, role="append", axis=TOKENS)


def in_use(e: Emission, plane: ir.Value) -> ir.Value:
    """Return the rows of a plane that attention looks at; see `masks.total_length`."""
    if e.form.capacity is None or reads_whole_buffers(e):
        return plane
    return e.slice(plane, 0, total_length(e), TOKENS)


def _folded(plan: StreamPlan, planes: Mapping[str, ir.Value]) -> Segment | None:
    """Return the body as codes that are read without decoding, if the plan says so."""
    codec = make_codec(plan.codec)
    if plan.read.form != "folded" or plan.is_turned_at_read or not isinstance(codec, IntCodec):
        return None
    if not can_fold(codec, plan.head_dim):
        return None
    return FoldedSegment(codec, plan.head_dim, planes)


def _separate_view(
    e: Emission,
    plan: StreamPlan,
    sink: ir.Value | None,
    body: Segment,
    tail: ir.Value | None,
    fresh: ExactSegment | None,
) -> StreamView:
    """Return a view in which sink, body and tail stay apart."""
    segments, bounds = [body], []
    first = e.builder.const([plan.regions.sink])
    if sink is not None:
        segments.insert(0, ExactSegment(sink))
        bounds.append(first)
    if tail is not None:
        segments.append(ExactSegment(tail))
        total = body_length(e, plan, total_length(e), "total")
        bounds.append(e.builder.op("Add", total, first))
    return StreamView(plan, tuple(segments), tuple(bounds), fresh)


def _append_sink(
    e: Emission, site: SitePlan, stream: str, new: ir.Value, past: ir.Value
) -> ir.Value:
    """Return the sink after this call: it fills up with the first tokens and stays."""
    assert past.dtype is not None, "inputs have a dtype"
    every = e.builder.op("Concat", past, e.builder.cast(new, past.dtype), axis=TOKENS)
    sink = e.slice(every, 0, site.streams[stream].regions.sink, TOKENS)
    return e.ports.leave(site, stream, "sink", sink)


def _new_in_sink(e: Emission, plan: StreamPlan) -> ir.Value:
    """Return how many of the new tokens go to the sink at most, int64 `[1]`."""
    sink = plan.regions.sink

    def make() -> ir.Value:
        free = e.builder.op("Sub", e.builder.const([sink]), past_length(e))
        return e.builder.op("Max", free, e.builder.const([0]))

    return e.shared(("new in sink", sink), make)


def leaving_length(e: Emission, plan: StreamPlan) -> ir.Value:
    """Return how many tokens are encoded in this call, int64 `[1]`."""

    def make() -> ir.Value:
        after = body_length(e, plan, total_length(e), "total")
        return e.builder.op("Sub", after, body_length(e, plan, past_length(e), "past"))

    return e.shared(("leaving", plan.regions.sink, *plan.keep_and_chunk), make)
