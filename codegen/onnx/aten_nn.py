"""Emitters of aten operations with weights: linear layers, embeddings, norms."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch
from torch import fx

from kvxform.codegen.onnx.emission import Emission, Size, dtype_of, emits, rank_of, type_of
from kvxform.codegen.onnx.packed import emit_product, emit_rows

aten = torch.ops.aten


@emits(aten.linear.default)
def emit_linear(
    e: Emission, node: fx.Node, x: ir.Value, weight: ir.Value, bias: ir.Value | None = None
) -> ir.Value:
    """Emit `x W^T + b`.

    A weight that linear layers read, and at most an embedding besides, is stored transposed, for a
    MatMul. Any other one stays as it is and goes through Gemm, which transposes it.
    """
    source, matrix = node.args[0], node.args[1]
    assert isinstance(source, fx.Node)
    assert isinstance(matrix, fx.Node)
    if matrix.op != "get_attr":
        turned = e.builder.op("Transpose", weight, perm=[1, 0])
        return _add_bias(e, e.builder.op("MatMul", x, turned), bias)
    packed = emit_product(e, matrix, x)
    if packed is not None:
        return _add_bias(e, packed, bias)
    if e.weights.is_transposed(str(matrix.target)):
        return _add_bias(e, e.builder.op("MatMul", x, weight), bias)
    if rank_of(source) == 2:
        return e.builder.op("Gemm", x, weight, bias, transB=1)
    in_features, out_features = type_of(source).shape[-1], type_of(node).shape[-1]
    flat = e.builder.op("Reshape", x, e.builder.const([-1, int(in_features)]))
    y = e.builder.op("Gemm", flat, weight, bias, transB=1)
    lead = [Size(e.dim(x, axis)) for axis in range(rank_of(node) - 1)]
    return e.builder.op("Reshape", y, e.shape([*lead, int(out_features)]))


@emits(aten.addmm.default)
def emit_addmm(
    e: Emission,
    node: fx.Node,
    bias: ir.Value,
    x: ir.Value,
    weight: ir.Value,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> ir.Value:
    """Emit `beta b + alpha x W` of matrices."""
    packed = emit_product(e, node.args[2], x)
    if packed is not None:
        return _add_bias(e, packed, bias)
    return e.builder.op("Gemm", x, weight, bias, alpha=float(alpha), beta=float(beta))


@emits(aten.matmul.default, aten.mm.default, aten.bmm.default)
def emit_matmul(e: Emission, node: fx.Node, a: ir.Value, b: ir.Value) -> ir.Value:
    """Emit a product of matrices, with leading axes that broadcast."""
    packed = emit_product(e, node.args[1], a)
    return e.builder.op("MatMul", a, b) if packed is None else packed


@emits(aten.embedding.default)
def emit_embedding(
    e: Emission, node: fx.Node, weight: ir.Value, indices: ir.Value, *_: object
) -> ir.Value:
    """Emit rows of a table; columns, where it is stored transposed for a linear layer."""
    table = node.args[0]
    packed = emit_rows(e, table, indices)
    if packed is not None:
        return packed
    assert isinstance(table, fx.Node)
    if table.op != "get_attr" or not e.weights.is_transposed(str(table.target)):
        return e.builder.op("Gather", weight, indices, axis=0)
    columns = e.builder.op("Gather", weight, indices, axis=1)
    rank = rank_of(node)
    return e.builder.op("Transpose", columns, perm=[*range(1, rank), 0])


@emits(aten.layer_norm.default)
def emit_layer_norm(
    e: Emission,
    node: fx.Node,
    x: ir.Value,
    shape: Sequence[int],
    weight: ir.Value | None = None,
    bias: ir.Value | None = None,
    eps: float = 1e-5,
    *_: object,
) -> ir.Value:
    """Emit a LayerNormalization over the last axes, always with gain and bias.

    ONNX Runtime 1.31 crashes while it loads one with a constant gain and no bias.
    """
    gain = weight if weight is not None else _filled(e, node, shape, 1.0)
    shift = bias if bias is not None else _filled(e, node, shape, 0.0)
    return e.builder.op("LayerNormalization", x, gain, shift, axis=-len(shape), epsilon=eps)


def _filled(e: Emission, node: fx.Node, shape: Sequence[int], value: float) -> ir.Value:
    tensor = torch.full(tuple(shape), value, dtype=type_of(node).dtype)
    return e.builder.tensor(f"const/{dtype_of(node).short_name()}/{value}*{list(shape)}", tensor)


def _add_bias(e: Emission, y: ir.Value, bias: ir.Value | None) -> ir.Value:
    return y if bias is None else e.builder.op("Add", y, bias)
