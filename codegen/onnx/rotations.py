"""Emitters of the rotations of heads: by Hadamard matrices, and by dense ones."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx

import kvxform.ir.ops as kvx
from kvxform.codecs.hadamard import block_hadamard
from kvxform.codegen.onnx.builder import Builder, onnx_dtype
from kvxform.codegen.onnx.emission import Emission, dtype_of, emits, type_of


@emits(kvx.HADAMARD)
def emit_hadamard(
    e: Emission, node: fx.Node, x: ir.Value, *, block: int, signs: ir.Value | None = None
) -> ir.Value:
    """Emit a MatMul by the constant rotation, shared by all layers; 16-bit values in float32."""
    dim = int(type_of(node).shape[-1])
    signs_name = signs.name if signs is not None else "none"
    matrix = hadamard_matrix_of(dim, block, _weight_of(e, node.kwargs.get("signs")))
    rotation = e.builder.tensor(f"hadamard/dim={dim}/block={block}/signs={signs_name}", matrix)
    wide = e.builder.cast(x, ir.DataType.FLOAT)
    turned = e.builder.op("MatMul", wide, rotation, role="hadamard")
    return e.builder.cast(turned, dtype_of(node))


def hadamard_matrix_of(dim: int, block: int, signs: Tensor | None) -> Tensor:
    """Return R of `x @ R` for `kvx::hadamard`, float32 `[dim, dim]`."""
    eye = torch.eye(dim, dtype=torch.float64)
    return block_hadamard(eye, block, signs).float()


@emits(kvx.ROTATE)
def emit_rotate(e: Emission, node: fx.Node, x: ir.Value, matrix: ir.Value) -> ir.Value:
    """Emit `kvx::rotate` in the wider dtype of the two."""
    source = node.args[1]
    assert isinstance(source, fx.Node), "matrices are weights"
    _, heads, _, width = type_of(node).shape
    wide = onnx_dtype(torch.promote_types(type_of(node).dtype, type_of(source).dtype))
    count, size, _ = type_of(source).shape
    b = e.builder
    sizes = (int(heads), int(width), int(count), int(size))
    turned = rotate_heads(b, b.cast(x, wide), b.cast(matrix, wide), *sizes)
    return b.cast(turned, dtype_of(node))


def rotate_heads(
    b: Builder, x: ir.Value, matrices: ir.Value, heads: int, width: int, count: int, size: int
) -> ir.Value:
    """Emit `x @ R` per head; see `kvxform.codecs.basis.rotate_heads`.

    Args:
        b: Where nodes go.
        x: `[B, heads, S, width]`.
        matrices: `[count, size, size]`, of the dtype of `x`.
        heads: Heads of `x`.
        width: Channels of a head.
        count: Matrices; a divisor of `heads`.
        size: `width`, or `g * width` where one matrix turns `g = heads / count` heads together.
    """
    if size == width and heads == count:
        return b.op("MatMul", x, matrices, role="rotate")
    if size == width:  # heads that share a matrix become rows of it
        rows = b.op("Reshape", x, b.const([0, count, -1, width]))
        turned = b.op("MatMul", rows, matrices, role="rotate")
        return b.op("Reshape", turned, b.const([0, heads, -1, width]))
    group = heads // count
    apart = b.op("Reshape", x, b.const([0, count, group, -1, width]))
    tokens = b.op("Transpose", apart, perm=[0, 1, 3, 2, 4])
    joined = b.op("Reshape", tokens, b.const([0, 0, 0, size]))
    turned = b.op("MatMul", joined, matrices, role="rotate")
    split = b.op("Reshape", turned, b.const([0, 0, 0, group, width]))
    back = b.op("Transpose", split, perm=[0, 1, 3, 2, 4])
    return b.op("Reshape", back, b.const([0, heads, -1, width]))


def _weight_of(e: Emission, node: Any) -> Tensor | None:
    return e.program.weights[str(node.target)] if isinstance(node, fx.Node) else None
