"""Nodes for weights and inputs of a graph, and weights that capture itself adds."""

from __future__ import annotations

import itertools
from collections.abc import MutableMapping

import torch
from torch import Tensor, fx

from kvxform.ir.types import SymType, TensorType, ValueType


def add_weight(weights: MutableMapping[str, Tensor], stem: str, value: Tensor) -> str:
    """Add a tensor under the name `stem_<number>` and return the name; equal tensors share one."""
    for number in itertools.count():
        name = f"{stem}_{number}"
        known = weights.setdefault(name, value)
        if known.dtype == value.dtype and torch.equal(known, value):
            return name
    raise AssertionError("counting does not end")


def weight_node(graph: fx.Graph, name: str, value: Tensor) -> fx.Node:
    """Return the `get_attr` node of a weight, made at the top of the graph if there is none."""
    for node in graph.nodes:
        if node.op == "get_attr" and node.target == name:
            assert isinstance(node, fx.Node)
            return node
    with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
        node = graph.create_node("get_attr", name)
    node.meta = new_meta(TensorType(value.dtype, tuple(value.shape)))
    return node


def input_node(graph: fx.Graph, name: str) -> fx.Node:
    """Return the placeholder called `name`."""
    (node,) = (n for n in graph.nodes if n.op == "placeholder" and n.target == name)
    assert isinstance(node, fx.Node)
    return node


def position_ids(graph: fx.Graph) -> fx.Node:
    """Return the placeholder of the positions."""
    return input_node(graph, "position_ids")


def size_node(graph: fx.Graph, axis: int) -> fx.Node:
    """Return the node with the batch (axis 0) or sequence (axis 1) size of `input_ids`."""
    input_ids, target = input_node(graph, "input_ids"), torch.ops.aten.sym_size.int
    for user in input_ids.users:
        if user.target is target and user.args[1] == axis:
            return user
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    with graph.inserting_after(last):
        node = graph.call_function(target, (input_ids, axis))
    node.meta = new_meta(SymType("BS"[axis]), origin="sym_size")
    return node


def new_meta(type_: ValueType, *, origin: str = "") -> dict[str, object]:
    """Return the meta of a node that comes from no place in the source."""
    return {"type": type_, "module": "", "origin": origin, "via": ()}
