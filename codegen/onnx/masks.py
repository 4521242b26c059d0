"""Which keys a query sees, as boolean masks over slots, shared by all layers.

A slot is a place in the cached sequence, padding included: the new tokens take the last slots. A
slot that `attention_mask` leaves out is seen by nobody but itself, so that no row of a softmax is
empty and padding never turns into NaN.
"""

from __future__ import annotations

import onnx_ir as ir

from kvxform.codegen.onnx.builder import BOOL, INT64
from kvxform.codegen.onnx.emission import Emission
from kvxform.ir.plan import StreamPlan


def total_length(e: Emission) -> ir.Value:
    """Return the number of slots after this call, int64 `[1]`."""
    return e.shared(("total",), lambda: e.dim(e.inputs.attention_mask, 1))


def past_length(e: Emission) -> ir.Value:
    """Return the number of slots before this call, int64 `[1]`."""
    return e.shared(("past",), lambda: e.builder.op("Sub", total_length(e), e.symbol("S")))


def query_slots(e: Emission) -> ir.Value:
    """Return the slots of the new tokens, int64 `[sequence_length, 1]`."""
    return e.shared(("query slots",), lambda: _query_slots(e))


def key_slots(e: Emission) -> ir.Value:
    """Return all slots, int64 `[total_sequence_length]`."""
    return e.shared(("key slots",), lambda: _range(e, e.builder.const([0]), total_length(e)))


def attention_mask(e: Emission, *, causal: bool, window: int | None) -> ir.Value:
    """Return the mask of one kind of attention, bool `[batch, 1, sequence, total]`."""
    return e.shared(("mask", causal, window), lambda: _mask(e, causal, window))


def _range(e: Emission, start: ir.Value, stop: ir.Value) -> ir.Value:
    bounds = [e.builder.op("Squeeze", x) for x in (start, stop)]
    return e.builder.op("Range", *bounds, e.builder.const(1))


def _query_slots(e: Emission) -> ir.Value:
    slots = _range(e, past_length(e), total_length(e))
    return e.builder.op("Unsqueeze", slots, e.builder.const([1]))


def _mask(e: Emission, causal: bool, window: int | None) -> ir.Value:
    b = e.builder
    real = b.op("Cast", e.inputs.attention_mask, dtype=BOOL, to=int(BOOL))
    mask = b.op("Unsqueeze", real, b.const([1, 2]))  # [B, T] -> [B, 1, 1, T]
    if causal:
        seen = b.op("LessOrEqual", key_slots(e), query_slots(e), dtype=BOOL)  # [S, T]
        mask = b.op("And", mask, seen)
    if window is not None:
        mask = b.op("And", mask, _within(e, window))
    itself = b.op("Equal", key_slots(e), query_slots(e), dtype=BOOL)
    return b.op("Or", mask, itself)


def _within(e: Emission, window: int) -> ir.Value:
    """Return whether a key is less than `window` positions back, bool `[B, 1, S, T]`.

    Positions count real tokens only, so padding between turns does not use up the window.
    """
    b = e.builder
    counts = b.op("CumSum", e.inputs.attention_mask, b.const(1))  # position + 1
    new = e.slice(counts, past_length(e), total_length(e), axis=1)
    rows = b.op("Unsqueeze", new, b.const([1, 3]))  # [B, 1, S, 1]
    columns = b.op("Unsqueeze", counts, b.const([1, 2]))  # [B, 1, 1, T]
    distance = b.op("Sub", rows, columns, dtype=INT64)
    return b.op("Less", distance, b.const(window), dtype=BOOL)


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
        tokens = _range(e, past, total)  # counted from the end of the sink
        lengths = b.op("Add", query_slots(e), b.const(1))
        seen = body_length(e, plan, lengths, "queries")  # [S, 1]
        return b.op("GreaterOrEqual", tokens, seen, dtype=BOOL)

    return e.shared(("fresh", plan.regions.sink, keep, chunk), make)
