"""Write FlexAttention out: scores, `score_mod`, `mask_mod`, softmax, product with values.

The functions that a FlexAttention call carries are graphs over one score and its four indices.
Written on all scores at once, with the indices as ranges, they are ordinary broadcasting code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from kvxform.capture.structure import op_name, shape_of, tensor_type
from kvxform.capture.weights import size_node
from kvxform.errors import CaptureError
from kvxform.ir.types import TensorType

aten = torch.ops.aten
Shape = tuple[int | str, ...]


def expand_flex(
    graph: fx.Graph,
    arguments: Sequence[Any],
    meta: dict[str, Any],
    constant: Callable[[str, Tensor], fx.Node],
) -> fx.Node:
    """Append the nodes of one FlexAttention call and return its output `[B, H, S, Dv]`.

    Args:
        graph: Graph to append to.
        arguments: Arguments of the call; nodes are those of `graph`.
        meta: Meta of new nodes, but for their types.
        constant: Adds a weight of a given name.

    Raises:
        CaptureError: KVX302 if one of its functions does more than arithmetic on numbers.
    """
    q, k, v, score_mod, block_mask, scale, _, score_buffers, mask_buffers = arguments
    writer = _Writer(graph, meta, constant)
    (batch, heads, *_), groups = shape_of(q), int(shape_of(q)[1]) // int(shape_of(k)[1])
    k, v = (writer.repeat(x, groups) for x in (k, v))
    scores_type = TensorType(q.meta["type"].dtype, (batch, heads, "S", "S"))
    transposed = writer.call(aten.transpose.int, (k, -1, -2), _swapped(k))
    scores = writer.call(aten.matmul.default, (q, transposed), scores_type)
    scores = writer.call(aten.mul.Tensor, (scores, scale), scores_type)
    sizes = (size_node(graph, 0), heads, size_node(graph, 1), size_node(graph, 1))
    indices = [writer.range(n, axis, shape_of(scores)[axis]) for axis, n in enumerate(sizes)]
    scores = writer.inline(score_mod, [scores, *indices, *score_buffers])
    seen = writer.inline(block_mask[-1], [*indices, *mask_buffers])
    scores = writer.call(aten.where.ScalarOther, (seen, scores, -math.inf), scores_type)
    weights = writer.call(aten.softmax.int, (scores, -1), scores_type)
    out = TensorType(scores_type.dtype, (*shape_of(q)[:3], shape_of(v)[3]))
    return writer.call(aten.matmul.default, (weights, v), out)


def _swapped(node: fx.Node) -> TensorType:
    type_ = tensor_type(node)
    assert type_ is not None
    return TensorType(type_.dtype, (*type_.shape[:-2], type_.shape[-1], type_.shape[-2]))


class _Writer:
    """Appends nodes with types."""

    def __init__(
        self,
        graph: fx.Graph,
        meta: dict[str, Any],
        constant: Callable[[str, Tensor], fx.Node],
    ) -> None:
        self.graph, self.meta, self.constant = graph, meta, constant

    def call(self, target: Any, args: tuple[Any, ...], type_: TensorType) -> fx.Node:
        node = self.graph.call_function(target, args)
        node.meta = {**self.meta, "type": type_}
        return node

    def repeat(self, x: fx.Node, groups: int) -> fx.Node:
        """Return k or v with every head `groups` times, neighbours being copies."""
        type_ = tensor_type(x)
        assert type_ is not None
        if groups == 1:
            return x
        shape = (type_.shape[0], int(type_.shape[1]) * groups, *type_.shape[2:])
        args = (x, groups, 1)
        return self.call(aten.repeat_interleave.self_int, args, TensorType(type_.dtype, shape))

    def range(self, size: Any, axis: int, name: int | str) -> fx.Node:
        """Return the indices along one of four axes."""
        node = self.call(aten.arange.default, (size,), TensorType(torch.int64, (name,)))
        shape = tuple(name if i == axis else 1 for i in range(4))
        sizes = [size if i == axis else 1 for i in range(4)]
        return self.call(aten.reshape.default, (node, sizes), TensorType(torch.int64, shape))

    def inline(self, inner: fx.GraphModule, inputs: Sequence[Any]) -> fx.Node:
        """Append a function over numbers, applied to tensors that broadcast."""
        given, env = iter(inputs), dict[fx.Node, Any]()
        for node in inner.graph.nodes:
            if node.op == "placeholder":
                env[node] = next(given)
            elif node.op == "get_attr":
                value = getattr(inner, str(node.target), None)
                env[node] = self._constant(node, value) if isinstance(value, Tensor) else value
            elif node.op == "call_function":
                env[node] = self._apply(node, env)
        (output,) = (n for n in inner.graph.nodes if n.op == "output")
        result = output.args[0]
        found = env[result[0] if isinstance(result, tuple | list) else result]
        assert isinstance(found, fx.Node)
        return found

    def _constant(self, node: fx.Node, value: Tensor) -> fx.Node:
        return self.constant(f"flex_{node.target}", value)

    def _apply(self, node: fx.Node, env: dict[fx.Node, Any]) -> fx.Node:
        args: Any = fx.node.map_arg(node.args, lambda n: env[n])
        target, value = node.target, node.meta.get("val")
        if op_name(node) == "flat_apply":  # indexing by tensors, as torch traces it here
            target, args = aten.index.Tensor, (args[2], list(args[3:]))
        is_aten = isinstance(target, torch._ops.OpOverload)
        if not isinstance(value, Tensor) or value.dim() or not is_aten:
            raise CaptureError(
                "KVX302",
                "functions of FlexAttention may only do arithmetic on numbers",
                where="capture",
                got=op_name(node),
            )
        operands = args[1] if target is aten.index.Tensor else args
        shapes = [shape_of(a) for a in operands if isinstance(a, fx.Node)]
        new = self.call(target, args, TensorType(value.dtype, _broadcast(shapes)))
        new.kwargs = fx.node.map_arg(node.kwargs, lambda n: env[n])
        return new


def _broadcast(shapes: Sequence[Shape]) -> Shape:
    """Return the shape of four-axis tensors and numbers that are combined."""
    full = [s for s in shapes if len(s) == 4]
    return tuple(next((n for n in axis if n != 1), 1) for axis in zip(*full, strict=True))
