"""Bring operands of attention into the form `[B, heads, S, channels]`, and results back.

Source code keeps heads in one axis or in several, joined with the batch, or before it; operands
may lack axes or have size 1 there and broadcast. The axes before the matrices of the product say
what they are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from kvxform.capture.emitting import insert
from kvxform.capture.probing import Prober
from kvxform.capture.refusal import NotRaisedError
from kvxform.capture.structure import shape_of
from kvxform.capture.weights import size_node

aten = torch.ops.aten
_FOLDED = re.compile(r"^(?:(\d+)\*)?B$")  # batch, or batch and heads in one axis
Sizes = Sequence[int | str]


def with_heads(prober: Prober, node: fx.Node, lead: Sizes, before: fx.Node) -> fx.Node:
    """Return an operand as `[B, heads, S, channels]`; one head if it has no head axis.

    Args:
        prober: Of the graph.
        node: Operand, last axes `S` and channels.
        lead: Axes of the product before its last two.
        before: Where new nodes are written.

    Raises:
        NotRaisedError: If the axes are not those of batch and heads.
    """
    shape = shape_of(node)
    if len(shape) == 4 and shape[0] == "B" and shape[2] == "S":
        return node
    first = None if len(shape) > len(lead) + 2 or shape[-2] != "S" else find_batch(lead)
    if first is None:
        reason = f"an operand has the shape {list(shape)} instead of [B, heads, S, D]"
        raise NotRaisedError(reason, node=node)
    node = _expanded(prober, node, lead, before)
    shape = shape_of(node)
    order = [first, *(i for i in range(len(shape)) if i != first)]
    if first:
        moved = tuple(shape[i] for i in order)
        node = _insert(prober, before, aten.permute.default, (node, order), moved)
    new = ("B", num_heads(lead), "S", shape[-1])
    return _insert(prober, before, aten.reshape.default, (node, _sizes(node, new)), new)


def find_batch(lead: Sizes) -> int | None:
    """Return the only axis with the batch, or None if there is no such axis or an unknown one."""
    found = [i for i, n in enumerate(lead) if _FOLDED.match(str(n))]
    known = all(isinstance(n, int) for i, n in enumerate(lead) if i not in found)
    return found[0] if len(found) == 1 and known else None


def num_heads(lead: Sizes) -> int:
    """Return the product of all sizes but the batch."""
    factors = (_FOLDED.match(n) if isinstance(n, str) else None for n in lead)
    folded = math.prod(int(found[1] or 1) for found in factors if found)
    return folded * math.prod(n for n in lead if isinstance(n, int))


def _expanded(prober: Prober, node: fx.Node, lead: Sizes, before: fx.Node) -> fx.Node:
    """Return an operand with all axes of `lead`."""
    shape = shape_of(node)
    while len(shape) < len(lead) + 2:
        shape = (1, *shape)
        node = _insert(prober, before, aten.unsqueeze.default, (node, 0), shape)
    full = (*lead, *shape[-2:])
    if shape == full:
        return node
    if any(have not in (want, 1) for have, want in zip(shape, full, strict=True)):
        raise NotRaisedError(f"an operand has the shape {list(shape)}, not {list(full)}", node=node)
    wanted = _sizes(node, full)
    sizes = [-1 if n == m else size for n, m, size in zip(shape, full, wanted, strict=True)]
    return _insert(prober, before, aten.expand.default, (node, sizes), full)


def like_source(old: fx.Node, new: fx.Node) -> fx.Node:
    """Return `new` `[B, heads, S, channels]` in the shape of `old`, before which it is written."""
    shape = shape_of(old)
    if shape == shape_of(new):
        return new
    first = find_batch(shape[:-2])
    if not first:
        return insert(old, aten.reshape.default, (new, _sizes(old, shape)), shape)
    order = [first, *(i for i in range(len(shape)) if i != first)]
    moved = tuple(shape[i] for i in order)
    new = insert(old, aten.reshape.default, (new, _sizes(old, moved)), moved)
    back = [order.index(i) for i in range(len(shape))]
    return insert(old, aten.permute.default, (new, back), shape)


def _sizes(node: fx.Node, shape: Sizes) -> list[Any]:
    """Return a shape as arguments; one size may be none of B, S and a number."""
    symbols = {"B": size_node(node.graph, 0), "S": size_node(node.graph, 1)}
    return [n if isinstance(n, int) else symbols.get(n, -1) for n in shape]


def _insert(
    prober: Prober, before: fx.Node, target: Any, args: tuple[Any, ...], shape: tuple[Any, ...]
) -> fx.Node:
    node = insert(before, target, args, shape)
    prober.content.add(node)
    return node
