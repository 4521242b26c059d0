"""Emitters of the kvx operations that do not touch the cache: norm, rotary embedding, rotation."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx

import kvxform.ir.ops as kvx
from kvxform.codecs.hadamard import block_hadamard
from kvxform.codegen.onnx.builder import Builder, onnx_dtype
from kvxform.codegen.onnx.emission import Emission, dtype_of, emits, type_of


@emits(kvx.RMS_NORM)
def emit_rms_norm(
    e: Emission,
    node: fx.Node,
    x: ir.Value,
    weight: ir.Value | None,
    eps: float,
    *,
    weight_offset: float = 0.0,
    compute_dtype: torch.dtype | None = None,
) -> ir.Value:
    """Emit RMSNormalization; its statistics are float32, so other dtypes take primitives."""
    b = e.builder
    size = int(type_of(node).shape[-1])
    wide = onnx_dtype(compute_dtype or type_of(node).dtype)
    if weight is not None and weight_offset:
        weight = b.op("Add", weight, e.operand(weight_offset, dtype_of(node)))
    if wide == ir.DataType.FLOAT:
        gain = weight if weight is not None else _ones(b, size, type_of(node).dtype)
        return b.op("RMSNormalization", x, gain, axis=-1, epsilon=eps, role="rms_norm")
    y = b.cast(x, wide)
    mean = b.op("ReduceMean", b.op("Mul", y, y), b.const([-1]), keepdims=1)
    root = b.op("Sqrt", b.op("Add", mean, e.operand(eps, wide)))
    y = b.cast(b.op("Div", y, root), dtype_of(node))
    return y if weight is None else b.op("Mul", y, weight)


@emits(kvx.ROPE)
def emit_rope(
    e: Emission,
    node: fx.Node,
    x: ir.Value,
    positions: ir.Value,
    inv_freq: ir.Value,
    *,
    rotary_dim: int,
    attention_scaling: float = 1.0,
    interleaved: bool = False,
) -> ir.Value:
    """Emit RotaryEmbedding with cosines and sines of the positions, shared by all layers."""
    tables = [
        e.shared(
            (function, positions.name, inv_freq.name, attention_scaling, x.dtype),
            lambda function=function: _table(  # type: ignore[misc]
                e, function, positions, inv_freq, attention_scaling, dtype_of(node)
            ),
        )
        for function in ("Cos", "Sin")
    ]
    return e.builder.op(
        "RotaryEmbedding",
        x,
        *tables,
        role="rope",
        rotary_embedding_dim=rotary_dim,
        interleaved=int(interleaved),
    )


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


def _weight_of(e: Emission, node: Any) -> Tensor | None:
    return e.program.weights[str(node.target)] if isinstance(node, fx.Node) else None


def _ones(b: Builder, size: int, dtype: torch.dtype) -> ir.Value:
    name = f"const/{onnx_dtype(dtype).short_name()}/1.0*[{size}]"
    return b.tensor(name, torch.ones(size, dtype=dtype))


def _table(
    e: Emission,
    function: str,
    positions: ir.Value,
    inv_freq: ir.Value,
    scaling: float,
    dtype: ir.DataType,
) -> ir.Value:
    """Return cosines or sines, `[batch_size, sequence_length, rotary_dim / 2]`."""
    b = e.builder
    assert inv_freq.dtype is not None, "weights have a dtype"
    wide = inv_freq.dtype

    def angles() -> ir.Value:
        column = b.op("Unsqueeze", b.cast(positions, wide), b.const([-1]))
        return b.op("Mul", column, inv_freq)

    table = b.op(function, e.shared(("angles", positions.name, inv_freq.name), angles))
    if scaling != 1.0:
        table = b.op("Mul", table, e.operand(scaling, wide))
    return b.cast(table, dtype)
