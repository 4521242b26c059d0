"""Work on single vectors of heads, where these lie side by side: rows `[B, S, H * D]`.

Attention operators take rows, and linear layers make them. What a graph does in between to heads
`[B, H, S, D]`, vector by vector, is done to rows, so that nothing is transposed back and forth:
RoPE, Hadamard rotations, and constants that are added or taken away.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import torch
from torch import fx

import kvxform.ir.ops as kvx
from kvxform.codegen.onnx.dialect import rotary_tables
from kvxform.codegen.onnx.emission import Emission, dtype_of, type_of
from kvxform.codegen.onnx.head_rows import heads_of, node_of, rows_of
from kvxform.codegen.onnx.rotations import emit_hadamard

aten = torch.ops.aten
LEVELS = ("L3", "L4")
OnRows = Callable[[Emission, fx.Node, ir.Value], ir.Value | None]


def emit_on_rows(e: Emission, node: fx.Node) -> ir.Value | None:
    """Emit a call on rows; None where it is no such call, or its operand is not known as rows.

    Returns:
        The result as heads `[B, H, S, D]`; the attention that reads it finds the rows.
    """
    emit = ON_ROWS.get(node.target)
    if e.form.level not in LEVELS or emit is None or len(type_of(node).shape) != 4:
        return None
    source = rows_of(e, node_of(node.args[0]))
    found = None if source is None else emit(e, node, source)
    return None if found is None else heads_of(e, node, found)


def _rope(e: Emission, node: fx.Node, rows: ir.Value) -> ir.Value:
    positions, inv_freq = (e.values[node_of(x)] for x in node.args[1:3])
    assert isinstance(positions, ir.Value), "positions are a tensor"
    assert isinstance(inv_freq, ir.Value), "frequencies are a tensor"
    scaling = float(node.kwargs.get("attention_scaling", 1.0))  # type: ignore[arg-type]
    return e.builder.op(
        "RotaryEmbedding",
        rows,
        *rotary_tables(e, positions, inv_freq, scaling, dtype_of(node)),
        role="rope",
        num_heads=int(type_of(node).shape[1]),
        rotary_embedding_dim=int(node.kwargs["rotary_dim"]),  # type: ignore[arg-type]
        interleaved=int(bool(node.kwargs.get("interleaved", False))),
    )


def _hadamard(e: Emission, node: fx.Node, rows: ir.Value) -> ir.Value:
    _, heads, _, width = type_of(node).shape
    b, signs = e.builder, node.kwargs.get("signs")
    named = e.values[signs] if isinstance(signs, fx.Node) else None
    assert named is None or isinstance(named, ir.Value), "signs are a tensor"
    block = int(node.kwargs["block"])  # type: ignore[arg-type]
    vectors = b.op("Reshape", rows, b.const([0, 0, int(heads), int(width)]), role="heads")
    turned = emit_hadamard(e, node, vectors, block=block, signs=named)
    assert isinstance(turned, ir.Value), "one tensor"
    return b.op("Reshape", turned, b.const([0, 0, int(heads) * int(width)]), role="rows")


def _shift(e: Emission, node: fx.Node, rows: ir.Value) -> ir.Value | None:
    """Emit a sum or difference with one constant for each channel of each head, `[H, 1, D]`."""
    _, heads, _, width = type_of(node).shape
    other = node.args[1]
    if node.kwargs or not isinstance(other, fx.Node) or other.op != "get_attr":
        return None
    if type_of(other).shape != (heads, 1, width):
        return None
    name = e.weights.name(str(other.target))
    constant = e.builder.tensor(f"{name}/rows", e.program.weights[name].flatten())
    return e.builder.op("Add" if node.target is aten.add.Tensor else "Sub", rows, constant)


ON_ROWS: dict[object, OnRows] = {
    kvx.ROPE: _rope,
    kvx.HADAMARD: _hadamard,
    aten.add.Tensor: _shift,
    aten.sub.Tensor: _shift,
}
