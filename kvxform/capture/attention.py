"""Propose attention: SDPA calls, and softmax between two matrix products.

A proposal is normalised to operands `[B, heads, S, channels]` and an additive mask; nothing is
believed yet. `sites` proves it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from kvxform.capture.arranging import with_heads
from kvxform.capture.emitting import insert
from kvxform.capture.masks import Evaluate
from kvxform.capture.probing import Prober, Setting
from kvxform.capture.refusal import NotRaisedError
from kvxform.capture.scores import ScoreFunction
from kvxform.capture.structure import chain_back, op_name, shape_of, tensor_type
from kvxform.ir.rounding import coarsest

aten = torch.ops.aten
_PRODUCTS = frozenset({"matmul", "bmm"})
_BETWEEN = frozenset(
    {
        *("reshape", "unsqueeze", "squeeze", "permute", "transpose", "expand"),
        *("to", "_to_copy", "type_as", "dropout", "contiguous", "clone", "nan_to_num"),
    }
)

_SQUARES = (("S", "S"), ("S", "S + 1"))  # one more column is that of a sink


@dataclass(frozen=True)
class Proposal:
    """One attention as found in the source graph.

    Attributes:
        core: The node that names it: the SDPA call or the softmax.
        out: Node whose value attention replaces.
        q: Queries, node of type `[B, H, S, D]`.
        k: Keys, `[B, H or Hk, S, D]`.
        v: Values, `[B, H or Hk, S, Dv]`.
        scale: Factor of the scores.
        mask: Evaluates the additive mask; None if there is none.
        mask_sources: Nodes that the mask is computed from.
        causal: Whether the op itself masks later tokens.
        softcap: Softcap of the scores, or None.
        sink_logits: Key of the sink logits, or None.
        softmax_dtype: Dtype of the softmax if it is not that of q.
    """

    core: fx.Node
    out: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    scale: float
    mask: Evaluate | None = None
    mask_sources: tuple[fx.Node, ...] = ()
    causal: bool = False
    softcap: float | None = None
    sink_logits: str | None = None
    softmax_dtype: torch.dtype | None = None


def find_cores(graph: fx.Graph, content: set[fx.Node]) -> list[fx.Node]:
    """Return the nodes that may be the heart of an attention, in graph order."""
    return [
        node
        for node in graph.nodes
        if node in content
        and (op_name(node) == "scaled_dot_product_attention" or _is_score_softmax(node))
    ]


def _is_score_softmax(node: fx.Node) -> bool:
    if op_name(node) not in ("softmax", "_softmax"):
        return False
    type_ = tensor_type(node)
    return type_ is not None and type_.shape[-2:] in _SQUARES


def propose(prober: Prober, core: fx.Node) -> Proposal:
    """Return the proposal around `core`.

    Raises:
        NotRaisedError: If the surroundings are not those of an attention.
    """
    if op_name(core) == "scaled_dot_product_attention":
        return _propose_sdpa(prober, core)
    return _propose_softmax(prober, core)


def _propose_sdpa(prober: Prober, core: fx.Node) -> Proposal:
    given = _named_arguments(core)
    q, k, v = given["query"], given["key"], given["value"]
    if given["dropout_p"]:
        raise NotRaisedError("attention dropout is on", hint="call eval() on the model")
    head_dim = shape_of(q)[-1]
    assert isinstance(head_dim, int)
    mask = given["attn_mask"]
    if mask is not None and mask in prober.content:
        raise NotRaisedError(
            "the mask depends on the tokens", node=mask, hint="compute it from positions alone"
        )
    evaluate = None if mask is None else _mask_of_node(prober, mask)
    lead = shape_of(core)[:-2]
    return Proposal(
        core=core,
        out=core,
        q=with_heads(prober, q, lead, core),
        k=with_heads(prober, k, lead, core),
        v=with_heads(prober, v, lead, core),
        scale=given["scale"] if given["scale"] is not None else 1 / math.sqrt(head_dim),
        mask=evaluate,
        mask_sources=() if mask is None else (mask,),
        causal=bool(given["is_causal"]),
    )


def _named_arguments(node: fx.Node) -> dict[str, Any]:
    schema = node.target._schema  # type: ignore[union-attr]
    values = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    values |= {a.name: value for a, value in zip(schema.arguments, node.args, strict=False)}
    return values | dict(node.kwargs)


def _mask_of_node(prober: Prober, mask: fx.Node) -> Evaluate:
    def evaluate(setting: Setting, numbers: dict[int, int]) -> Tensor:
        (value,) = prober.run([mask], setting, numbers=numbers)
        if value.dtype is torch.bool:
            return torch.where(value, 0.0, -math.inf)
        assert isinstance(value, Tensor)
        return value

    return evaluate


def _propose_softmax(prober: Prober, core: fx.Node) -> Proposal:
    scores = core.args[0]
    assert isinstance(scores, fx.Node)
    product = chain_back(scores, prober.content, lambda n: op_name(n) not in _PRODUCTS)[-1]
    if op_name(product.node) not in _PRODUCTS:
        raise NotRaisedError(
            "the softmax is not over a product of queries and keys", node=product.node
        )
    out, v = _product_with_values(core)
    q, k = product.node.args[:2]
    assert isinstance(q, fx.Node)
    assert isinstance(k, fx.Node)
    k_shape = shape_of(k)
    k = insert(core, aten.transpose.int, (k, -1, -2), (*k_shape[:-2], k_shape[-1], k_shape[-2]))
    prober.content.add(k)
    lead = shape_of(product.node)[:-2]
    function = ScoreFunction(prober, product.node, scores)
    measured = function.measure()
    dtype, q_type = core.meta["type"].dtype, tensor_type(q)
    assert q_type is not None
    rounded = scores.meta["type"].dtype
    if coarsest(rounded, q_type.dtype) != q_type.dtype:  # scores are rounded before the softmax
        dtype = rounded
    return Proposal(
        core=core,
        out=out,
        q=with_heads(prober, q, lead, core),
        k=with_heads(prober, k, lead, core),
        v=with_heads(prober, v, shape_of(out)[:-2], out),
        scale=measured.scale,
        mask=function.bias,
        mask_sources=tuple(prober.leaves(product.region)),
        softcap=measured.softcap,
        sink_logits=measured.sink_logits,
        softmax_dtype=None if dtype == q_type.dtype else dtype,
    )


def _product_with_values(core: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Return the product of the attention weights with v, and v."""
    node = core
    while True:
        if len(node.users) != 1:
            raise NotRaisedError(
                "the attention weights are used more than once",
                node=node,
                hint="return no attention weights: output_attentions=False",
            )
        (user,) = node.users
        if op_name(user) in _PRODUCTS and user.args[0] is node:
            v = user.args[1]
            assert isinstance(v, fx.Node)
            return user, v
        if op_name(user) not in _BETWEEN and not _drops_sink(user):
            raise NotRaisedError(f"the attention weights go through {op_name(user)}", node=user)
        node = user


def _drops_sink(node: fx.Node) -> bool:
    """Return whether a slice takes all columns but the last, that of a sink."""
    return (
        op_name(node) == "slice" and node.args[2] in (0, None) and shape_of(node)[-2:] == ("S",) * 2
    )
