"""Emit products with packed matrices, and reads of packed tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir
from torch import fx

from kvxform.codegen.onnx.forms import MICROSOFT
from kvxform.codegen.onnx.nbits import BLOCK, Packing
from kvxform.codegen.onnx.weights import is_flip

if TYPE_CHECKING:
    from kvxform.codegen.onnx.emission import Emission

INT8_ACTIVATIONS = 4  # accuracy level: x is quantised in blocks, for the integer kernels of the CPU


def emit_product(e: Emission, source: object, x: ir.Value) -> ir.Value | None:
    """Emit `x W^T`, or `x W` of a turned weight; None if the weight is not packed.

    Args:
        e: The emission.
        source: What gives the weight in the graph.
        x: `[..., K]`.
    """
    name, packing = _packing(e, source)
    if packing is None:
        return None
    n, k = packing.sizes(e.program.weights[name])
    return e.builder.op(
        "MatMulNBits",
        x,
        *_parts(e, name, packing),
        domain=MICROSOFT,
        K=k,
        N=n,
        bits=packing.bits,
        block_size=BLOCK,
        accuracy_level=INT8_ACTIVATIONS if e.form.provider == "cpu" else 0,
    )


def emit_rows(e: Emission, source: object, indices: ir.Value) -> ir.Value | None:
    """Emit rows of a table; None if it is not packed.

    ONNX Runtime reshapes the codes once, when it loads them.
    """
    name, packing = _packing(e, source)
    if packing is None:
        return None
    codes, scale, zero = _parts(e, name, packing)
    n, k = packing.sizes(e.program.weights[name])
    rows = e.builder.op("Reshape", codes, e.builder.const([n, k * packing.bits // 8]), role="table")
    return e.builder.op(
        "GatherBlockQuantized",
        rows,
        indices,
        scale,
        zero,
        dtype=scale.dtype,
        domain=MICROSOFT,
        gather_axis=0,
        quantize_axis=1,
        block_size=BLOCK,
        bits=packing.bits,
    )


def _packing(e: Emission, source: object) -> tuple[str, Packing | None]:
    """Return the name of the weight that a node gives, flipped or not, and how it is packed."""
    if isinstance(source, fx.Node) and is_flip(source):
        source = source.args[0]
    if not isinstance(source, fx.Node) or source.op != "get_attr":
        return "", None
    return str(source.target), e.weights.packing(str(source.target))


def _parts(e: Emission, name: str, packing: Packing) -> list[ir.Value]:
    tensors = e.weights.packer.parts(e.weights.name(name), e.program.weights[name], packing)
    return [e.builder.stored(tensor) for tensor in tensors]
