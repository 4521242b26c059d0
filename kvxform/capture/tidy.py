"""Remove from an aten graph what says nothing: no-ops, tuples of slices, claims about strides."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from kvxform.capture.structure import op_name, tensor_type

aten = torch.ops.aten
_ALIASES = frozenset({"alias", "detach", "lift_fresh_copy"})
_SAME_TYPE = frozenset({"to", "_to_copy", "type_as", "expand"})  # no-ops if the type stays
_SPLITS = frozenset({"split", "split_with_sizes", "chunk"})
_END = 1 << 31  # slices that end beyond this end where the tensor ends


def tidy(graph: fx.Graph) -> None:
    """Simplify a graph in place; its values stay bit for bit the same."""
    for node in list(graph.nodes):
        source = node.args[0] if node.args else None
        if op_name(node) and isinstance(source, fx.Node) and _is_identity(node, source):
            node.replace_all_uses_with(source)
            graph.erase_node(node)
        elif op_name(node) == "getitem":
            _take_part(node)
        elif node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default  # strides may differ in other implementations
        elif node.target is aten.mT.default:
            node.target, node.args = aten.transpose.int, (source, -2, -1)
    remove_dead(graph)


def remove_dead(graph: fx.Graph) -> None:
    """Erase calls and weights without users."""
    for node in reversed(list(graph.nodes)):
        if node.op in ("call_function", "get_attr") and not node.users:
            graph.erase_node(node)


def _is_identity(node: fx.Node, source: fx.Node) -> bool:
    """Return whether a call returns its first argument unchanged."""
    name = op_name(node)
    if name in _ALIASES:
        return True
    if name == "dropout":
        return node.args[2] is False or bool(node.args[1] == 0)
    if tensor_type(node) != tensor_type(source):
        return False
    return name in _SAME_TYPE or (name == "slice" and _is_whole(node))


def _is_whole(node: fx.Node) -> bool:
    """Return whether a slice takes everything along its axis."""
    given = [*node.args[2:5], None, None, None]
    start, end, step = given[0], given[1], given[2]
    to_end = end is None or (isinstance(end, int) and end >= _END)
    return start in (0, None) and step in (1, None) and to_end


def _take_part(node: fx.Node) -> None:
    """Replace an item of a split, chunk or unbind by a slice or select."""
    whole, index = node.args
    assert isinstance(whole, fx.Node)
    source, name = whole.args[0], op_name(whole)
    if name not in (*_SPLITS, "unbind") or not isinstance(index, int):
        return
    position = 1 if name == "unbind" else 2
    axis = whole.args[position] if len(whole.args) > position else whole.kwargs.get("dim", 0)
    target: Any = aten.select.int
    args: tuple[Any, ...] = (source, axis, index)
    if name in _SPLITS:
        sizes = [item.shape[axis] for item in whole.meta["type"].items]
        if not all(isinstance(size, int) for size in sizes):
            return
        start, stop = sum(sizes[:index]), sum(sizes[: index + 1])
        target, args = aten.slice.Tensor, (source, axis, start, stop)
    with node.graph.inserting_before(node):
        part = node.graph.call_function(target, args)
    part.meta = {**node.meta, "origin": whole.meta["origin"]}
    node.replace_all_uses_with(part)
    node.graph.erase_node(node)
