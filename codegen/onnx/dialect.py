"""Emitters of the kvx operations that work on one token: norm and rotary embedding."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch
from torch import fx

import kvxform.ir.ops as kvx
from kvxform.codegen.onnx.aten_shape import END
from kvxform.codegen.onnx.builder import Builder, onnx_dtype
from kvxform.codegen.onnx.emission import Emission, dtype_of, emits, type_of
from kvxform.codegen.onnx.norm_of_sum import emit_norm_of_sum


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
    if wide == ir.DataType.FLOAT and not e.form.is_primitive:
        gain = weight if weight is not None else _ones(b, size, type_of(node).dtype)
        if (summed := emit_norm_of_sum(e, node, gain, eps)) is not None:
            return summed
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
    tables = rotary_tables(e, positions, inv_freq, attention_scaling, dtype_of(node))
    return turn_pairs(e, x, tables, rotary_dim, interleaved=interleaved)


def turn_pairs(
    e: Emission, x: ir.Value, tables: Sequence[ir.Value], rotary_dim: int, *, interleaved: bool
) -> ir.Value:
    """Emit RoPE of the first `rotary_dim` channels of x `[B, H, S, D]`.

    Args:
        e: The emission.
        x: Vectors.
        tables: Cosines and sines, each `[B, S, rotary_dim / 2]`.
        rotary_dim: Channels that turn; the rest pass through.
        interleaved: Pairs are neighbours instead of halves.
    """
    if e.form.is_primitive:
        return _turned(e, x, tables, rotary_dim, interleaved)
    return e.builder.op(
        "RotaryEmbedding",
        x,
        *tables,
        role="rope",
        rotary_embedding_dim=rotary_dim,
        interleaved=int(interleaved),
    )


def rotary_tables(
    e: Emission, positions: ir.Value, inv_freq: ir.Value, scaling: float, dtype: ir.DataType
) -> tuple[ir.Value, ...]:
    """Return cosines and sines of positions, each `[*positions, rotary_dim / 2]`, made once."""
    return tuple(
        e.shared(
            (function, positions.name, inv_freq.name, scaling, dtype),
            lambda function=function: _table(  # type: ignore[misc]
                e, function, positions, inv_freq, scaling, dtype
            ),
        )
        for function in ("Cos", "Sin")
    )


def _turned(
    e: Emission, x: ir.Value, tables: Sequence[ir.Value], rotary_dim: int, interleaved: bool
) -> ir.Value:
    """Return what `turn_pairs` does from products, sums and differences."""
    b, half = e.builder, rotary_dim // 2
    cos, sin = (b.op("Unsqueeze", table, b.const([1])) for table in tables)
    if interleaved:
        ends, step = b.const([rotary_dim]), b.const([2])
        first, second = (
            b.op("Slice", x, b.const([start]), ends, b.const([3]), step) for start in (0, 1)
        )
    else:
        first, second = e.slice(x, 0, half, 3), e.slice(x, half, rotary_dim, 3)
    left = b.op("Sub", b.op("Mul", first, cos), b.op("Mul", second, sin))
    right = b.op("Add", b.op("Mul", second, cos), b.op("Mul", first, sin))
    if interleaved:
        pairs = [b.op("Unsqueeze", part, b.const([4])) for part in (left, right)]
        joined = b.op("Concat", *pairs, axis=4)
        parts = [b.op("Reshape", joined, b.const([0, 0, 0, rotary_dim]))]
    else:
        parts = [left, right]
    return b.op("Concat", *parts, e.slice(x, rotary_dim, END, 3), axis=3, role="rope")


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
