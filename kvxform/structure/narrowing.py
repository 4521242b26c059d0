"""A fused projection of which only the queries are left: it loses the rows of K and V."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from kvxform.ir.linear import ADDMM, LINEAR, PRODUCTS, RESHAPES, SIZE, weight_uses
from kvxform.ir.program import AttentionSite, Projection
from kvxform.ir.types import SymType, TensorType
from kvxform.pass_base import Rewriter
from kvxform.structure.replay import replay

aten = torch.ops.aten
_SIZES = {"B": 2, "S": 3}  # any two sizes
_VIEWS = (
    *RESHAPES,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.select.int,
    aten.index_select.default,
    aten.transpose.int,
    aten.permute.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    operator.getitem,
)


@dataclass(frozen=True)
class QueryLinear:
    """The linear layer that makes the queries of a site.

    Attributes:
        node: Its call.
        source: What it reads.
        weight: Key of the matrix.
        bias: Key of the bias, or None.
        is_out_first: Whether the outputs are the first axis of the matrix.
    """

    node: fx.Node
    source: fx.Node
    weight: str
    bias: str | None
    is_out_first: bool


def find_query_linear(attention: fx.Node) -> QueryLinear | None:
    """Return the last linear layer before the queries of an attention, or None if there is none."""
    node = attention.args[0]
    while isinstance(node, fx.Node) and node.op == "call_function":
        if node.target in (LINEAR, ADDMM, *PRODUCTS):
            return _as_query_linear(node)
        values = [n for n in node.all_input_nodes if n.op == "call_function" and _is_tensor(n)]
        if len(values) != 1:
            return None
        node = values[0]
    return None


def _as_query_linear(node: fx.Node) -> QueryLinear | None:
    bias = None
    if node.target is LINEAR:
        source, weight, bias = (*node.args, None)[:3]
    elif node.target is ADDMM:
        bias, source, weight = node.args
    else:
        source, weight = node.args
    is_turned = isinstance(weight, fx.Node) and is_transpose(weight)
    if isinstance(weight, fx.Node) and is_turned:
        weight = weight.args[0]
    parts = [part for part in (weight, bias) if part is not None]
    assert isinstance(source, fx.Node), "linear layers read a node"
    if node.kwargs or not all(isinstance(p, fx.Node) and p.op == "get_attr" for p in parts):
        return None
    names = [str(part.target) for part in parts if isinstance(part, fx.Node)]
    is_out_first = (node.target is LINEAR) != is_turned
    return QueryLinear(node, source, names[0], names[1] if bias is not None else None, is_out_first)


def is_transpose(node: fx.Node) -> bool:
    """Whether a node is a matrix with its axes swapped."""
    return node.target is aten.permute.default and node.args[1:] == ([1, 0],)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta["type"], TensorType)


def keep_queries(rewriter: Rewriter, layer: int) -> None:
    """Reduce the linear layer of the queries to the rows that make them, if it has others.

    Call it once nothing reads the keys and values that came out of it, and dead calls are gone. A
    weight that something else reads stays as it is, and so does one whose heads come out in a
    form that is not known.

    Args:
        rewriter: Changes the program.
        layer: Layer of the site.
    """
    program = rewriter.program
    site, linear = program.site(layer), find_query_linear(program.attention_node(layer))
    if linear is None or weight_uses(program)[linear.weight] != 1:
        return
    chain = _views(linear.node)
    heads = _arrangement(chain[-1], site)
    if heads is None:
        return
    device = next(iter(program.weights.values())).device
    rows = replay(chain, program.weights, _SIZES, device=device)
    rows = rows[0, 0] if heads == "tokens" else rows[0, :, 0]  # [H, D]
    if rows.numel() == program.weights[linear.weight].shape[0 if linear.is_out_first else 1]:
        return
    q = _narrowed(rewriter, linear, rows.flatten(), site.head_dim)
    rewriter.replace(chain[-1], _new_heads(rewriter, linear, chain[-1], q, heads))
    if site.q is not None:
        rewriter.update_site(layer, q=q)


def _views(linear: fx.Node) -> list[fx.Node]:
    """Return the linear layer and the views of its output that lead on, one after the other."""
    chain = [linear]
    while True:
        users = [user for user in chain[-1].users if user.target is not SIZE]
        if len(users) != 1 or users[0].target not in _VIEWS or users[0].args[0] is not chain[-1]:
            return chain
        chain.append(users[0])


def _arrangement(node: fx.Node, site: AttentionSite) -> str | None:
    """Return which axis follows the batch in queries `[B, H, S, D]` or `[B, S, H, D]`."""
    type_ = node.meta["type"]
    shape = type_.shape if isinstance(type_, TensorType) else ()
    if shape[2:] == ("S", site.head_dim) and shape[1] == site.num_q_heads:
        return "heads"
    if shape[2:] == (site.num_q_heads, site.head_dim) and shape[1] == "S":
        return "tokens"
    return None


def _narrowed(rewriter: Rewriter, linear: QueryLinear, rows: Tensor, head_dim: int) -> Projection:
    """Make the weights of the queries alone."""
    weights, stem = rewriter.program.weights, f"{linear.weight.removesuffix('.weight')}.q"
    whole = weights[linear.weight]
    rows = rows.to(whole.device)
    weight = whole[rows] if linear.is_out_first else whole.T[rows].contiguous()
    rewriter.set_weight(f"{stem}.weight", weight, made_from=[linear.weight])
    bias = None
    if linear.bias is not None:
        bias = f"{stem}.bias"
        rewriter.set_weight(bias, weights[linear.bias][rows], made_from=[linear.bias])
    return Projection(f"{stem}.weight", bias, "out_in", 0, head_dim)


def _new_heads(
    rewriter: Rewriter, linear: QueryLinear, last: fx.Node, q: Projection, heads: str
) -> fx.Node:
    """Return the queries of the narrow projection, in the form of `last`."""
    program, before, type_ = rewriter.program, linear.node, linear.node.meta["type"]

    def call(target: Any, args: tuple[Any, ...], shape: tuple[int | str, ...]) -> fx.Node:
        return rewriter.call_before(before, target, args, type_=TensorType(type_.dtype, shape))

    operands = [
        rewriter.get_weight_node(key, before, TensorType(weight.dtype, tuple(weight.shape)))
        for key in filter(None, (q.weight, q.bias))
        for weight in [program.weights[key]]
    ]
    ids = program.placeholder("input_ids")
    sizes = [
        rewriter.call_before(before, SIZE, (ids, axis), type_=SymType(name))
        for axis, name in enumerate(("B", "S"))
    ]
    width = len(program.weights[q.weight])
    narrow = call(LINEAR, (linear.source, *operands), (*type_.shape[:-1], width))
    wanted = last.meta["type"].shape
    by_token = wanted if heads == "tokens" else tuple(wanted[axis] for axis in (0, 2, 1, 3))
    split = call(aten.reshape.default, (narrow, [*sizes, *by_token[2:]]), by_token)
    return split if heads == "tokens" else call(aten.transpose.int, (split, 1, 2), wanted)
