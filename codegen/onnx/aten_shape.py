"""Emitters of aten operations that move, cut, join or convert values, and of size arithmetic."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import onnx_ir as ir
import torch
from torch import fx

from kvxform.codegen.onnx.builder import INT64
from kvxform.codegen.onnx.emission import (
    EMITTERS,
    Emission,
    Emit,
    Emitted,
    Operand,
    Size,
    dtype_of,
    emits,
    rank_of,
    type_of,
)
from kvxform.ir.types import SymType, TensorType, TupleType

aten = torch.ops.aten

END = 2**63 - 1


def source(node: fx.Node) -> fx.Node:
    """Return the first argument of a call."""
    first = node.args[0]
    assert isinstance(first, fx.Node)
    return first


@emits(aten.sym_size.int)
def emit_sym_size(e: Emission, node: fx.Node, x: ir.Value, dim: int) -> Size:
    """Emit one run-time size; batch and sequence sizes are emitted once for the whole graph."""
    found = node.meta["type"]
    if isinstance(found, SymType) and found.expression in ("B", "S"):
        return Size(e.symbol(found.expression))
    return Size(e.dim(x, dim))


def _size_arithmetic(op_type: str) -> Emit:
    def emit(e: Emission, node: fx.Node, a: Operand, b: Operand) -> Size:
        left, right = (e.operand(x, INT64) for x in (a, b))
        return Size(e.builder.op(op_type, left, right))

    return emit


EMITTERS.update(
    {
        operator.add: _size_arithmetic("Add"),
        operator.sub: _size_arithmetic("Sub"),
        operator.mul: _size_arithmetic("Mul"),
        operator.floordiv: _size_arithmetic("Div"),  # sizes are never negative
    }
)


@emits(operator.getitem)
def emit_getitem(e: Emission, node: fx.Node, items: tuple[ir.Value, ...], index: int) -> ir.Value:
    """Take one of several results."""
    return items[index]


@emits(
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.dropout.default,  # programs are captured for inference
    aten.lift_fresh_copy.default,
)
def emit_identity(e: Emission, node: fx.Node, x: ir.Value, *_: object, **__: object) -> ir.Value:
    """Emit nothing: the value is the same."""
    return x


@emits(
    aten._to_copy.default,
    aten.to.device,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.other,
    aten.type_as.default,
)
def emit_to(e: Emission, node: fx.Node, x: Operand, *_: object, **__: object) -> ir.Value:
    """Emit a conversion to the dtype of the result."""
    return e.operand(x, dtype_of(node))


@emits(aten.view.default, aten.reshape.default, aten._unsafe_view.default)
def emit_reshape(e: Emission, node: fx.Node, x: ir.Value, sizes: Sequence[int | Size]) -> ir.Value:
    """Emit a Reshape whose vector is constant wherever possible.

    A run-time size that the input has on the same axis becomes 0, and a single other one -1.
    """
    before, after = type_of(source(node)).shape, type_of(node).shape
    vector = list(sizes)
    for i, size in enumerate(vector):
        if isinstance(size, Size) and i < len(before) and before[i] == after[i]:
            vector[i] = 0
    unknown = [i for i, size in enumerate(vector) if isinstance(size, Size)]
    if len(unknown) == 1 and -1 not in vector:
        vector[unknown[0]] = -1
    return e.builder.op("Reshape", x, e.shape(vector))


@emits(aten.expand.default)
def emit_expand(
    e: Emission, node: fx.Node, x: ir.Value, sizes: Sequence[int | Size], *, implicit: bool = False
) -> ir.Value:
    """Emit an Expand; sizes of -1 keep the axis."""
    return e.builder.op("Expand", x, e.shape([1 if n == -1 else n for n in sizes]))


def _alike(value: float) -> Emit:
    def emit(e: Emission, node: fx.Node, x: ir.Value, **_: object) -> ir.Value:
        sizes = e.builder.op("Shape", x, dtype=INT64)
        return e.builder.op("Expand", e.operand(value, dtype_of(node)), sizes)

    return emit


EMITTERS[aten.zeros_like.default] = _alike(0)
EMITTERS[aten.ones_like.default] = _alike(1)


@emits(aten.transpose.int)
def emit_transpose(e: Emission, node: fx.Node, x: ir.Value, a: int, b: int) -> ir.Value:
    """Emit an exchange of two axes."""
    order = list(range(rank_of(node)))
    order[a], order[b] = order[b], order[a]
    return e.builder.op("Transpose", x, perm=order)


@emits(aten.t.default)
def emit_t(e: Emission, node: fx.Node, x: ir.Value) -> ir.Value:
    """Emit the transpose of a matrix."""
    return e.builder.op("Transpose", x, perm=list(reversed(range(rank_of(node)))))


@emits(aten.permute.default)
def emit_permute(e: Emission, node: fx.Node, x: ir.Value, dims: Sequence[int]) -> ir.Value:
    """Emit a new order of axes."""
    return e.builder.op("Transpose", x, perm=[d % rank_of(node) for d in dims])


@emits(aten.unsqueeze.default)
def emit_unsqueeze(e: Emission, node: fx.Node, x: ir.Value, dim: int) -> ir.Value:
    """Emit a new axis of size one."""
    return e.builder.op("Unsqueeze", x, e.builder.const([dim]))


@emits(aten.squeeze.dim)
def emit_squeeze(e: Emission, node: fx.Node, x: ir.Value, dim: int) -> ir.Value:
    """Emit the removal of an axis; an axis that is not of size one stays, as in torch."""
    if rank_of(node) == rank_of(source(node)):
        return x
    return e.builder.op("Squeeze", x, e.builder.const([dim]))


@emits(aten.slice.Tensor)
def emit_slice(
    e: Emission,
    node: fx.Node,
    x: ir.Value,
    dim: int = 0,
    start: int | Size | None = None,
    end: int | Size | None = None,
    step: int = 1,
) -> ir.Value:
    """Emit a slice; a slice that takes everything emits nothing."""
    first, last = start or 0, END if end is None else end
    if first == 0 and last == END and step == 1:
        return x
    bounds = [e.shape([bound]) for bound in (first, last)]
    return e.builder.op("Slice", x, *bounds, e.builder.const([dim]), e.builder.const([step]))


@emits(aten.select.int)
def emit_select(e: Emission, node: fx.Node, x: ir.Value, dim: int, index: int | Size) -> ir.Value:
    """Emit one entry of an axis, without the axis."""
    if isinstance(index, Size):
        scalar = e.builder.op("Squeeze", index.value)
        return e.builder.op("Gather", x, scalar, axis=dim)
    return e.builder.op("Gather", x, e.builder.const(index), axis=dim)


@emits(aten.split.sizes, aten.split_with_sizes.default)
def emit_split_sizes(
    e: Emission, node: fx.Node, x: ir.Value, sizes: Sequence[int | Size], dim: int = 0
) -> Emitted:
    """Emit a Split into parts of given sizes."""
    return e.builder.ops("Split", x, e.shape(sizes), dtypes=[x.dtype] * len(sizes), axis=dim)


def _has_known_parts(node: fx.Node) -> bool:
    found, dim = node.meta["type"], node.args[2] if len(node.args) > 2 else 0
    assert isinstance(found, TupleType), "a split yields several tensors"
    assert isinstance(dim, int), "an axis is a constant"
    return all(isinstance(x, TensorType) and isinstance(x.shape[dim], int) for x in found.items)


@emits(aten.chunk.default, aten.split.Tensor, when=_has_known_parts)
def emit_split(e: Emission, node: fx.Node, x: ir.Value, _: int, dim: int = 0) -> Emitted:
    """Emit a Split into the parts that capture has found."""
    shapes = [item.shape for item in node.meta["type"].items]
    return emit_split_sizes(e, node, x, [shape[dim] for shape in shapes], dim)


@emits(aten.cat.default)
def emit_cat(e: Emission, node: fx.Node, parts: Sequence[ir.Value], dim: int = 0) -> ir.Value:
    """Emit a concatenation in the common dtype."""
    dtype = dtype_of(node)
    return e.builder.op("Concat", *(e.operand(x, dtype) for x in parts), axis=dim)


@emits(aten.arange.default)
def emit_arange(e: Emission, node: fx.Node, end: int | Size, **_: object) -> ir.Value:
    """Emit `0, 1, ..., end - 1`."""
    stop = e.builder.op("Squeeze", e.shape([end]))
    zero, one = e.builder.const(0), e.builder.const(1)
    return e.builder.cast(e.builder.op("Range", zero, stop, one), dtype_of(node))
