"""Emitters of complex numbers: pairs of real numbers, along one more axis that comes last.

Models write rotary embeddings with them where no rule of capture has found `kvx.rope`.
"""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import fx

from kvxform.codegen.onnx.emission import Emission, Operand, emits_complex, is_complex

aten = torch.ops.aten


@emits_complex(aten.view_as_complex.default, aten.view_as_real.default)
def emit_view(e: Emission, node: fx.Node, x: ir.Value) -> ir.Value:
    """Emit nothing: pairs are what complex numbers are stored as."""
    return x


@emits_complex(aten.polar.default)
def emit_polar(e: Emission, node: fx.Node, length: ir.Value, angle: ir.Value) -> ir.Value:
    """Emit numbers of a length and an angle."""
    real, imaginary = (
        e.builder.op("Mul", length, e.builder.op(op, angle)) for op in ("Cos", "Sin")
    )
    axis = e.builder.const([-1])
    return _pairs(e, *(e.builder.op("Unsqueeze", x, axis) for x in (real, imaginary)))


@emits_complex(aten.mul.Tensor)
def emit_mul(e: Emission, node: fx.Node, a: Operand, b: Operand) -> ir.Value:
    """Emit a product of complex numbers, or of a complex and a real one."""
    first, second = (_as_pairs(e, x, own) for x, own in zip((a, b), node.args[:2], strict=True))
    if not all(is_complex(x) for x in node.args[:2]):
        return e.builder.op("Mul", first, second)
    (a_re, a_im), (b_re, b_im) = (
        [e.slice(x, i, i + 1, axis=-1) for i in range(2)] for x in (first, second)
    )
    multiply = e.builder.op
    real = multiply("Sub", multiply("Mul", a_re, b_re), multiply("Mul", a_im, b_im))
    imaginary = multiply("Add", multiply("Mul", a_re, b_im), multiply("Mul", a_im, b_re))
    return _pairs(e, real, imaginary)


@emits_complex(aten.unsqueeze.default)
def emit_unsqueeze(e: Emission, node: fx.Node, x: ir.Value, dim: int) -> ir.Value:
    """Emit a new axis of size one, before that of the pairs."""
    return e.builder.op("Unsqueeze", x, e.builder.const([dim if dim >= 0 else dim - 1]))


def _as_pairs(e: Emission, x: Operand, source: object) -> ir.Value:
    """Return an operand that broadcasts against pairs."""
    value = e.operand(x, ir.DataType.FLOAT) if not isinstance(x, ir.Value) else x
    if is_complex(source) or not isinstance(x, ir.Value):
        return value
    return e.builder.op("Unsqueeze", value, e.builder.const([-1]))


def _pairs(e: Emission, real: ir.Value, imaginary: ir.Value) -> ir.Value:
    return e.builder.op("Concat", real, imaginary, axis=-1)
