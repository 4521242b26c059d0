"""Write fused products of a graph as the product and what is done to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from kvxform.capture.emitting import insert
from kvxform.capture.structure import shape_of

aten = torch.ops.aten


def decompose(graph: fx.Graph) -> int:
    """Replace every `baddbmm(x, a, b)` by `beta * x + alpha * (a b)`, in place; return how many.

    The product of queries and keys is then a node of its own, and the bias is added to it.
    """
    found = [n for n in graph.nodes if n.target is aten.baddbmm.default]
    for node in found:
        x, a, b = node.args
        product = insert(node, aten.bmm.default, (a, b), shape_of(node))
        scaled = _times(node, product, node.kwargs.get("alpha", 1))
        added = _times(node, x, node.kwargs.get("beta", 1))
        node.replace_all_uses_with(insert(node, aten.add.Tensor, (scaled, added), shape_of(node)))
        graph.erase_node(node)
    return len(found)


def _times(before: fx.Node, x: fx.Node, factor: Any) -> fx.Node:
    """Return `factor * x`, written before a node."""
    return x if factor == 1 else insert(before, aten.mul.Tensor, (x, factor), shape_of(x))
