"""insert-cache: stateless attention becomes an append to a cache and an attention to the cache.

Legal for causal attention without an additive bias, at the positions that the program was given.
All attentions of a program are rewritten, or none: beside cached ones, a stateless one would see
only the new tokens of a decode step. A layer that reads keys and values of an earlier one appends
nothing and reads the cache of that layer, its owner.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import fx

import kvxform.ir.ops as kvx
from kvxform.codecs.basis import Basis
from kvxform.codecs.exact import ExactCodec
from kvxform.ir.facts import FactValue
from kvxform.ir.plan import CachePlan, SitePlan
from kvxform.ir.program import AttentionSite, Program, RejectedSite
from kvxform.ir.scoring import Scoring
from kvxform.ir.stream_plan import KeyView, Regions, StreamPlan
from kvxform.ir.types import TensorType
from kvxform.pass_base import EXACT, GraphPass, Match, NoMatch, Numerics, Rewriter, register_pass

CARRIED = ("layer", *(option.name for option in dataclasses.fields(Scoring)))
HANDLE = TensorType(torch.int64, ())
_TO = torch.ops.aten.to.dtype


@register_pass
@dataclass(frozen=True)
class InsertCache(GraphPass):
    """Cache the keys and values of every attention, unencoded, in the dtype of the model.

    `softmax_dtype` is not carried over: the cached op computes its softmax in the dtype of q or
    wider, so the two differ by rounding only.
    """

    numerics: ClassVar[Numerics] = EXACT
    source: ClassVar[str] = "Vaswani et al., arXiv 1706.03762, section 3.1: causal decoding"

    def ensures(self) -> Mapping[str, FactValue]:
        """State that there is a cache, one row after the other."""
        return {"cache.inserted": True, "cache.layout": "contiguous"}

    def match(self, program: Program) -> list[Match | NoMatch]:
        """Match every stateless attention, or none if one of them cannot be cached."""
        found = [_check(program, node) for node in program.calls(*kvx.ATTENTION_OPS)]
        blocked = [f.reason for f in found if isinstance(f, NoMatch) and not f.done]
        raw = [_left_alone(site) for site in program.rejected]
        if not blocked and not raw:
            return found
        because = "all layers are cached or none"
        left: list[Match | NoMatch] = [
            NoMatch(because, f.layer, f.node) if isinstance(f, Match) else f for f in found
        ]
        hints = [site.hint for site in program.rejected]
        return [*left, *(NoMatch(r, hint=h) for r, h in zip(raw, hints, strict=True))]

    def rewrite(self, program: Program, match: Match, rewriter: Rewriter) -> None:
        """Replace one attention, and add its site to the plan."""
        assert match.layer is not None, "every match is at a site"
        site = program.site(match.layer)
        node = rewriter.node(match.node)
        q, k, v, positions = node.args
        assert isinstance(q, fx.Node), "operands of attention are nodes"
        assert isinstance(k, fx.Node)
        assert isinstance(v, fx.Node)
        if not program.is_cached:
            rewriter.placeholder("cache", HANDLE)
        kept = {name: node.kwargs[name] for name in CARRIED if name in node.kwargs}
        if site.payload == "k" and k is not v:  # values are what goes into RoPE
            kept |= {"inv_freq": k.args[2], **k.kwargs}
            k = v
        append = program.append_node(site.owner)
        if append is None:  # of an owner; readers come later in the graph
            k, v = (_cast(rewriter, node, x, program.dtype) for x in (k, v))
            append = rewriter.call_before(
                node,
                kvx.CACHE_APPEND,
                (k, v if site.payload == "kv" else None, program.placeholder("cache")),
                {"layer": site.layer},
                type_=HANDLE,
            )
        type_ = node.meta["type"]
        wide = torch.promote_types(q.meta["type"].dtype, type_.dtype)
        cached = rewriter.call_before(
            node,
            kvx.CACHED_ATTENTION,
            (_cast(rewriter, node, q, wide), append, positions),
            {**kept, "v_head_dim": site.v_head_dim},
            type_=TensorType(wide, type_.shape),
        )
        rewriter.replace(node, _cast(rewriter, node, cached, type_.dtype))
        present = program.plan.sites if program.plan else ()
        rewriter.set_plan(CachePlan((*present, _plan(site, program))))


def _cast(rewriter: Rewriter, before: fx.Node, x: fx.Node, dtype: torch.dtype) -> fx.Node:
    """Return `x` in `dtype`.

    Some models round q and k to float32 whatever their dtype. A cache has one dtype, and what it
    holds is read in the dtype of q.
    """
    type_ = x.meta["type"]
    if type_.dtype == dtype:
        return x
    args = (x, dtype)
    return rewriter.call_before(before, _TO, args, type_=TensorType(dtype, type_.shape))


def _left_alone(site: RejectedSite) -> str:
    if site.kind == "mixer":
        return f"{site.module} keeps a state that is not cached: {site.reason}"
    return f"{site.module} was not raised: {site.reason}"


def _check(program: Program, node: fx.Node) -> Match | NoMatch:
    layer = node.kwargs["layer"]
    assert isinstance(layer, int), "layer is a number in the schema"
    if node.target is kvx.CACHED_ATTENTION:
        return NoMatch("already cached", layer, node.name, done=True)
    if node.kwargs.get("bias") is not None:
        return NoMatch("a bias on the scores cannot follow the cache", layer, node.name)
    if node.kwargs.get("causal") is False:
        hint = "make the attention causal"
        reason = "attention that sees later tokens cannot be cached"
        return NoMatch(reason, layer, node.name, hint=hint)
    if node.args[3] is not program.placeholder("position_ids"):
        hint = "let the rotary embedding and the mask use position_ids"
        return NoMatch("positions are not those given to the model", layer, node.name, hint=hint)
    return Match(layer, node.name)


def _plan(site: AttentionSite, program: Program) -> SitePlan:
    codec = ExactCodec(program.info.dtype)

    is_view = site.payload != "kv"
    turned: Literal["pre", "post"] = "pre" if site.payload == "k" else "post"

    def stream(head_dim: int, basis: Basis, is_key: bool) -> StreamPlan:
        return StreamPlan(
            codec.to_dict(),
            codec.planes(head_dim),
            codec.tokens_per_group,
            head_dim,
            turned if is_key and site.rope is not None else "none",
            basis,
            Regions(dtype=program.info.dtype),
        )

    return SitePlan(
        site.layer,
        site.owner,
        site.num_q_heads,
        site.num_kv_heads,
        stream(site.head_dim, site.k_basis, is_key=True),
        KeyView(site.v_head_dim)
        if is_view
        else stream(site.v_head_dim, site.v_basis, is_key=False),
        site.payload,
    )
