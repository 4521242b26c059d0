"""Heads as rows, `[B, S, H * D]`: what operators of attention take, and linear layers make.

Heads that have been split from such rows, or are about to be put side by side again, are not moved
back and forth.
"""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import fx

from kvxform.codegen.onnx.emission import Emission, type_of
from kvxform.ir.linear import RESHAPES

aten = torch.ops.aten


def operand_rows(e: Emission, nodes: list[fx.Node]) -> list[ir.Value | None]:
    """Return heads `[B, H, S, D]` of queries, keys and values as rows.

    Where one product makes all three, it comes first, and there is nothing else.
    """
    return _packed_rows(e, nodes) or [_rows(e, node) for node in nodes]


def heads_of(e: Emission, node: fx.Node, rows: ir.Value) -> ir.Value:
    """Return rows `[B, S, H * D]` as `[B, H, S, D]`, the value of `node`.

    Where the graph goes on to put heads side by side, that is done already.
    """
    e.rows[node] = rows
    for merged in merged_heads(node):
        e.ready[merged] = rows
    _, heads, _, width = type_of(node).shape
    sizes = e.builder.const([0, 0, int(heads), int(width)])
    return e.builder.op("Transpose", e.builder.op("Reshape", rows, sizes), perm=[0, 2, 1, 3])


def dtype_of_value(e: Emission, node: fx.Node) -> ir.DataType:
    """Return the dtype of what a node was emitted as."""
    found = _value(e, node).dtype
    assert found is not None, "graph values have a dtype"
    return found


def rows_of(e: Emission, node: fx.Node) -> ir.Value | None:
    """Return heads `[B, H, S, D]` as rows `[B, S, H * D]`, where these are known."""
    flat = flat_source(node)
    return e.rows.get(node) if flat is None else _value(e, flat)


def _rows(e: Emission, node: fx.Node) -> ir.Value:
    """Return heads `[B, H, S, D]` as rows `[B, S, H * D]`."""
    b, known = e.builder, rows_of(e, node)
    if known is not None:
        return known
    tokens_first = b.op("Transpose", _value(e, node), perm=[0, 2, 1, 3])
    _, heads, _, width = type_of(node).shape
    return b.op("Reshape", tokens_first, b.const([0, 0, int(heads) * int(width)]))


def _packed_rows(e: Emission, nodes: list[fx.Node]) -> list[ir.Value | None] | None:
    """Return `[q | k | v]` as one value, where they are neighbouring slices of it."""
    slices = [flat_source(node) for node in nodes]
    end, joint = 0, None
    for part in slices:
        if part is None or part.target is not aten.slice.Tensor or len(part.args) != 4:
            return None
        source, axis, start, stop = part.args
        if axis not in (2, -1) or start != end or joint not in (None, source):
            return None
        assert isinstance(stop, int), "slices of features have constant bounds"
        joint, end = source, stop
    if end != type_of(node_of(joint)).shape[-1]:
        return None
    return [_value(e, node_of(joint)), None, None]


def flat_source(node: fx.Node) -> fx.Node | None:
    """Return the rows `[B, S, H * D]` that were split into heads `[B, H, S, D]`, if that is all."""
    if not _swaps_heads_and_tokens(node):
        return None
    split = node_of(node.args[0])
    if split.target not in RESHAPES:
        return None
    source, (batch, heads, tokens, width) = node_of(split.args[0]), type_of(node).shape
    is_row = type_of(source).shape == (batch, tokens, int(heads) * int(width))
    return source if is_row else None


def merged_heads(node: fx.Node) -> list[fx.Node]:
    """Return the nodes that are heads `[B, H, S, D]` of `node` put side by side."""
    batch, heads, tokens, width = type_of(node).shape
    rows, found = (batch, tokens, int(heads) * int(width)), []
    for user in node.users:
        if user.target in RESHAPES and type_of(user).shape == type_of(node).shape:
            found += merged_heads(user)
        elif _swaps_heads_and_tokens(user):
            merges = [x for x in user.users if x.target in RESHAPES]
            found += [x for x in merges if type_of(x).shape == rows]
    return found


def _swaps_heads_and_tokens(node: fx.Node) -> bool:
    if node.target is aten.permute.default:
        return list(node.args[1]) == [0, 2, 1, 3]  # type: ignore[arg-type]
    return node.target is aten.transpose.int and {a % 4 for a in node.args[1:]} == {1, 2}  # type: ignore[operator]


def _value(e: Emission, node: fx.Node) -> ir.Value:
    found = e.values[node]
    assert isinstance(found, ir.Value), f"{node.name} yields one tensor"
    return found


def node_of(x: object) -> fx.Node:
    """Return an operand, which is a node."""
    assert isinstance(x, fx.Node), "operands come from the graph"
    return x
