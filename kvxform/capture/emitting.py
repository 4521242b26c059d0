"""Write the nodes that a raised attention needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from kvxform.capture.heads import Axes, find_stride, num_features
from kvxform.capture.probing import Prober
from kvxform.capture.structure import shape_of, tensor_type
from kvxform.capture.weights import add_weight, size_node, weight_node
from kvxform.ir.types import TensorType

aten = torch.ops.aten


def insert(
    before: fx.Node,
    target: Callable[..., Any],
    args: tuple[Any, ...],
    shape: tuple[int | str, ...],
    options: dict[str, Any] | None = None,
) -> fx.Node:
    """Insert a call before a node; dtype comes from its first argument, the rest from `before`."""
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, args, options)
    type_ = tensor_type(args[0])
    assert type_ is not None
    node.meta = {**before.meta, "type": TensorType(type_.dtype, shape)}
    return node


def cast(before: fx.Node, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """Return `node` in `dtype`."""
    if node.meta["type"].dtype == dtype:
        return node
    new = insert(before, aten.to.dtype, (node, dtype), shape_of(node))
    new.meta["type"] = TensorType(dtype, shape_of(node))
    return new


class HeadEmitter:
    """Writes the shortest nodes that compute an operand from its anchor."""

    def __init__(self, prober: Prober, before: fx.Node) -> None:
        self.prober = prober
        self.before = before

    def emit(self, anchor: fx.Node, index: Tensor) -> fx.Node:
        """Return a node `[B, heads, S, head_dim]` with the features `index` of `anchor`."""
        heads, head_dim = index.shape
        node, shape = anchor, shape_of(anchor)
        is_plain = torch.equal(index.flatten(), torch.arange(index.numel()))
        if is_plain and shape == ("B", heads, "S", head_dim):
            return anchor
        if not (is_plain and shape == ("B", "S", heads, head_dim)):
            node = self._split_heads(self._flat(anchor), index)
        return self._call(aten.transpose.int, node, 1, 2, shape=("B", heads, "S", head_dim))

    def _flat(self, anchor: fx.Node) -> fx.Node:
        """Return `[B, S, features]`."""
        axes, shape = Axes.of(anchor), shape_of(anchor)
        assert axes is not None
        node, order = anchor, [axes.batch, axes.sequence, *axes.features]
        if order != sorted(order):
            moved = tuple(shape[i] for i in order)
            node = self._call(aten.permute.default, node, order, shape=moved)
        if len(axes.features) == 1:
            return node
        return self._reshape(node, num_features(anchor))

    def _split_heads(self, flat: fx.Node, index: Tensor) -> fx.Node:
        """Return `[B, S, heads, head_dim]`."""
        heads, head_dim = index.shape
        count, stride = int(shape_of(flat)[2]), find_stride(index)
        if stride is None or stride.step < head_dim:
            return self._gather(flat, index)
        inner = stride.start % stride.step
        if count % stride.step == 0 and inner + head_dim <= stride.step:
            node = self._reshape(flat, count // stride.step, stride.step)
            first = stride.start // stride.step
            node = self._slice(node, 2, first, first + heads)
            return self._slice(node, 3, inner, inner + head_dim)
        if stride.step == head_dim:
            part = self._slice(flat, 2, stride.start, stride.start + heads * head_dim)
            return self._reshape(part, heads, head_dim)
        return self._gather(flat, index)

    def _gather(self, flat: fx.Node, index: Tensor) -> fx.Node:
        weights = self.prober.weights
        name = add_weight(weights, "head_index", index.flatten())
        weight = weight_node(flat.graph, name, weights[name])
        shape = ("B", "S", index.numel())
        node = self._call(aten.index_select.default, flat, 2, weight, shape=shape)
        return self._reshape(node, *index.shape)

    def _reshape(self, node: fx.Node, *features: int) -> fx.Node:
        sizes = [size_node(node.graph, 0), size_node(node.graph, 1), *features]
        return self._call(aten.reshape.default, node, sizes, shape=("B", "S", *features))

    def _slice(self, node: fx.Node, axis: int, start: int, stop: int) -> fx.Node:
        shape = list(shape_of(node))
        if (start, stop) == (0, shape[axis]):
            return node
        shape[axis] = stop - start
        return self._call(aten.slice.Tensor, node, axis, start, stop, shape=tuple(shape))

    def _call(
        self, target: Callable[..., Any], *args: Any, shape: tuple[int | str, ...]
    ) -> fx.Node:
        return insert(self.before, target, args, shape)
