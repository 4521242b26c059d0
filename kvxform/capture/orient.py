"""Turn attention that is written with keys in the rows into attention with queries in the rows.

`softmax(k q^T, -2)` is the transpose of `softmax(q k^T, -1)`, and `v^T w` that of `w^T v`. All
rewrites here are identities of linear algebra; what they make of the graph is proved elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from kvxform.capture.emitting import insert
from kvxform.capture.structure import op_name, shape_of, tensor_type

aten = torch.ops.aten
PRODUCTS = frozenset({"matmul", "bmm"})
_MOVES = frozenset({"transpose", "permute", "t", "swapaxes", "swapdims", "numpy_T"})
# Ops that act on every entry alone, so that a transposition may be done before them.
_ENTRYWISE = frozenset(
    {
        *("mul", "add", "sub", "div", "neg", "tanh", "where", "masked_fill", "to", "_to_copy"),
        *("type_as", "dropout", "clone", "contiguous"),
    }
)


def orient(graph: fx.Graph, content: set[fx.Node]) -> None:
    """Rewrite softmaxes over axis -2 and products with transposed squares, in place."""
    for node in list(graph.nodes):
        if node in content and op_name(node) in ("softmax", "_softmax") and _is_square(node):
            _turn_softmax(node)
    merge_moves(graph)
    for node in list(graph.nodes):
        if node in content and op_name(node) in PRODUCTS:
            _turn_product(node)
    merge_moves(graph)
    for node in list(graph.nodes):
        source = _swapped_source(node)
        if source is not None and _is_square(node) and _leads_to_product(source, content):
            node.replace_all_uses_with(_transposed(source, node, content))
    merge_moves(graph)


def merge_moves(graph: fx.Graph) -> None:
    """Join permutations that follow one another, and drop those that change nothing."""
    for node in list(graph.nodes):
        order = axis_order(node)
        source = node.args[0] if order else None
        if not isinstance(source, fx.Node) or order is None:
            continue
        before = axis_order(source)
        if before is not None:
            order = [before[i] for i in order]
            assert isinstance(source.args[0], fx.Node)
            source = source.args[0]
        if order == sorted(order):
            node.replace_all_uses_with(source)
        elif before is not None:
            moved = insert(node, aten.permute.default, (source, order), shape_of(node))
            node.replace_all_uses_with(moved)


def axis_order(node: fx.Node) -> list[int] | None:
    """Return the permutation that a node does, or None if it does something else."""
    type_ = tensor_type(node)
    if op_name(node) not in _MOVES or type_ is None:
        return None
    rank = len(type_.shape)
    order = list(range(rank))
    if op_name(node) == "permute":
        given = node.args[1]
        assert isinstance(given, Sequence)
        return [int(i) % rank for i in given]  # type: ignore[arg-type]
    if op_name(node) in ("t", "numpy_T"):
        return order[::-1]
    a, b = (int(i) % rank for i in node.args[1:3])  # type: ignore[arg-type]
    order[a], order[b] = order[b], order[a]
    return order


def _is_square(node: fx.Node) -> bool:
    type_ = tensor_type(node)
    return type_ is not None and type_.shape[-2:] == ("S", "S")


def _swap(node: fx.Node, before: fx.Node) -> fx.Node:
    shape = shape_of(node)
    new = (*shape[:-2], shape[-1], shape[-2])
    return insert(before, aten.transpose.int, (node, -1, -2), new)


def _swapped_source(node: fx.Node) -> fx.Node | None:
    """Return what a node is the transpose of, or None if it is not a transpose of the last axes."""
    order = axis_order(node)
    if order is None or len(order) < 2:
        return None
    last = len(order) - 1
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source if order == [*range(last - 1), last, last - 1] else None


def _turn_softmax(node: fx.Node) -> None:
    """Replace a softmax over axis -2 by one over the last axis."""
    x, axis = node.args[:2]
    if axis not in (-2, len(shape_of(node)) - 2):
        return
    assert isinstance(x, fx.Node)
    assert callable(node.target)
    turned = _swap(x, node)
    new = insert(node, node.target, (turned, -1, *node.args[2:]), shape_of(turned))
    new.kwargs = dict(node.kwargs)
    new.meta = {**node.meta}
    node.replace_all_uses_with(_swap(new, node))


def _turn_product(node: fx.Node) -> None:
    """Replace `a w^T`, for a square w, by `(w a^T)^T`."""
    a, b = node.args[:2]
    assert isinstance(a, fx.Node)
    assert isinstance(b, fx.Node)
    square = _swapped_source(b)
    if square is None or not _is_square(b) or _is_square(a):
        return
    node.replace_all_uses_with(_swap(_multiply(node, square, _swap(a, node)), node))


def _multiply(like: fx.Node, a: fx.Node, b: fx.Node) -> fx.Node:
    assert callable(like.target)
    shape = (*shape_of(like)[:-2], shape_of(a)[-2], shape_of(b)[-1])
    return insert(like, like.target, (a, b), shape)


def _leads_to_product(node: fx.Node, content: set[fx.Node]) -> bool:
    """Return whether a square is made from one product by entrywise ops."""
    while op_name(node) in _ENTRYWISE:
        inputs = [n for n in node.all_input_nodes if n in content]
        if len(inputs) != 1:
            return False
        node = inputs[0]
    return op_name(node) in PRODUCTS


def _transposed(node: fx.Node, before: fx.Node, content: set[fx.Node]) -> fx.Node:
    """Return the transpose of `node`, with the transposition moved up to the operands."""
    if node in content and op_name(node) in PRODUCTS:
        a, b = node.args[:2]
        assert isinstance(a, fx.Node)
        assert isinstance(b, fx.Node)
        return _multiply_at(before, node, _swap(b, before), _swap(a, before))
    type_ = tensor_type(node)
    if type_ is None or not type_.shape:
        return node
    if len(type_.shape) == 1:
        return insert(before, aten.unsqueeze.default, (node, -1), (*type_.shape, 1))
    if node not in content or op_name(node) not in _ENTRYWISE:
        return _swap(node, before)
    assert callable(node.target)
    args = fx.node.map_arg(node.args, lambda n: _transposed(n, before, content))
    shape = type_.shape
    new = insert(before, node.target, args, (*shape[:-2], shape[-1], shape[-2]))
    new.kwargs = dict(node.kwargs)
    new.meta = {**node.meta, "type": type_.__class__(type_.dtype, shape_of(new))}
    return new


def _multiply_at(before: fx.Node, like: fx.Node, a: fx.Node, b: fx.Node) -> fx.Node:
    assert callable(like.target)
    shape = (*shape_of(like)[:-2], shape_of(a)[-2], shape_of(b)[-1])
    new = insert(before, like.target, (a, b), shape)
    new.meta = {**like.meta, "type": new.meta["type"]}
    return new
