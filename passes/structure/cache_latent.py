"""cache-latent: cache the vector that keys and values are made from, instead of keys and values.

In latent attention, K_h = [U_h c | e] and V_h = W_h c: c is one narrow latent per token, e a key
part (with RoPE) that all heads share. Both products move away from the cache:

    q_h K_h^T = (a_h U_h) c^T + b_h e^T = [a_h U_h | b_h] [c | e]^T      with q_h = [a_h | b_h]
    P_h V_h   = (P_h c) W_h^T

So one key [c | e] per token serves all heads, its first channels are the value, and U_h and W_h act
on queries and outputs. Legal wherever capture has proved that form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from kvxform.ir.facts import FactValue, Requirement
from kvxform.ir.latent import CAT, SLICE, find_latent, joined_part
from kvxform.ir.program import AttentionSite, LatentSpec, Program, Projection
from kvxform.ir.types import TensorType
from kvxform.pass_base import EXACT, GraphPass, Match, NoMatch, Numerics, Rewriter, register_pass

MATMUL = torch.ops.aten.matmul.default
UNSQUEEZE = torch.ops.aten.unsqueeze.default


@register_pass
@dataclass(frozen=True)
class CacheLatent(GraphPass):
    """Cache one latent and one shared key part per token instead of K and V of every head."""

    numerics: ClassVar[Numerics] = EXACT
    requires: ClassVar[tuple[Requirement, ...]] = (
        Requirement(
            "cache.inserted",
            (False,),
            because="keys and values of every head would already be what is cached",
        ),
        Requirement(
            "norms_fused",
            (False,),
            because="the gain of its norm would be missing from the latent that is cached",
        ),
        Requirement(
            "k.basis", ("identity",), because="keys are rotated as a whole, the latent is not"
        ),
        Requirement("v.basis", ("identity",), because="a rotation of V has no place in a latent"),
    )
    source: ClassVar[str] = "DeepSeek-V2, arXiv 2405.04434, section 2.1 and appendix C"

    def ensures(self) -> Mapping[str, FactValue]:
        """State that latents are cached as such."""
        return {"latent.cached": True}

    def match(self, program: Program) -> list[Match | NoMatch]:
        """Match every site with a latent that nothing else reads."""
        return [_check(program, site) for site in program.sites]

    def rewrite(self, program: Program, match: Match, rewriter: Rewriter) -> None:
        """Move the up-projections to q and to the output, and attend to the latent."""
        assert match.layer is not None, "every match is at a site"
        site = program.site(match.layer)
        spec = site.latent
        assert spec is not None, "match found it"
        node = rewriter.node(match.node)
        key = _latent_key(rewriter, node, spec, match.data)
        query = _absorb_query(rewriter, node, site, spec)
        shape = (*_type(key).shape[:3], spec.rank)
        value = _call(rewriter, node, SLICE, (key, -1, 0, spec.rank), shape)
        _expand_output(rewriter, node, site, spec)
        rewriter.set_args(node, (query, key, value, *node.args[3:]))
        rewriter.update_site(
            site.layer,
            num_kv_heads=1,
            head_dim=spec.rank + spec.rope_dim,
            v_head_dim=spec.rank,
            **dict.fromkeys(("q", "k", "v", "o", "latent")),
            payload="latent",
        )


def _check(program: Program, site: AttentionSite) -> Match | NoMatch:
    node = program.attention_node(site.layer)
    if site.payload == "latent":
        return NoMatch("the latent is already what is cached", site.layer, node.name, done=True)
    if site.latent is None:
        reason = "keys and values of all heads are not made from one narrow vector"
        return NoMatch(reason, site.layer, node.name)
    if any(other.shared_with == site.layer for other in program.sites) or site.owner != site.layer:
        return NoMatch("layers share these keys and values", site.layer, node.name)
    found = find_latent(program, site)
    if isinstance(found, str):
        return NoMatch(found, site.layer, node.name)
    data = {"latent": found.latent.name, "shared": found.shared.name}
    return Match(site.layer, node.name, data)


def _latent_key(
    rewriter: Rewriter, before: fx.Node, spec: LatentSpec, names: Mapping[str, Any]
) -> fx.Node:
    """Return `[c | e]`, `[B, 1, S, rank + rope_dim]`."""
    latent, shared = rewriter.node(names["latent"]), rewriter.node(names["shared"])
    if len(_type(latent).shape) == 3:  # [B, S, rank]
        batch, tokens, rank = _type(latent).shape
        latent = _call(rewriter, before, UNSQUEEZE, (latent, 1), (batch, 1, tokens, rank))
    batch, _, tokens, _ = _type(latent).shape
    shape = (batch, 1, tokens, spec.rank + spec.rope_dim)
    return _call(rewriter, before, CAT, ([latent, shared], -1), shape)


def _absorb_query(
    rewriter: Rewriter, before: fx.Node, site: AttentionSite, spec: LatentSpec
) -> fx.Node:
    """Return `[a U | b]`, `[B, H, S, rank + rope_dim]`."""
    query = before.args[0]
    assert isinstance(query, fx.Node), "operands of attention are nodes"
    own = site.head_dim - spec.rope_dim
    first, shared = (spec.rope_dim, 0) if spec.shared_first else (0, own)
    plain = _slice(rewriter, before, query, first, first + own)
    turned = _slice(rewriter, before, query, shared, shared + spec.rope_dim)
    stack = _stack(rewriter, before, site, spec.up_k, own, "absorbed_k")
    batch, heads, tokens, _ = _type(query).shape
    absorbed = _call(rewriter, before, MATMUL, (plain, stack), (batch, heads, tokens, spec.rank))
    shape = (batch, heads, tokens, spec.rank + spec.rope_dim)
    return _call(rewriter, before, CAT, ([absorbed, turned], -1), shape)


def _expand_output(
    rewriter: Rewriter, node: fx.Node, site: AttentionSite, spec: LatentSpec
) -> None:
    """Let users of the attention read `out W^T`, `[B, H, S, v_head_dim]`."""
    type_ = _type(node)
    node.meta["type"] = TensorType(type_.dtype, (*type_.shape[:3], spec.rank))
    stack = _stack(rewriter, node, site, spec.up_v, site.v_head_dim, "absorbed_v")
    expanded = rewriter.call_after(node, MATMUL, (node, stack), type_=type_)
    node.replace_all_uses_with(expanded, delete_user_cb=lambda user: user is not expanded)


def _stack(
    rewriter: Rewriter, before: fx.Node, site: AttentionSite, up: Projection, width: int, name: str
) -> fx.Node:
    """Return the node of one up-projection as matrices, one for each query head.

    `[H, width, rank]` for queries, `[H, rank, v_head_dim]` for outputs.
    """
    weight = rewriter.program.weights[up.weight]
    rows = weight if up.layout == "out_in" else weight.T
    index = up.indices(site.num_kv_heads, width).to(weight.device)
    stack: Tensor = rows[index.flatten()].unflatten(0, index.shape)  # [Hk, width, rank]
    stack = stack.repeat_interleave(site.num_q_heads // site.num_kv_heads, 0)
    if name == "absorbed_v":
        stack = stack.transpose(1, 2).contiguous()
    key = f"{up.weight.removesuffix('.weight')}.{name}"
    rewriter.set_weight(key, stack, made_from=[up.weight])
    return rewriter.get_weight_node(key, before, TensorType(stack.dtype, tuple(stack.shape)))


def _slice(rewriter: Rewriter, before: fx.Node, x: fx.Node, start: int, stop: int) -> fx.Node:
    """Return channels `start` to `stop` of `x`."""
    part = joined_part(x, start, stop)
    if part is not None:
        return part
    shape = (*_type(x).shape[:3], stop - start)
    return _call(rewriter, before, SLICE, (x, -1, start, stop), shape)


def _call(
    rewriter: Rewriter,
    before: fx.Node,
    target: Any,
    args: tuple[Any, ...],
    shape: tuple[int | str, ...],
) -> fx.Node:
    type_ = TensorType(_type(before).dtype, shape)
    return rewriter.call_before(before, target, args, type_=type_)


def _type(node: fx.Node) -> TensorType:
    found = node.meta["type"]
    assert isinstance(found, TensorType), f"{node.name} is one tensor"
    return found
