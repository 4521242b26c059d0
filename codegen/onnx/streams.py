"""Append to one stream of the cache: planes in, new tokens joined, planes out.

A stream with `t` cached tokens is stored as its first `sink` tokens unencoded, `body_tokens(t)`
tokens encoded, and the rest unencoded. Planes grow along their token axis by concatenation.

A token that is encoded in this call was still exact for the earlier queries of the same call. So a
view has `values`, every token as the last query sees it, and `fresh`, exact copies of the tokens
encoded in this call; `attend` picks per query.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from kvxform.codegen.onnx.aten_shape import END
from kvxform.codegen.onnx.codecs import codec_emitter
from kvxform.codegen.onnx.emission import Emission
from kvxform.codegen.onnx.masks import body_length, past_length, total_length
from kvxform.ir.plan import SitePlan, StreamPlan

TOKENS = 2  # the axis of tokens in every plane


@dataclass(frozen=True)
class StreamView:
    """What attention reads of one stream.

    Attributes:
        plan: The plan of the stream.
        values: Every token as the last query sees it, `[B, Hk, total, D]`.
        fresh: Exact copies of the tokens encoded in this call, or None if no query sees them.
    """

    plan: StreamPlan
    values: ir.Value
    fresh: ir.Value | None


def append(e: Emission, site: SitePlan, stream: str, new: ir.Value) -> StreamView:
    """Emit the append of the new tokens, `[B, Hk, S, D]`, and return what attention reads."""
    plan, b, dtype = site.streams[stream], e.builder, new.dtype
    assert dtype is not None, "graph values have a dtype"
    past = e.ports.enter(site, stream)
    parts = []
    if "sink" in past:
        parts.append(b.cast(_append_sink(e, site, stream, new, past["sink"]), dtype))
    leaving, staying = _leave_tail(e, site, stream, new, past)
    encoded = codec_emitter(plan).encode(b, leaving)
    planes = {
        spec.name: e.ports.leave(
            site, stream, spec.name, b.op("Concat", past[spec.name], encoded[spec.name], axis=TOKENS)
        )
        for spec in plan.planes
    }
    parts.append(codec_emitter(plan).decode(b, planes, dtype))
    if staying is None:
        return StreamView(plan, _join(e, parts), None)
    parts.append(b.cast(staying, dtype))
    return StreamView(plan, _join(e, parts), b.cast(leaving, dtype))


def _append_sink(
    e: Emission, site: SitePlan, stream: str, new: ir.Value, past: ir.Value
) -> ir.Value:
    """Return the sink after this call: it fills up with the first tokens and stays."""
    assert past.dtype is not None, "inputs have a dtype"
    every = e.builder.op("Concat", past, e.builder.cast(new, past.dtype), axis=TOKENS)
    sink = e.slice(every, 0, site.streams[stream].regions.sink, TOKENS)
    return e.ports.leave(site, stream, "sink", sink)


def _leave_tail(
    e: Emission, site: SitePlan, stream: str, new: ir.Value, past: dict[str, ir.Value]
) -> tuple[ir.Value, ir.Value | None]:
    """Return the tokens to encode now, and the unencoded tail, or None if there never is one.

    What a buffer holds has been rounded to its dtype, so with a tail all tokens are rounded first.
    """
    plan, b = site.streams[stream], e.builder
    after_sink = e.slice(new, _new_in_sink(e, plan), END, TOKENS) if "sink" in past else new
    if "recent" not in past:
        return after_sink, None
    tail = past["recent"]
    assert tail.dtype is not None, "inputs have a dtype"
    loose = b.op("Concat", tail, b.cast(after_sink, tail.dtype), axis=TOKENS)
    count = leaving_length(e, plan)
    staying = e.ports.leave(site, stream, "recent", e.slice(loose, count, END, TOKENS))
    return e.slice(loose, 0, count, TOKENS), staying


def _new_in_sink(e: Emission, plan: StreamPlan) -> ir.Value:
    """Return how many of the new tokens go to the sink at most, int64 `[1]`."""
    sink = plan.regions.sink

    def make() -> ir.Value:
        free = e.builder.op("Sub", e.builder.const([sink]), past_length(e))
        return e.builder.op("Max", free, e.builder.const([0]))

    return e.shared(("new in sink", sink), make)


def _join(e: Emission, parts: list[ir.Value]) -> ir.Value:
    return parts[0] if len(parts) == 1 else e.builder.op("Concat", *parts, axis=TOKENS)


def leaving_length(e: Emission, plan: StreamPlan) -> ir.Value:
    """Return how many tokens are encoded in this call, int64 `[1]`."""

    def make() -> ir.Value:
        after = body_length(e, plan, total_length(e), "total")
        return e.builder.op("Sub", after, body_length(e, plan, past_length(e), "past"))

    return e.shared(("leaving", plan.regions.sink, *plan.keep_and_chunk), make)
