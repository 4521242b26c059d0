"""Emitters of aten operations that pick, order, repeat or place entries: routing to experts."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch
from torch import fx

from kvxform.codegen.onnx.aten_shape import source
from kvxform.codegen.onnx.builder import INT64
from kvxform.codegen.onnx.emission import (
    Emission,
    Operand,
    Size,
    dtype_of,
    emits,
    rank_of,
    type_of,
)
from kvxform.ir.types import TensorType, TupleType

aten = torch.ops.aten


def _picks_along_one_axis(node: fx.Node) -> bool:
    """Whether an `index.Tensor` has one index, of integers."""
    indices = node.args[1]
    assert isinstance(indices, Sequence), "indices are a list"
    given = [x for x in indices if isinstance(x, fx.Node)]
    return len(given) == 1 and type_of(given[0]).dtype is not torch.bool


@emits(aten.index.Tensor, when=_picks_along_one_axis)
def emit_index(
    e: Emission, node: fx.Node, x: ir.Value, indices: Sequence[ir.Value | None]
) -> ir.Value:
    """Emit entries of one axis, chosen by a tensor of any shape."""
    axis, index = next((i, index) for i, index in enumerate(indices) if index is not None)
    return e.builder.op("Gather", x, index, axis=axis)


@emits(aten.index_select.default)
def emit_index_select(
    e: Emission, node: fx.Node, x: ir.Value, dim: int, index: ir.Value
) -> ir.Value:
    """Emit entries of one axis, chosen by a vector."""
    return e.builder.op("Gather", x, index, axis=dim)


@emits(aten.gather.default)
def emit_gather(e: Emission, node: fx.Node, x: ir.Value, dim: int, index: ir.Value) -> ir.Value:
    """Emit one entry of `dim` for each entry of the index."""
    return e.builder.op("GatherElements", x, index, axis=dim)


def _is_ranked_by_value(node: fx.Node) -> bool:
    """Whether a `topk` has a constant count and a dtype that ONNX ranks."""
    return isinstance(node.args[1], int) and type_of(source(node)).dtype is not torch.bool


@emits(aten.topk.default, when=_is_ranked_by_value)
def emit_topk(
    e: Emission,
    node: fx.Node,
    x: ir.Value,
    k: int,
    dim: int = -1,
    largest: bool = True,
    is_sorted: bool = True,
) -> tuple[ir.Value, ...]:
    """Emit the k largest or smallest entries and where they are."""
    return e.builder.ops(
        "TopK",
        x,
        e.builder.const([k]),
        dtypes=[x.dtype, INT64],
        axis=dim,
        largest=int(largest),
        sorted=int(is_sorted),
    )


@emits(aten.scatter.src, aten.scatter.value)
def emit_scatter(
    e: Emission, node: fx.Node, x: ir.Value, dim: int, index: ir.Value, value: Operand
) -> ir.Value:
    """Emit `x` with entries of `dim` replaced by a number, or by a tensor shaped as the index."""
    updates = e.operand(value, dtype_of(node))
    if not isinstance(value, ir.Value):
        updates = e.builder.op("Expand", updates, e.builder.op("Shape", index, dtype=INT64))
    return e.builder.op("ScatterElements", x, index, updates, axis=dim)


def _adds_plainly(node: fx.Node) -> bool:
    """Whether an `index_add` has no factor."""
    return node.kwargs.get("alpha") in (None, 1)


@emits(aten.index_add.default, when=_adds_plainly)
def emit_index_add(
    e: Emission, node: fx.Node, x: ir.Value, dim: int, index: ir.Value, value: ir.Value, **_: object
) -> ir.Value:
    """Emit `x` with slices of `value` added along `dim`."""
    rank = rank_of(node)
    axes = e.builder.const([i for i in range(rank) if i != dim % rank])
    column = e.builder.op("Unsqueeze", index, axes) if rank > 1 else index
    full = e.builder.op("Expand", column, e.builder.op("Shape", value, dtype=INT64))
    return e.builder.op("ScatterElements", x, full, value, axis=dim, reduction="add")


def _has_classes(node: fx.Node) -> bool:
    """Whether a `one_hot` says how many classes there are."""
    return len(node.args) > 1 and isinstance(node.args[1], int) and node.args[1] > 0


@emits(aten.one_hot.default, when=_has_classes)
def emit_one_hot(e: Emission, node: fx.Node, x: ir.Value, classes: int) -> ir.Value:
    """Emit a 1 at the place of each class."""
    depth, values = e.builder.const([classes]), e.builder.const([0, 1])
    return e.builder.op("OneHot", x, depth, values, dtype=INT64, axis=-1)


def _repeats_an_axis(node: fx.Node) -> bool:
    """Whether a `repeat_interleave` has a constant count and names its axis."""
    return len(node.args) > 2 and isinstance(node.args[1], int) and node.args[2] is not None


@emits(aten.repeat_interleave.self_int, when=_repeats_an_axis)
def emit_repeat_interleave(
    e: Emission, node: fx.Node, x: ir.Value, count: int, dim: int, **_: object
) -> ir.Value:
    """Emit every entry of an axis `count` times, one copy after the other."""
    rank = rank_of(node)
    dim %= rank
    apart = e.builder.op("Unsqueeze", x, e.builder.const([dim + 1]))
    copies = e.builder.const([count if i == dim + 1 else 1 for i in range(rank + 1)])
    repeated = e.builder.op("Expand", apart, copies)
    sizes: list[int | Size] = [*[0] * dim, -1]  # 0: as it is; -1: what is left
    for axis in range(dim + 1, rank):
        size = type_of(node).shape[axis]
        sizes.append(size if isinstance(size, int) else Size(e.dim(x, axis)))
    return e.builder.op("Reshape", repeated, e.shape(sizes))


@emits(aten.stack.default)
def emit_stack(e: Emission, node: fx.Node, parts: Sequence[ir.Value], dim: int = 0) -> ir.Value:
    """Emit tensors of one shape along a new axis."""
    axis = e.builder.const([dim % rank_of(node)])
    apart = [e.builder.op("Unsqueeze", e.operand(x, dtype_of(node)), axis) for x in parts]
    return e.builder.op("Concat", *apart, axis=dim % rank_of(node))


def _has_known_entries(node: fx.Node) -> bool:
    return isinstance(node.meta["type"], TupleType) and all(
        isinstance(x, TensorType) for x in node.meta["type"].items
    )


@emits(aten.unbind.int, when=_has_known_entries)
def emit_unbind(e: Emission, node: fx.Node, x: ir.Value, dim: int = 0) -> tuple[ir.Value, ...]:
    """Emit every entry of an axis, without the axis."""
    count = len(node.meta["type"].items)
    return tuple(e.builder.op("Gather", x, e.builder.const(i), axis=dim) for i in range(count))
