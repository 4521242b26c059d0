"""Linear layers of a graph, in whichever aten op they were captured.

`aten.linear(x, W, b)` has its weight as `[out, in]`; `aten.addmm(b, x, W)` (GPT-2 Conv1D),
`aten.mm(x, W)` and `aten.matmul(x, W)` have it as `[in, out]`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

from kvxform.ir.program import Program

LINEAR = torch.ops.aten.linear.default
ADDMM = torch.ops.aten.addmm.default
PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.matmul.default)
SIZE = torch.ops.aten.sym_size.int
RESHAPES = (
    torch.ops.aten.view.default,
    torch.ops.aten.reshape.default,
    torch.ops.aten._unsafe_view.default,
)


@dataclass(frozen=True)
class LinearCall:
    """One linear layer of the graph: `y = x W + b`.

    Attributes:
        node: Name of the call.
        weight: Key of the matrix in `Program.weights`.
        bias: Key of the bias `[out]`, or None.
        layout: `out_in` or `in_out`, as in `Projection`.
    """

    node: str
    weight: str
    bias: str | None
    layout: Literal["out_in", "in_out"]


def as_linear(node: fx.Node, x: fx.Node) -> LinearCall | None:
    """Return `node` as a linear layer with plain weights that reads `x`, or None."""
    if node.target is LINEAR:
        source, weight, bias = (*node.args, None)[:3]
    elif node.target is ADDMM and not node.kwargs:
        bias, source, weight = node.args
    elif node.target in PRODUCTS:
        (source, weight), bias = node.args, None
    else:
        return None
    names = [_weight_name(value) for value in (weight, bias)]
    if source is not x or names[0] is None or (bias is not None and names[1] is None):
        return None
    if _is_stack(weight):
        return None
    layout: Literal["out_in", "in_out"] = "out_in" if node.target is LINEAR else "in_out"
    return LinearCall(node.name, names[0], names[1], layout)


def channel_users(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Yield (value, user) for users of `node`, looking through views that keep the last axis.

    Reads of a size are no use of the values, and left out.
    """
    for user in node.users:
        if user.target is SIZE:
            continue
        if user.target in RESHAPES and _last_size(user) == _last_size(node):
            yield from channel_users(user)
        else:
            yield node, user


def weight_uses(program: Program) -> Counter[str]:
    """Return how many calls read each weight, with reads of tied tensors counted for every name."""
    own: Counter[str] = Counter()
    for node in program.graph.nodes:
        if node.op == "get_attr":
            own[node.target] += len(node.users)
    by_memory: Counter[object] = Counter()
    for name, count in own.items():
        by_memory[_memory(program.weights[name])] += count
    return Counter({name: by_memory[_memory(program.weights[name])] for name in own})


def rename_bias(program: Program, weight: str, bias: str) -> dict[int, dict[str, object]]:
    """Return the site fields, by layer, whose projection through `weight` now has `bias`."""
    changes: dict[int, dict[str, object]] = {}
    for site in program.sites:
        for field in ("q", "k", "v", "o"):
            projection = getattr(site, field)
            if projection is not None and projection.weight == weight:
                new = dataclasses.replace(projection, bias=bias)
                changes.setdefault(site.layer, {})[field] = new
    return changes


def _weight_name(value: object) -> str | None:
    return str(value.target) if isinstance(value, fx.Node) and value.op == "get_attr" else None


def _is_stack(value: object) -> bool:
    """Whether a node is a stack of matrices, one a head, rather than one matrix."""
    return isinstance(value, fx.Node) and len(value.meta["type"].shape) > 2


def _last_size(node: fx.Node) -> int | str:
    size: int | str = node.meta["type"].shape[-1]
    return size


def _memory(tensor: Tensor) -> object:
    """Return what two names of one tensor have in common; meta tensors are told apart by object."""
    return id(tensor) if tensor.is_meta else (tensor.device, tensor.data_ptr())
