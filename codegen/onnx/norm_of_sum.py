"""A residual sum and the RMS norm of it as one operator, where contrib operators may be used.

In a decode step both are launches that move a few kilobytes; together they are one.
"""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import fx

from kvxform.codegen.onnx.emission import Emission, type_of
from kvxform.codegen.onnx.forms import MICROSOFT

LEVELS = ("L3", "L4")


def emit_norm_of_sum(e: Emission, node: fx.Node, gain: ir.Value, eps: float) -> ir.Value | None:
    """Emit an RMS norm with the sum before it; None where `node` is not the norm of a sum.

    The sum is a second result. Whatever reads it later reads that one, so that the Add goes away
    unless something has read it before.

    Args:
        e: The emission.
        node: The norm.
        gain: `[C]`.
        eps: Added to the mean square.
    """
    add = node.args[0]
    assert isinstance(add, fx.Node), "a norm has an operand"
    if e.form.level not in LEVELS or not _is_sum_of_rows(add) or not _is_emitted_sum(e, add):
        return None
    operands = [e.values[x] for x in add.all_input_nodes]
    y, total = e.builder.ops(
        "SkipSimplifiedLayerNormalization",
        *(x for x in operands if isinstance(x, ir.Value)),
        gain,
        dtypes=[gain.dtype, None, None, gain.dtype],
        role="add_rms_norm",
        domain=MICROSOFT,
        epsilon=eps,
    )[::3]
    e.values[add] = total
    return y


def _is_emitted_sum(e: Emission, add: fx.Node) -> bool:
    """Whether the value of an addition is still all of its rows, and not those of last tokens."""
    found = e.values[add]
    made_by = found.producer() if isinstance(found, ir.Value) else None
    return made_by is not None and made_by.op_type == "Add"


def _is_sum_of_rows(node: fx.Node) -> bool:
    """Whether a node adds two values `[B, S, C]` of one dtype, neither of them a weight."""
    if node.target is not torch.ops.aten.add.Tensor or node.kwargs or len(node.args) != 2:
        return False
    if any(not isinstance(x, fx.Node) or x.op == "get_attr" for x in node.args):
        return False
    types = {type_of(x) for x in (node, *node.all_input_nodes)}
    return len(types) == 1 and len(node.all_input_nodes) == 2 and len(type_of(node).shape) == 3
