"""A program in float64: the same weights and codes, computed so that rounding cannot be seen.

Rounding differs between machines and numbers of threads, and near the boundary of a code it becomes
a whole step of the codec. In float64 a value would have to lie within 1e-14 of a boundary.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import map_aggregate

from kvxform.ir.program import Program
from kvxform.ir.types import TensorType

_WIDE = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex64: torch.complex128,
}


def widen(program: Program) -> Program:
    """Return `program` computed in float64; what its cache stores stays as the plan says."""
    wide = program.clone()
    for node in wide.graph.nodes:
        node.args = map_aggregate(node.args, _wide_operand)
        node.kwargs = map_aggregate(node.kwargs, _wide_operand)
        type_ = node.meta.get("type")
        if isinstance(type_, TensorType):
            dtype = _WIDE.get(type_.dtype, type_.dtype)
            node.meta["type"] = dataclasses.replace(type_, dtype=dtype)
    wide.weights = _wide_weights(program)
    wide.info = dataclasses.replace(program.info, dtype="float64")
    return wide


def _wide_weights(program: Program) -> dict[str, Tensor]:
    """Return the weights in float64 on the CPU; tied ones stay tied."""
    made: dict[int, Tensor] = {}
    for weight in program.weights.values():
        if id(weight) not in made:
            wide = weight.to("cpu", _WIDE.get(weight.dtype, weight.dtype))
            made[id(weight)] = wide if program.store is None else program.store.keep(wide)
    return {name: made[id(weight)] for name, weight in program.weights.items()}


def _wide_operand(value: Any) -> Any:
    """Return an operand of a node; a floating-point dtype is made wide."""
    return _WIDE.get(value, value) if isinstance(value, torch.dtype) else value
