"""Structure of an aten graph: op names, content, and what a value passes through.

*Content* is what depends on the values of `input_ids`: hidden states, scores, logits. The rest
(masks, positions, rotary tables, sizes) is known once batch, length and positions are known.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from kvxform.ir.types import TensorType

# Ops whose result does not depend on the values of their tensor arguments.
_SHAPE_ONLY = frozenset(
    {
        *("sym_size", "sym_numel", "new_ones", "new_zeros", "new_full", "new_empty"),
        *("zeros_like", "ones_like", "full_like", "empty_like"),
    }
)
# Ops that read only dtype or shape from their second argument.
_FIRST_ONLY = frozenset({"type_as", "expand_as", "view_as"})
# Ops that move, join, copy, scale or add values, and do nothing else.
TRANSPARENT = frozenset(
    {
        *("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze"),
        *("transpose", "permute", "t", "movedim", "swapaxes", "swapdims", "expand", "expand_as"),
        *("repeat", "repeat_interleave", "slice", "select", "index_select", "index", "narrow"),
        *("split", "split_with_sizes", "chunk", "unbind", "getitem", "cat", "stack"),
        *("contiguous", "clone", "to", "_to_copy", "type_as", "slice_scatter", "copy"),
        *("view_as_complex", "view_as_real", "real", "imag", "complex"),
        *("neg", "mul", "add", "sub", "rsub", "div", "addcmul"),
    }
)


def op_name(node: fx.Node) -> str:
    """Return the name of an op without namespace and overload: `view`, `linear`, `getitem`."""
    if node.op != "call_function":
        return ""
    name = getattr(node.target, "_schema", None)
    if name is not None:
        return str(name.name).split("::")[-1]
    return getattr(node.target, "__name__", str(node.target))


def tensor_type(node: fx.Node) -> TensorType | None:
    """Return the tensor type of a node, or None for sizes and tuples."""
    found = node.meta.get("type")
    return found if isinstance(found, TensorType) else None


def shape_of(node: fx.Node) -> tuple[int | str, ...]:
    """Return the shape of a node that is a tensor."""
    type_ = tensor_type(node)
    assert type_ is not None
    return type_.shape


def content_inputs(node: fx.Node, content: set[fx.Node]) -> list[fx.Node]:
    """Return the inputs of a content node whose values it reads and that are content."""
    if op_name(node) in _FIRST_ONLY:
        return [n for n in node.all_input_nodes[:1] if n in content]
    return [n for n in node.all_input_nodes if n in content]


def find_content(graph: fx.Graph, sources: Iterable[fx.Node] | None = None) -> set[fx.Node]:
    """Return the nodes whose values depend on `sources` (default: the placeholder `input_ids`)."""
    if sources is None:
        sources = [n for n in graph.nodes if n.op == "placeholder" and n.target == "input_ids"]
    content = set(sources)
    for node in graph.nodes:
        if reads_content(node, content):
            content.add(node)
    return content


def reads_content(node: fx.Node, content: set[fx.Node]) -> bool:
    """Return whether the value of a node depends on one of its inputs that is content."""
    return op_name(node) not in _SHAPE_ONLY and bool(content_inputs(node, content))


def ancestors(
    outputs: Iterable[fx.Node],
    stop: Container[fx.Node] = (),
    *,
    is_end: Callable[[fx.Node], bool] | None = None,
) -> list[fx.Node]:
    """Return `outputs` and all they are computed from, in graph order.

    The walk does not go past nodes in `stop`, or nodes for which `is_end` holds.
    """
    seen: set[fx.Node] = set()
    stack = list(outputs)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if not (node in stop or (is_end is not None and is_end(node))):
            stack.extend(node.all_input_nodes)
    return sorted(seen)


@dataclass(frozen=True)
class Stop:
    """A node that all content of an operand passes through.

    Attributes:
        node: The node.
        region: Content nodes between it (excluded) and the operand (included), in graph order.
    """

    node: fx.Node
    region: tuple[fx.Node, ...]


def chain_back(
    operand: fx.Node, content: set[fx.Node], is_passed: Callable[[fx.Node], bool]
) -> list[Stop]:
    """Return the nodes that all content of `operand` passes through, nearest first.

    The walk goes back through nodes for which `is_passed` holds and ends at the first that does
    not; that one is in the result if everything passes through it.
    """
    stops: list[Stop] = []
    region: list[fx.Node] = []
    frontier = {operand}
    while frontier:
        node = max(frontier)
        if len(frontier) == 1:
            stops.append(Stop(node, tuple(reversed(region))))
        if not is_passed(node):
            break
        frontier.remove(node)
        region.append(node)
        frontier.update(content_inputs(node, content))
    return stops


def is_transparent(node: fx.Node) -> bool:
    """Return whether a node only moves, joins, scales or adds values."""
    return op_name(node) in TRANSPARENT


def literals(
    nodes: Iterable[fx.Node], kinds: type | tuple[type, ...]
) -> Iterator[tuple[fx.Node, Any]]:
    """Yield `(node, number)` for every number of type `kinds` among the arguments of `nodes`."""
    for node in nodes:
        flat: list[Any] = []
        torch.fx.node.map_aggregate((node.args, node.kwargs), flat.append)
        for value in flat:
            if isinstance(value, kinds) and not isinstance(value, bool):
                yield node, value
