"""Queries and new keys pass through an operation right before they meet.

Every pass that changes the basis of keys after RoPE edits the graph in the same three places: the
query of an attention, the keys that are appended, and in a program without a cache the keys of the
attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

import kvxform.ir.ops as kvx
from kvxform.ir.types import TensorType
from kvxform.pass_base import Rewriter

Turn = Callable[[fx.Node, fx.Node], fx.Node]  # (value, the node that reads it) -> what it reads now


def turn_keys(rewriter: Rewriter, layer: int, query: Turn, key: Turn) -> None:
    """Let q and new k of one site pass through operations of their own.

    Sites are to be given in the order of layers: a site that reads the keys of another layer takes
    over what that layer has by now.

    Args:
        rewriter: Changes the program.
        layer: Layer of the site.
        query: Makes the operation on q.
        key: Makes the operation on k.
    """
    program = rewriter.program
    attention = program.attention_node(layer)
    _turn_argument(rewriter, attention, 0, query)
    owner = program.site(layer).owner
    if program.is_cached:
        append = program.append_node(layer)
        if append is not None:  # readers of another layer's cache append nothing
            _turn_argument(rewriter, append, 0, key)
    elif owner == layer:
        _turn_argument(rewriter, attention, 1, key)
    else:
        q, _, *rest = attention.args
        rewriter.set_args(attention, (q, program.attention_node(owner).args[1], *rest))


def dense_turn(rewriter: Rewriter, name: str, target: Callable[..., Any] = kvx.ROTATE) -> Turn:
    """Return a product with weight `name`.

    Args:
        rewriter: Of the program that has the weight.
        name: Matrices `[Hk, D, D]`, or whatever else `target` takes as its second operand.
        target: `kvx::rotate`, or another operation `(x, weight)` of the shape of `x`.
    """
    operand = rewriter.program.weights[name]

    def turn(value: fx.Node, user: fx.Node) -> fx.Node:
        type_ = TensorType(operand.dtype, tuple(operand.shape))
        weight = rewriter.get_weight_node(name, user, type_)
        kind = value.meta["type"]
        return rewriter.call_before(user, target, (value, weight), type_=kind, like=value)

    return turn


def set_matrices(rewriter: Rewriter, name: str, matrices: Tensor) -> None:
    """Store matrices as a weight, in float32 at least: a rounded rotation is no rotation."""
    program = rewriter.program
    device = next(iter(program.weights.values())).device
    rewriter.set_weight(name, matrices.to(device, matrix_dtype(program.dtype)))


def matrix_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of dense bases of a model that computes in `dtype`."""
    return torch.promote_types(dtype, torch.float32)


def _turn_argument(rewriter: Rewriter, user: fx.Node, index: int, turn: Turn) -> None:
    value = user.args[index]
    assert isinstance(value, fx.Node), "operands of attention are nodes"
    turned = turn(value, user)
    rewriter.set_args(user, (*user.args[:index], turned, *user.args[index + 1 :]))
