"""RoPE that an attention operator does itself, from cosines and sines of all positions."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import fx

import kvxform.ir.ops as kvx
from kvxform.codegen.onnx.emission import Emission
from kvxform.ir.rotary import rotary_table

TABLE_BYTES = 1 << 28  # larger tables of cosines are not stored: positions are turned in the graph
GRANULE = 16  # the kernels turn channels in runs of so many


@dataclass(frozen=True)
class FusedRope:
    """What the operator is told of RoPE.

    Attributes:
        tables: Cosines and sines, each `[context, rotary_dim / 2]`.
        interleaved: Pairs are neighbours instead of halves.
    """

    tables: tuple[ir.Value, ir.Value]
    interleaved: bool

    @property
    def attributes(self) -> dict[str, int]:
        """Attributes of the operator."""
        return {"do_rotary": 1, "rotary_interleaved": int(self.interleaved)}


def fuse_rope(e: Emission, q: object, k: object) -> FusedRope | None:
    """Return the RoPE of queries and keys, if it is the last that is done to both of them.

    Args:
        e: The emission.
        q: The graph node of the queries.
        k: The graph node of the keys.
    """
    if not isinstance(q, fx.Node) or not isinstance(k, fx.Node) or not _are_alike(e, q, k):
        return None
    context, turned = e.program.info.context_length, int(k.kwargs["rotary_dim"])  # type: ignore[arg-type]
    if context is None or turned % GRANULE:
        return None
    if context * turned * e.program.dtype.itemsize > TABLE_BYTES:
        return None
    return FusedRope(_tables(e, k, context), bool(k.kwargs.get("interleaved", False)))


def before_rope(x: ir.Value) -> ir.Value:
    """Return what was turned, where `fuse_rope` has found something."""
    node = x.producer()
    assert node is not None, "made by kvx::rope"
    assert node.op_type == "RotaryEmbedding", node.op_type
    found = node.inputs[0]
    assert found is not None, "the first input is there"
    return found


def _are_alike(e: Emission, q: fx.Node, k: fx.Node) -> bool:
    if q.target is not kvx.ROPE or k.target is not kvx.ROPE or q.kwargs != k.kwargs:
        return False
    at, (q_freq, k_freq) = e.program.placeholder("position_ids"), (q.args[2], k.args[2])
    assert isinstance(q_freq, fx.Node), "frequencies come from the graph"
    assert isinstance(k_freq, fx.Node), "frequencies come from the graph"
    is_weight = k_freq.op == "get_attr" and q_freq.target == k_freq.target
    return is_weight and q.args[1] is at and k.args[1] is at


def _tables(e: Emission, rope: fx.Node, context: int) -> tuple[ir.Value, ir.Value]:
    source = rope.args[2]
    assert isinstance(source, fx.Node), "checked"
    name = e.weights.name(str(source.target))
    inv_freq = e.program.weights[name]
    scaling = float(rope.kwargs.get("attention_scaling", 1.0))  # type: ignore[arg-type]
    positions = torch.arange(context, device=inv_freq.device)
    tables = rotary_table(positions, inv_freq, scaling, e.program.dtype)
    cos, sin = (
        e.builder.tensor(f"{name}/{kind}/scaling={scaling}/positions={context}", table)
        for kind, table in zip(("cos", "sin"), tables, strict=True)
    )
    return cos, sin
