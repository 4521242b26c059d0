"""Logits of the last token of each row: what comes after the last layer is done for it alone.

The product with the vocabulary is a large part of a prompt's work, and generation reads one row of
it. So the last hidden states are gathered as early as every later step works on tokens one by one.
"""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import fx

import kvxform.ir.ops as kvx
from kvxform.codegen.onnx.aten_shape import END
from kvxform.codegen.onnx.builder import BOOL, INT64
from kvxform.codegen.onnx.emission import Emission, Emitted
from kvxform.codegen.onnx.masks import first_positions, past_length, total_length
from kvxform.ir.linear import LINEAR
from kvxform.ir.program import Program

aten = torch.ops.aten
# What is done to each token alone, if all operands but one are weights.
PER_TOKEN = frozenset(
    {
        LINEAR,
        kvx.RMS_NORM,
        aten.layer_norm.default,
        aten.mul.Tensor,
        aten.div.Tensor,
        aten.add.Tensor,
        aten.tanh.default,
        aten._to_copy.default,
        aten.to.dtype,
    }
)
TOKENS = 1  # axis of hidden states [B, S, C]


def head_input(program: Program) -> fx.Node:
    """Return the earliest node after which every token is worked on alone, up to the logits."""
    (output,) = (node for node in program.graph.nodes if node.op == "output")
    found: fx.Node = output.all_input_nodes[0]
    while (source := _only_source(found)) is not None:
        found = source
    return found


def _only_source(node: fx.Node) -> fx.Node | None:
    """Return what a node works on token by token, if nothing else reads that."""
    sources = [x for x in node.all_input_nodes if x.op != "get_attr"]
    if node.target not in PER_TOKEN or len(sources) != 1 or len(sources[0].users) != 1:
        return None
    return sources[0]


def last_tokens(e: Emission, x: Emitted) -> ir.Value:
    """Return the hidden states of the last token of each row, `[B, 1, C]` of `[B, S, C]`.

    Over a paged cache, where all tokens are one row, `[1, B, C]` of `[1, num_tokens, C]`.
    """
    b = e.builder
    assert isinstance(x, ir.Value), "hidden states are one tensor"
    with b.part("last_tokens"):
        if e.paged is not None:
            ends = e.slice(e.paged.bounds, 1, END, axis=0)
            last = b.op("Sub", b.cast(ends, INT64), b.const(1))
            return b.op("Gather", x, last, axis=TOKENS)
        last = _last_columns(e) if e.form.capacity is None else _last_slots(e)
        return b.op("GatherND", x, b.op("Unsqueeze", last, b.const([1, 2])), batch_dims=1)


def _last_slots(e: Emission) -> ir.Value:
    """Return the column of the last new token of each row in buffers, int64 `[B]`."""
    b = e.builder
    counts = b.op("ReduceSum", e.inputs.attention_mask, b.const([1]), keepdims=0)
    return b.op("Sub", b.op("Sub", counts, b.const(1)), first_positions(e))


def _last_columns(e: Emission) -> ir.Value:
    """Return the column of the last new token of each row in a cache that grows, int64 `[B]`.

    Where rows are padded on the left, it is the last one; GenAI pads them on the right.
    """
    b = e.builder
    new = e.slice(e.inputs.attention_mask, past_length(e), total_length(e), axis=1)
    counts = b.op("ReduceSum", new, b.const([1]), keepdims=0)
    newest = b.op("Squeeze", e.slice(new, -1, END, axis=1), b.const([1]))
    is_left = b.op("Cast", newest, dtype=BOOL, to=int(BOOL))
    ends = b.op("Where", is_left, e.symbol("S"), counts, dtype=INT64)
    return b.op("Sub", ends, b.const(1))
