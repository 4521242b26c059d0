"""Which keys a query sees, as boolean masks over slots, and how far it is from them.

Masks and distances are shared by all layers.

A slot is a place in the cached sequence. In a cache that grows, padding takes slots too, and the
new tokens take the last ones. A slot that `attention_mask` leaves out is seen by nobody but itself,
so that no row of a softmax is empty and padding never turns into NaN.

In buffers that are written in place, the slot of a token is its position. Behind the tokens of a
row there is padding, which no token sees.
"""

from __future__ import annotations

import onnx_ir as ir

from kvxform.codegen.onnx.builder import BOOL, INT64
from kvxform.codegen.onnx.emission import Emission
from kvxform.ir.scoring import Span
from kvxform.ir.stream_plan import StreamPlan


def total_length(e: Emission) -> ir.Value:
    """Return the number of slots that are looked at in this call, int64 `[1]`.

    Of buffers, those that `attention_mask` has a column for; on CUDA all of them, since a slice
    would be a copy.
    """

    def capacity() -> ir.Value:
        return e.dim(next(iter(e.ports.past.values())), 2)

    def columns() -> ir.Value:
        return e.dim(e.inputs.attention_mask, 1)

    return e.shared(("total",), capacity if reads_whole_buffers(e) else columns)


def reads_whole_buffers(e: Emission) -> bool:
    """Whether attention reads buffers with the room behind their tokens."""
    return e.form.capacity is not None and e.form.provider == "cuda"


def past_length(e: Emission) -> ir.Value:
    """Return the number of slots before this call, int64 `[1]`."""
    return e.shared(("past",), lambda: e.builder.op("Sub", total_length(e), e.symbol("S")))


def query_slots(e: Emission) -> ir.Value:
    """Return the slots of the new tokens, int64 `[sequence_length, 1]`."""
    return e.shared(("query slots",), lambda: _query_slots(e))


def key_slots(e: Emission) -> ir.Value:
    """Return all slots, int64 `[total_sequence_length]`."""
    return e.shared(("key slots",), lambda: slot_range(e, e.builder.const([0]), total_length(e)))


def attention_mask(e: Emission, span: Span) -> ir.Value:
    """Return the mask of one kind of attention, bool `[batch, 1, sequence, total]`."""
    make = _mask if e.form.capacity is None else _mask_in_place
    return e.shared(("mask", span), lambda: make(e, span))


def key_distance(e: Emission) -> ir.Value:
    """Return by how many positions a key lies behind a query, int64 `[batch, 1, sequence, total]`.

    Positions count real tokens only, so padding between turns does not use up a window.
    """
    return e.shared(("distance",), lambda: e.builder.op("Sub", *_rows_and_columns(e, 1)))


def first_positions(e: Emission) -> ir.Value:
    """Return the position of the first new token of each row, int64 `[batch]`."""

    def make() -> ir.Value:
        first = e.slice(e.inputs.position_ids, 0, 1, axis=1)
        return e.builder.op("Squeeze", first, e.builder.const([1]))

    return e.shared(("first positions",), make)


def written_lengths(e: Emission) -> ir.Value:
    """Return how many slots of each row have been written after this call, int64 `[batch]`.

    They include padding behind new tokens, so that query i of S sees `written - S + i + 1` slots.
    Positions of padding are not looked at: GenAI says 0 there.
    """
    return e.shared(("written",), lambda: e.builder.op("Add", first_positions(e), _new_tokens(e)))


def _new_tokens(e: Emission) -> ir.Value:
    """Return S, as int64 `[1]` or `[batch]`.

    On CUDA it is counted there: a size is a number of the CPU, and a copy of it to the device would
    forbid CUDA graphs.
    """
    if e.form.provider == "cpu":
        return e.symbol("S")
    b, ids = e.builder, e.inputs.input_ids
    ones = b.cast(b.op("Equal", ids, ids, dtype=BOOL), INT64)
    return b.op("ReduceSum", ones, b.const([1]), keepdims=0)


def key_positions(e: Emission) -> ir.Value:
    """Return the position of every slot, int64 `[batch, total_sequence_length]`.

    Padding before tokens does not count; before the first token it is at -1.
    """

    def slots() -> ir.Value:
        sizes = e.builder.op("Concat", e.symbol("B"), total_length(e), axis=0)
        return e.builder.op("Expand", key_slots(e), sizes)

    def make() -> ir.Value:
        counts = e.builder.op("CumSum", e.inputs.attention_mask, e.builder.const(1))
        return e.builder.op("Sub", counts, e.builder.const(1))

    return e.shared(("chunks", 1), make if e.form.capacity is None else slots)


def slot_range(e: Emission, start: ir.Value, stop: ir.Value) -> ir.Value:
    """Return the slots from `start` to the one before `stop`, int64; bounds are int64 `[1]`."""
    bounds = [e.builder.op("Squeeze", x) for x in (start, stop)]
    return e.builder.op("Range", *bounds, e.builder.const(1))


def _query_slots(e: Emission) -> ir.Value:
    slots = slot_range(e, past_length(e), total_length(e))
    return e.builder.op("Unsqueeze", slots, e.builder.const([1]))


def _mask(e: Emission, span: Span) -> ir.Value:
    b = e.builder
    real = b.op("Cast", e.inputs.attention_mask, dtype=BOOL, to=int(BOOL))
    mask = b.op("Unsqueeze", real, b.const([1, 2]))  # [B, T] -> [B, 1, 1, T]
    if span.causal:
        seen = b.op("LessOrEqual", key_slots(e), query_slots(e), dtype=BOOL)  # [S, T]
        mask = b.op("And", mask, seen)
    mask = _narrow(e, span, mask)
    itself = b.op("Equal", key_slots(e), query_slots(e), dtype=BOOL)
    return b.op("Or", mask, itself)


def _mask_in_place(e: Emission, span: Span) -> ir.Value:
    """Return the mask over buffers; a query sees its own slot and none behind it, if causal."""
    b = e.builder
    queries, keys = _rows_and_columns(e, 1)
    if span.causal:
        mask = b.op("LessOrEqual", keys, queries, dtype=BOOL)
    else:
        lengths = b.op("ReduceSum", e.inputs.attention_mask, b.const([1]), keepdims=1)
        mask = b.op("Less", keys, b.op("Unsqueeze", lengths, b.const([1, 2])), dtype=BOOL)
    return _narrow(e, span, mask)


def _narrow(e: Emission, span: Span, mask: ir.Value) -> ir.Value:
    """Return the part of a mask that lies within the window and the chunk of a query."""
    b = e.builder
    if span.window is not None:
        within = b.op("Less", key_distance(e), b.const(span.window), dtype=BOOL)
        mask = b.op("And", mask, within)
    if span.chunk is not None:
        same = b.op("Equal", *_rows_and_columns(e, span.chunk), dtype=BOOL)
        mask = b.op("And", mask, same)
    return mask


def _rows_and_columns(e: Emission, chunk: int) -> tuple[ir.Value, ir.Value]:
    """Return chunks of queries `[batch, 1, sequence, 1]` and of keys `[batch, 1, 1, total]`.

    A chunk is a position divided by the length of chunks.
    """
    b = e.builder

    def chunks() -> ir.Value:
        return b.op("Div", key_positions(e), b.const(chunk))

    every = key_positions(e) if chunk == 1 else e.shared(("chunks", chunk), chunks)
    if e.form.capacity is None:
        new = e.slice(every, past_length(e), total_length(e), axis=1)
    else:
        new = e.inputs.position_ids
        new = new if chunk == 1 else b.op("Div", new, b.const(chunk))
    return b.op("Unsqueeze", new, b.const([1, 3])), b.op("Unsqueeze", every, b.const([1, 2]))


def body_length(e: Emission, plan: StreamPlan, length: ir.Value, name: str) -> ir.Value:
    """Return how many of `length` cached tokens are encoded; `StreamPlan.body_tokens` as nodes.

    Args:
        e: The emission.
        plan: The stream; its rule is used.
        length: Cached tokens, int64 of any shape.
        name: What `length` is; equal names share the result.
    """
    keep, chunk = plan.keep_and_chunk
    exact = plan.regions.sink + keep

    def make() -> ir.Value:
        b = e.builder
        free = b.op("Max", b.op("Sub", length, b.const(exact)), b.const(0))
        if chunk == 1:
            return free
        return b.op("Mul", b.op("Div", free, b.const(chunk)), b.const(chunk))

    return e.shared(("body", plan.regions.sink, keep, chunk, name), make)


def body_end(e: Emission, plan: StreamPlan, name: str) -> ir.Value:
    """Return the slot behind the encoded tokens, int64 `[1]`.

    Args:
        e: The emission.
        plan: The stream; its rule is used.
        name: `past` or `total`: before this call or after it.
    """

    def make() -> ir.Value:
        length = past_length(e) if name == "past" else total_length(e)
        sink = e.builder.const([plan.regions.sink])
        return e.builder.op("Add", body_length(e, plan, length, name), sink)

    return e.shared(("bound", plan.regions.sink, *plan.keep_and_chunk, name), make)


def fresh_mask(e: Emission, plan: StreamPlan) -> ir.Value:
    """Return for which queries a token encoded in this call was still exact.

    Bool `[sequence_length, tokens encoded in this call]`. The query in slot p sees the cache as it
    is with p + 1 tokens.
    """
    keep, chunk = plan.keep_and_chunk

    def make() -> ir.Value:
        b = e.builder
        past = body_length(e, plan, past_length(e), "past")
        total = body_length(e, plan, total_length(e), "total")
        tokens = slot_range(e, past, total)  # counted from the end of the sink
        lengths = b.op("Add", query_slots(e), b.const(1))
        seen = body_length(e, plan, lengths, "queries")  # [S, 1]
        return b.op("GreaterOrEqual", tokens, seen, dtype=BOOL)

    return e.shared(("fresh", plan.regions.sink, keep, chunk), make)
