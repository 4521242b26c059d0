"""How heads are made: one linear layer, perhaps a norm, the split into heads, perhaps RoPE.

A path can be read off a graph, and written anew for another number of heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

import kvxform.ir.ops as kvx
from kvxform.ir.linear import ADDMM, LINEAR, PRODUCTS, RESHAPES, SIZE, LinearCall, as_linear
from kvxform.ir.program import AttentionSite, Program, Projection
from kvxform.ir.types import SymType, TensorType
from kvxform.pass_base import Rewriter
from kvxform.structure.replay import replay

aten = torch.ops.aten
LAYER_NORM = aten.layer_norm.default
_NORM_WEIGHTS: dict[Any, tuple[int, ...]] = {
    kvx.RMS_NORM: (1,),
    LAYER_NORM: (2, 3),
}  # which arguments are gain and bias
_ONE = {"B": 1, "S": 1}


@dataclass(frozen=True)
class HeadPath:
    """How the heads of one operand of attention are made.

    Attributes:
        linear: The linear layer.
        rows: Its outputs that are the channels of each head, int64 `[heads, D]`.
        norm: Name of the norm between it and the attention, or None.
        is_wide: Whether that norm runs over all heads together, rather than over each alone.
        rope: Name of the RoPE after that, or None.
        is_alone: Whether nothing but this operand reads the linear layer, and all of it.
    """

    linear: LinearCall
    rows: Tensor
    norm: str | None = None
    is_wide: bool = False
    rope: str | None = None
    is_alone: bool = True


@dataclass(frozen=True)
class HeadWeights:
    """Weights that make heads: keys among the weights of a program.

    Attributes:
        weight: Matrix `[heads * D, in]`.
        bias: `[heads * D]`, or None.
        norm: Gain and bias of a norm over all heads, `[heads * D]`, as far as there are any.
    """

    weight: str
    bias: str | None = None
    norm: tuple[str, ...] = ()


def read_path(program: Program, operand: fx.Node, heads: int) -> HeadPath | str:
    """Return how an operand `[B, heads, S, D]` of attention is made, or why that is not known."""
    rope, node = None, operand
    if node.target is kvx.ROPE:
        rope, node = node.name, _source(node)
    chain = _back_to_linear(node)
    linear = as_linear(chain[-1], _source(chain[-1])) if chain else None
    norms = [n for n in chain if n.target in _NORM_WEIGHTS]
    if linear is None or len(norms) > 1:
        return "more than a plain linear layer and one norm makes the heads"
    try:
        rows = replay(chain[::-1], program.weights, _ONE, skipped=_NORM_WEIGHTS)
    except (
        TypeError,
        ValueError,
        RuntimeError,
        NotImplementedError,
    ):  # of a call on channel numbers
        return "something other than views stands between the linear layer and the heads"
    dim = int(operand.meta["type"].shape[-1])
    is_index = isinstance(rows, Tensor) and rows.dtype == torch.int64
    if not is_index or rows.numel() != heads * dim:
        return "heads are not plain channels of the linear layer"
    is_alone = all(len(_readers(n)) == 1 for n in chain[1:])
    is_whole = rows.numel() == chain[-1].meta["type"].shape[-1]
    norm = norms[0] if norms else None
    return HeadPath(
        linear,
        rows.reshape(heads, dim),
        norm.name if norm is not None else None,
        norm is not None and norm.meta["type"].shape[-1] != dim,
        rope,
        is_alone and is_whole,
    )


def _back_to_linear(node: fx.Node) -> list[fx.Node]:
    """Return the calls from `node` back to the first product, or nothing if there is none."""
    chain = [node]
    while chain[-1].target not in (LINEAR, ADDMM, *PRODUCTS):
        source = chain[-1].args[0] if chain[-1].op == "call_function" else None
        if not isinstance(source, fx.Node):
            return []
        chain.append(source)
    return chain


def has_own_gains(program: Program, path: HeadPath) -> bool:
    """Whether a norm has gains of another form than one for all heads, or one for each channel."""
    weights = norm_weights(program, path)
    width = path.rows.numel() if path.is_wide else path.rows.shape[1]
    return any(program.weights[name].numel() != width for name in weights)


def norm_weights(program: Program, path: HeadPath) -> tuple[str, ...]:
    """Return the keys of gain and bias of the norm of a path, as far as it has any."""
    if path.norm is None:
        return ()
    (norm,) = (n for n in program.graph.nodes if n.name == path.norm)
    found = [norm.args[place] for place in _weight_places(norm)]
    return tuple(str(value.target) for value in found if isinstance(value, fx.Node))


def _weight_places(norm: fx.Node) -> list[int]:
    """Return which arguments of a norm are its gain and its bias, as far as there are any."""
    places = _NORM_WEIGHTS[norm.target]
    found = [place for place in places if place < len(norm.args)]
    return [place for place in found if isinstance(norm.args[place], fx.Node)]


def linear_rows(program: Program, path: HeadPath) -> tuple[Tensor, Tensor | None]:
    """Return the rows `[heads, D, in]` and the bias `[heads, D, 1]` of a path."""
    weight = program.weights[path.linear.weight]
    rows = path.rows.to(weight.device)
    matrix = weight if path.linear.layout == "out_in" else weight.T
    bias = path.linear.bias
    own = None if bias is None else program.weights[bias][rows][..., None]
    return matrix[rows.flatten()].unflatten(0, rows.shape), own


def output_rows(program: Program, site: AttentionSite) -> Tensor:
    """Return what W_o makes of the channels of each query head, `[H, D, out]`."""
    assert site.o is not None, "a pass has looked"
    weight = program.weights[site.o.weight]
    matrix = weight.T if site.o.layout == "out_in" else weight
    index = site.o.indices(site.num_q_heads, site.v_head_dim).to(weight.device)
    rows: Tensor = matrix[index.flatten()].unflatten(0, index.shape)
    return rows


def own_names(path: HeadPath, stream: str) -> tuple[str, str]:
    """Return names for weight and bias of new heads: the old ones where nothing else needs them."""
    stem = path.linear.weight.removesuffix(".weight")
    if not path.is_alone:
        return f"{stem}.{stream}.weight", f"{stem}.{stream}.bias"
    return path.linear.weight, path.linear.bias or f"{stem}.bias"


def write_path(
    rewriter: Rewriter, before: fx.Node, path: HeadPath, made: HeadWeights, heads: int
) -> fx.Node:
    """Write a path anew for `heads` heads and return its end, `[B, heads, S, D]`.

    Args:
        rewriter: Has set the weights of `made`.
        before: Where nodes are written.
        path: How the old heads are made.
        made: Weights of the new ones.
        heads: How many they are.
    """
    old = rewriter.node(path.linear.node)
    source = _without_views(_source(old))
    dtype, dim = old.meta["type"].dtype, path.rows.shape[1]
    keys = filter(None, (made.weight, made.bias))
    operands = [_weight(rewriter, before, key) for key in keys]
    lead = tuple(source.meta["type"].shape[:-1])
    flat = TensorType(dtype, (*lead, heads * dim))
    node = rewriter.call_before(before, LINEAR, (source, *operands), type_=flat, like=old)
    if path.is_wide:
        node = _norm(rewriter, before, path, node, made.norm)
    sizes = size_nodes(rewriter, before)
    apart = TensorType(dtype, ("B", "S", heads, dim))
    args = (node, [*sizes, heads, dim])
    node = rewriter.call_before(before, aten.reshape.default, args, type_=apart)
    if path.norm is not None and not path.is_wide:
        node = _norm(rewriter, before, path, node, ())
    moved = TensorType(node.meta["type"].dtype, ("B", heads, "S", dim))
    node = rewriter.call_before(before, aten.transpose.int, (node, 1, 2), type_=moved)
    if path.rope is None:
        return node
    rope = rewriter.node(path.rope)
    turned = (node, *rope.args[1:])
    return rewriter.call_before(before, kvx.ROPE, turned, rope.kwargs, type_=moved, like=rope)


def projection_of(path: HeadPath, made: HeadWeights) -> Projection | None:
    """Return the projection of heads that `write_path` has written; None behind a norm."""
    if path.norm is not None:
        return None
    return Projection(made.weight, made.bias, "out_in", 0, path.rows.shape[1])


def _norm(
    rewriter: Rewriter, before: fx.Node, path: HeadPath, x: fx.Node, weights: Sequence[str]
) -> fx.Node:
    """Write the norm of a path on `x`; with `weights` instead of its own if there are any."""
    assert path.norm is not None, "the caller has looked"
    old, type_ = rewriter.node(path.norm), x.meta["type"]
    args: list[Any] = [x, *old.args[1:]]
    for place, key in zip(_weight_places(old), weights, strict=False):
        args[place] = _weight(rewriter, before, key)
    if old.target is LAYER_NORM:
        args[1] = [type_.shape[-1]]
    assert callable(old.target), "it is a call"
    return rewriter.call_before(before, old.target, tuple(args), old.kwargs, type_=type_, like=old)


def _weight(rewriter: Rewriter, before: fx.Node, key: str) -> fx.Node:
    weight = rewriter.program.weights[key]
    return rewriter.get_weight_node(key, before, TensorType(weight.dtype, tuple(weight.shape)))


def size_nodes(rewriter: Rewriter, before: fx.Node) -> list[fx.Node]:
    """Return nodes for batch and new tokens."""
    ids = rewriter.program.placeholder("input_ids")
    return [
        rewriter.call_before(before, SIZE, (ids, axis), type_=SymType(name))
        for axis, name in enumerate(("B", "S"))
    ]


def _without_views(node: fx.Node) -> fx.Node:
    """Return `[B, S, n]` where `node` is a flat view of it, or `node`."""
    while node.target in RESHAPES:
        source = _source(node)
        same = source.meta["type"].shape[-1] == node.meta["type"].shape[-1]
        if not same or len(source.meta["type"].shape) != 3:
            break
        node = source
    return node


def _source(node: fx.Node) -> fx.Node:
    """Return the node whose values a call carries on."""
    source = node.args[1 if node.target is ADDMM else 0]
    assert isinstance(source, fx.Node), "a call reads a node"
    return source


def _readers(node: fx.Node) -> list[fx.Node]:
    return [user for user in node.users if user.target is not SIZE]
