"""Emitters of element-wise, comparing and reducing aten operations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from kvxform.codegen.onnx.builder import BOOL, onnx_dtype
from kvxform.codegen.onnx.emission import (
    EMITTERS,
    Emission,
    Emit,
    Operand,
    dtype_of,
    emits,
    promoted,
    rank_of,
    type_of,
)

aten = torch.ops.aten
GELU_OPSET = 20  # the first that has the operator

_BINARY = {
    "Add": (aten.add.Tensor, aten.add.Scalar),
    "Sub": (aten.sub.Tensor, aten.sub.Scalar),
    "Mul": (aten.mul.Tensor, aten.mul.Scalar),
    "Div": (aten.div.Tensor, aten.div.Scalar),
    "Max": (aten.maximum.default, aten.max.other),
    "Min": (aten.minimum.default, aten.min.other),
}
_UNARY = {
    "Abs": (aten.abs.default,),
    "Ceil": (aten.ceil.default,),
    "Cos": (aten.cos.default,),
    "Erf": (aten.erf.default,),
    "Exp": (aten.exp.default,),
    "Floor": (aten.floor.default,),
    "Log": (aten.log.default,),
    "Neg": (aten.neg.default,),
    "Not": (aten.logical_not.default,),
    "Reciprocal": (aten.reciprocal.default,),
    "Relu": (aten.relu.default,),
    "Round": (aten.round.default,),
    "Sigmoid": (aten.sigmoid.default,),
    "Sin": (aten.sin.default,),
    "Sqrt": (aten.sqrt.default,),
    "Tanh": (aten.tanh.default,),
}
_COMPARE = {
    "Equal": (aten.eq.Tensor, aten.eq.Scalar),
    "Greater": (aten.gt.Tensor, aten.gt.Scalar),
    "GreaterOrEqual": (aten.ge.Tensor, aten.ge.Scalar),
    "Less": (aten.lt.Tensor, aten.lt.Scalar),
    "LessOrEqual": (aten.le.Tensor, aten.le.Scalar),
}


def _binary(op_type: str) -> Emit:
    def emit(e: Emission, node: fx.Node, a: Operand, b: Operand, *, alpha: float = 1) -> ir.Value:
        dtype = dtype_of(node)
        right = e.operand(b, dtype)
        if alpha != 1:
            right = e.builder.op("Mul", right, e.operand(alpha, dtype))
        return e.builder.op(op_type, e.operand(a, dtype), right)

    return emit


def _unary(op_type: str) -> Emit:
    def emit(e: Emission, node: fx.Node, x: Operand) -> ir.Value:
        return e.builder.op(op_type, e.operand(x, dtype_of(node)))

    return emit


def _compare(op_type: str) -> Emit:
    def emit(e: Emission, node: fx.Node, a: Operand, b: Operand) -> ir.Value:
        dtype = onnx_dtype(promoted(*node.args[:2]))
        return e.builder.op(op_type, e.operand(a, dtype), e.operand(b, dtype), dtype=BOOL)

    return emit


def _fill(make: Callable[[str], Emit], table: dict[str, tuple[Any, ...]]) -> None:
    for op_type, targets in table.items():
        EMITTERS.update(dict.fromkeys(targets, make(op_type)))


_fill(_binary, _BINARY)
_fill(_unary, _UNARY)
_fill(_compare, _COMPARE)


@emits(aten.ne.Tensor, aten.ne.Scalar)
def emit_not_equal(e: Emission, node: fx.Node, a: Operand, b: Operand) -> ir.Value:
    """Emit `a != b`."""
    equal = _compare("Equal")(e, node, a, b)
    assert isinstance(equal, ir.Value)
    return e.builder.op("Not", equal)


@emits(aten.rsub.Scalar, aten.rsub.Tensor)
def emit_rsub(e: Emission, node: fx.Node, a: Operand, b: Operand) -> ir.Value:
    """Emit `b - a`."""
    dtype = dtype_of(node)
    return e.builder.op("Sub", e.operand(b, dtype), e.operand(a, dtype))


@emits(aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor)
def emit_pow(e: Emission, node: fx.Node, a: Operand, b: Operand) -> ir.Value:
    """Emit a power; a square is a product, which is exact and quick."""
    dtype = dtype_of(node)
    x = e.operand(a, dtype)
    return e.builder.op("Mul", x, x) if b == 2 else e.builder.op("Pow", x, e.operand(b, dtype))


@emits(aten.square.default)
def emit_square(e: Emission, node: fx.Node, x: Operand) -> ir.Value:
    """Emit `x * x`."""
    value = e.operand(x, dtype_of(node))
    return e.builder.op("Mul", value, value)


@emits(aten.expm1.default)
def emit_expm1(e: Emission, node: fx.Node, x: Operand) -> ir.Value:
    """Emit `exp(x) - 1`."""
    dtype = dtype_of(node)
    return e.builder.op("Sub", e.builder.op("Exp", e.operand(x, dtype)), e.operand(1.0, dtype))


@emits(aten.clamp.default, aten.clamp_min.default)
def emit_clamp(
    e: Emission, node: fx.Node, x: Operand, low: Operand | None = None, high: Operand | None = None
) -> ir.Value:
    """Emit `x` held between two numbers, either of which may be missing."""
    dtype = dtype_of(node)
    value = e.operand(x, dtype)
    for op_type, bound in (("Max", low), ("Min", high)):
        if bound is not None:
            value = e.builder.op(op_type, value, e.operand(bound, dtype))
    return value


@emits(aten.rsqrt.default)
def emit_rsqrt(e: Emission, node: fx.Node, x: Operand) -> ir.Value:
    """Emit `1 / sqrt(x)`."""
    root = e.builder.op("Sqrt", e.operand(x, dtype_of(node)))
    return e.builder.op("Reciprocal", root)


@emits(aten.silu.default)
def emit_silu(e: Emission, node: fx.Node, x: ir.Value) -> ir.Value:
    """Emit `x * sigmoid(x)`."""
    return e.builder.op("Mul", x, e.builder.op("Sigmoid", x))


@emits(aten.gelu.default)
def emit_gelu(e: Emission, node: fx.Node, x: ir.Value, *, approximate: str = "none") -> ir.Value:
    """Emit GELU, exact or by tanh; the operator is of opset 20."""
    if e.form.opset >= GELU_OPSET:
        return e.builder.op("Gelu", x, approximate=approximate)
    b, dtype = e.builder, dtype_of(node)

    def scaled(value: ir.Value, factor: float) -> ir.Value:
        return b.op("Mul", value, b.const(factor, dtype))

    if approximate == "tanh":
        cube = b.op("Mul", b.op("Mul", x, x), x)
        inner = scaled(b.op("Add", x, scaled(cube, 0.044715)), math.sqrt(2 / math.pi))
        step = b.op("Tanh", inner)
    else:
        step = b.op("Erf", scaled(x, math.sqrt(0.5)))
    return b.op("Mul", scaled(x, 0.5), b.op("Add", step, b.const(1.0, dtype)))


@emits(aten.where.self)
def emit_where(e: Emission, node: fx.Node, mask: ir.Value, a: Operand, b: Operand) -> ir.Value:
    """Emit a choice between two tensors."""
    dtype = dtype_of(node)
    return e.builder.op("Where", mask, e.operand(a, dtype), e.operand(b, dtype), dtype=dtype)


@emits(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def emit_masked_fill(
    e: Emission, node: fx.Node, x: ir.Value, mask: ir.Value, fill: Operand
) -> ir.Value:
    """Emit `x` with `fill` where the mask is true."""
    return e.builder.op("Where", mask, e.operand(fill, dtype_of(node)), x, dtype=x.dtype)


def _logical(op_type: str) -> Emit:
    def emit(e: Emission, node: fx.Node, a: Operand, b: Operand) -> ir.Value:
        return e.builder.op(op_type, e.operand(a, BOOL), e.operand(b, BOOL))

    return emit


_fill(_logical, {"And": (aten.logical_and.default,), "Or": (aten.logical_or.default,)})


def _is_boolean(node: fx.Node) -> bool:
    return type_of(node).dtype is torch.bool


def _bitwise(op_type: str) -> Emit:
    def emit(e: Emission, node: fx.Node, *operands: Operand) -> ir.Value:
        return e.builder.op(op_type, *(e.operand(x, BOOL) for x in operands))

    return emit


for _op_type, _target in (
    ("And", aten.bitwise_and.Tensor),
    ("Or", aten.bitwise_or.Tensor),
    ("Not", aten.bitwise_not.default),
):
    emits(_target, when=_is_boolean)(_bitwise(_op_type))


def _reduction(op_type: str) -> Emit:
    def emit(
        e: Emission,
        node: fx.Node,
        x: Operand,
        dim: Sequence[int] | None = None,
        keepdim: bool = False,
        *,
        dtype: torch.dtype | None = None,
    ) -> ir.Value:
        axes = e.builder.const(list(dim)) if dim else None
        value = e.operand(x, dtype_of(node))
        return e.builder.op(op_type, value, axes, keepdims=int(keepdim))

    return emit


_fill(
    _reduction,
    {
        "ReduceMean": (aten.mean.dim, aten.mean.default),
        "ReduceSum": (aten.sum.dim_IntList, aten.sum.default),
        "ReduceMax": (aten.amax.default,),
        "ReduceMin": (aten.amin.default,),
    },
)


@emits(aten.cumsum.default)
def emit_cumsum(
    e: Emission, node: fx.Node, x: ir.Value, dim: int, *, dtype: torch.dtype | None = None
) -> ir.Value:
    """Emit a running sum."""
    return e.builder.op("CumSum", e.operand(x, dtype_of(node)), e.builder.const(dim))


@emits(aten.softmax.int, aten._softmax.default)
def emit_softmax(
    e: Emission, node: fx.Node, x: ir.Value, dim: int, last: object = None
) -> ir.Value:
    """Emit a softmax, computed in the dtype of the result."""
    axis = dim % rank_of(node)
    return e.builder.op("Softmax", e.operand(x, dtype_of(node)), axis=axis)
