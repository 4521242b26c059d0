"""The graph of latent attention, in the form in which capture writes it (`ir.latent`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

import kvxform.ir.ops as kvx
from kvxform.ir.latent import CAT, EXPAND
from kvxform.ir.linear import LINEAR, SIZE
from kvxform.ir.program import AttentionSite, LatentSpec, Projection, RopeSpec
from kvxform.ir.types import SymType, TensorType, ValueType
from kvxform.pass_base import Rewriter
from kvxform.structure.latent_maps import LatentMaps, Mixing

VIEW = torch.ops.aten.view.default
TRANSPOSE = torch.ops.aten.transpose.int
MATMUL = torch.ops.aten.matmul.default


class LatentWriter:
    """Writes one site anew, right before its attention.

    Args:
        rewriter: Changes the program.
        site: With plain projections of K and V from `source`, and RoPE on whole heads of q and k.
        source: What K and V are projected from, `[B, S, in]`.
        mixing: What makes the shared part of keys.
        maps: What makes the latent.
    """

    def __init__(
        self,
        rewriter: Rewriter,
        site: AttentionSite,
        source: fx.Node,
        mixing: Mixing,
        maps: LatentMaps,
    ) -> None:
        self._rewriter, self._site, self._source = rewriter, site, source
        self._mixing, self._maps = mixing, maps
        self._node = rewriter.program.attention_node(site.layer)
        self._prefix = f"to_latent.{site.layer}"

    def write(self) -> None:
        """Replace q, k and v of the attention, and record the latent."""
        site, maps, mixing = self._site, self._maps, self._mixing
        rank, rope_dim = len(maps.down_k), len(mixing.shared)
        latent = self._linear(self._source, "down", *self._projected(maps.down_k, maps.down_v))
        shared = self._linear(self._source, "shared", *self._projected(mixing.shared, None))
        turned = self._rope(self._heads(shared, 1, rope_dim), rope_dim)
        heads = site.num_kv_heads
        own = self._heads(self._linear(latent, "up_k", maps.up_k), heads, site.head_dim)
        v = self._heads(self._linear(latent, "up_v", maps.up_v), heads, site.v_head_dim)
        spread = self._call(EXPAND, (turned, [-1, heads, -1, -1]), ("B", heads, "S", rope_dim))
        k = self._join(own, spread, heads)
        q = self._queries(rope_dim)
        self._rewriter.set_args(self._node, (q, k, v, *self._node.args[3:]))
        up_k, up_v = (
            Projection(f"{self._prefix}.{name}.weight", head_stride=width)
            for name, width in (("up_k", site.head_dim), ("up_v", site.v_head_dim))
        )
        assert site.rope is not None, "match has looked"
        rope = RopeSpec(f"{self._prefix}.inv_freq", rope_dim, site.rope.attention_scaling)
        self._rewriter.update_site(
            site.layer,
            head_dim=site.head_dim + rope_dim,
            q=None,
            k=None,
            v=up_v,
            rope=rope,
            latent=LatentSpec(rank, rope_dim, up_k, up_v),
        )

    def _projected(self, on_k: Tensor, on_v: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias of maps after the projections of K and V, `[n, in]` and `[n]`."""
        site, weights = self._site, self._rewriter.program.weights
        assert site.k is not None, "match has looked"
        assert site.v is not None, "match has looked"
        total, bias = None, None
        for matrix, p, width in (
            (on_k, site.k, site.head_dim),
            (on_v, site.v, site.v_head_dim),
        ):
            if matrix is None:
                continue
            rows = p.indices(site.num_kv_heads, width).flatten()
            weight = weights[p.weight] if p.layout == "out_in" else weights[p.weight].T
            own = matrix.to(weight.device) @ weight[rows.to(weight.device)].double()
            total = own if total is None else total + own
            if p.bias is not None:
                held = weights[p.bias]
                part = matrix.to(held.device) @ held[rows.to(held.device)].double()
                bias = part if bias is None else bias + part
        assert total is not None, "keys are always there"
        return total, bias

    def _queries(self, rope_dim: int) -> fx.Node:
        """Return `[q_h | RoPE(q_h E_h)]` of queries before RoPE."""
        site = self._site
        turned = self._node.args[0]
        assert isinstance(turned, fx.Node), "match has looked"
        plain = turned.args[0]
        assert isinstance(plain, fx.Node), "RoPE turns a node"
        by_head = self._mixing.shared.T.unflatten(0, (site.num_kv_heads, site.head_dim))
        stack = by_head.repeat_interleave(site.num_q_heads // site.num_kv_heads, 0)
        weight = self._weight("queries", stack)
        shape = ("B", site.num_q_heads, "S", rope_dim)
        mixed = self._call(MATMUL, (plain, weight), shape)
        return self._join(plain, self._rope(mixed, rope_dim), site.num_q_heads)

    def _rope(self, x: fx.Node, rope_dim: int) -> fx.Node:
        assert self._site.rope is not None, "match has looked"
        inv_freq = self._weight("inv_freq", self._mixing.inv_freq, like=self._site.rope.inv_freq)
        options: dict[str, Any] = {"rotary_dim": rope_dim}
        if self._site.rope.attention_scaling != 1.0:
            options["attention_scaling"] = self._site.rope.attention_scaling
        positions = self._node.args[3]
        type_ = x.meta["type"]
        return self._rewriter.call_before(
            self._node, kvx.ROPE, (x, positions, inv_freq), options, type_=type_
        )

    def _join(self, own: fx.Node, shared: fx.Node, heads: int) -> fx.Node:
        width = sum(x.meta["type"].shape[-1] for x in (own, shared))
        return self._call(CAT, ([own, shared], -1), ("B", heads, "S", width))

    def _linear(self, x: fx.Node, name: str, weight: Tensor, bias: Tensor | None = None) -> fx.Node:
        operands = [self._weight(f"{name}.weight", weight)]
        if bias is not None:
            operands.append(self._weight(f"{name}.bias", bias))
        return self._call(LINEAR, (x, *operands), ("B", "S", len(weight)))

    def _heads(self, x: fx.Node, heads: int, width: int) -> fx.Node:
        """Return `[B, S, heads * width]` as `[B, heads, S, width]`."""
        sizes = [
            self._rewriter.call_before(self._node, SIZE, (x, axis), type_=SymType("BS"[axis]))
            for axis in (0, 1)
        ]
        split = self._call(VIEW, (x, [*sizes, heads, width]), ("B", "S", heads, width))
        return self._call(TRANSPOSE, (split, 1, 2), ("B", heads, "S", width))

    def _call(self, target: Any, args: tuple[Any, ...], shape: tuple[int | str, ...]) -> fx.Node:
        type_: ValueType = TensorType(self._node.meta["type"].dtype, shape)
        return self._rewriter.call_before(self._node, target, args, type_=type_)

    def _weight(self, name: str, value: Tensor, like: str | None = None) -> fx.Node:
        """Return a node of a weight of this site; it is made when it is first asked for."""
        key, weights = f"{self._prefix}.{name}", self._rewriter.program.weights
        if key not in weights:
            assert self._site.k is not None, "match has looked"
            model = weights[like or self._site.k.weight]
            self._rewriter.set_weight(key, value.to(model).contiguous())
        held = weights[key]
        type_ = TensorType(held.dtype, tuple(held.shape))
        return self._rewriter.get_weight_node(key, self._node, type_)
