"""Passes with one fault at one layer each, as a change of their code could bring it in.

Those named like a pass of kvxform take its place in a test. Bisect copies this file into its repro
folders, so it imports nothing of the tests.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, fx

import kvxform.ir.ops as kvx
from kvxform.ir.program import Program
from kvxform.pass_base import EXACT, GraphPass, Match, NoMatch, Numerics, Rewriter
from kvxform.passes.base.insert_cache import InsertCache as GoodInsertCache
from kvxform.passes.memory.page_cache import PageCache as GoodPageCache
from kvxform.passes.quantize.quantize_kv import QuantizeKv as GoodQuantizeKv
from kvxform.passes.rotation.fuse_norms import FuseNorms as GoodFuseNorms
from kvxform.passes.rotation.rotate_qk import RotateQk as GoodRotateQk
from kvxform.passes.rotation.rotate_v import RotateV as GoodRotateV

LAYERS = (1,)  # where the faults are; tests set it


@dataclass(frozen=True)
class RotateV(GoodRotateV):
    """The rotation of V is not undone in W_o."""

    def rewrite(self, program: Program, match: Match, rewriter: Rewriter) -> None:
        site = program.site(match.layer or 0)
        assert site.o is not None
        kept = program.weights[site.o.weight]
        super().rewrite(program, match, rewriter)
        if match.layer in LAYERS:
            rewriter.set_weight(site.o.weight, kept)


@dataclass(frozen=True)
class SwapHeads(GraphPass):
    """The first two KV heads change places, and W_o does not follow."""

    numerics: ClassVar[Numerics] = EXACT

    def match(self, program: Program) -> list[Match | NoMatch]:
        whole = [site for site in program.sites if site.q and site.k and site.v and site.o]
        done = "swap-heads" in program.passes
        return [
            NoMatch("done", site.layer, done=True) if done else Match(site.layer) for site in whole
        ]

    def rewrite(self, program: Program, match: Match, rewriter: Rewriter) -> None:
        site = program.site(match.layer or 0)
        group = site.num_q_heads // site.num_kv_heads
        for projection, heads, axis in (
            (site.q, group, 0),
            (site.k, 1, 0),
            (site.v, 1, 0),
            (site.o, group, 1),
        ):
            assert projection is not None
            if projection is site.o and match.layer in LAYERS:
                continue
            weight = program.weights[projection.weight]
            swapped = _swap(weight, axis, heads * site.head_dim)
            rewriter.set_weight(projection.weight, swapped)


@dataclass(frozen=True)
class FuseNorms(GoodFuseNorms):
    """The gain of a norm goes into its linear layers twice."""

    def rewrite(self, program: Program, match: Match, rewriter: Rewriter) -> None:
        node = rewriter.node(match.node)
        gain, module = node.args[1], node.meta["module"]
        factor = program.weights[gain.target] if isinstance(gain, fx.Node) else None
        super().rewrite(program, match, rewriter)
        if factor is not None and any(module.startswith(f"layers.{n}.mlp") for n in LAYERS):
            name = match.data["linears"][0].weight
            rewriter.set_weight(name, program.weights[name] * factor)


@dataclass(frozen=True)
class FoldScale(GraphPass):
    """The factor of the scores goes into W_q, and its square root only is taken out."""

    numerics: ClassVar[Numerics] = EXACT

    def match(self, program: Program) -> list[Match | NoMatch]:
        return [
            NoMatch("done", site.layer, done=True) if site.scale == 1.0 else Match(site.layer)
            for site in program.sites
            if site.q is not None
        ]

    def rewrite(self, program: Program, match: Match, rewriter: Rewriter) -> None:
        site = program.site(match.layer or 0)
        assert site.q is not None
        factor = site.scale**0.5 if match.layer in LAYERS else site.scale
        rewriter.set_weight(site.q.weight, program.weights[site.q.weight] * factor)
        rewriter.set_args(program.attention_node(site.layer), scale=1.0)
        rewriter.update_site(site.layer, scale=1.0)


@dataclass(frozen=True)
class RotateQk(GoodRotateQk):
    """Keys are rotated on the wrong side of RoPE."""

    def rewrite(self, program: Program, match: Match, rewriter: Rewriter) -> None:
        super().rewrite(program, match, rewriter)
        if match.layer not in LAYERS:
            return
        attention = program.attention_node(match.layer)
        user = program.append_node(match.layer) or attention
        place = 0 if user is not attention else 1
        turned = user.args[place]
        assert isinstance(turned, fx.Node)
        rope = turned.args[0]
        assert isinstance(rope, fx.Node)
        before = rope.args[0]
        early = rewriter.call_before(
            rope,
            kvx.HADAMARD,
            (before,),
            dict(turned.kwargs),
            type_=rope.meta["type"],
            like=rope,
        )
        rewriter.set_args(rope, (early, *rope.args[1:]))
        rewriter.replace(turned, rope)


@dataclass(frozen=True)
class InsertCache(GoodInsertCache):
    """A sliding window is one token too short."""

    def rewrite(self, program: Program, match: Match, rewriter: Rewriter) -> None:
        super().rewrite(program, match, rewriter)
        window = program.site(match.layer or 0).window
        if match.layer in LAYERS and window is not None:
            rewriter.set_args(program.attention_node(match.layer), window=window - 1)
            rewriter.update_site(match.layer, window=window - 1)


@dataclass(frozen=True)
class PageCache(GoodPageCache):
    """A layer reads the pages of the layer before it."""

    def rewrite(self, program: Program, match: Match, rewriter: Rewriter) -> None:
        super().rewrite(program, match, rewriter)
        present = {site.layer for site in program.sites}
        for layer in LAYERS:
            if {layer - 1, layer} <= present:
                rewriter.update_site_plan(layer, owner=layer - 1)


@dataclass(frozen=True)
class QuantizeKv(GoodQuantizeKv):
    """The scales of keys cover a tenth of their range."""

    def rewrite(self, program: Program, match: Match, rewriter: Rewriter) -> None:
        super().rewrite(program, match, rewriter)
        if match.layer not in LAYERS or program.plan is None:
            return
        key = program.plan.site(match.layer).key
        key = dataclasses.replace(key, codec={**key.codec, "clip": 0.1})
        rewriter.update_site_plan(match.layer, key=key)


@dataclass(frozen=True)
class BreakDown(GraphPass):
    """A pass that raises half way."""

    numerics: ClassVar[Numerics] = EXACT

    def match(self, program: Program) -> list[Match | NoMatch]:
        return [Match(site.layer) for site in program.sites]

    def rewrite(self, program: Program, match: Match, rewriter: Rewriter) -> None:
        node = program.attention_node(match.layer or 0)
        rewriter.set_args(node)
        if match.layer in LAYERS:
            raise ZeroDivisionError("no heads are left")


@dataclass(frozen=True)
class MistypeHeads(GraphPass):
    """The type of a value is not what the operation gives."""

    numerics: ClassVar[Numerics] = EXACT

    def match(self, program: Program) -> list[Match | NoMatch]:
        return [Match(site.layer) for site in program.sites]

    def rewrite(self, program: Program, match: Match, rewriter: Rewriter) -> None:
        node = program.attention_node(match.layer or 0)
        kind = node.meta["type"]
        if match.layer in LAYERS:
            batch, heads, *rest = kind.shape
            kind = dataclasses.replace(kind, shape=(batch, heads + 1, *rest))
        rewriter.set_args(node)
        node.meta["type"] = kind


def _swap(weight: Tensor, axis: int, size: int) -> Tensor:
    """Return a copy whose first two blocks of `size` entries have changed places."""
    first, second = (weight.narrow(axis, start, size) for start in (0, size))
    swapped = weight.clone()
    swapped.narrow(axis, 0, size).copy_(second)
    swapped.narrow(axis, size, size).copy_(first)
    return swapped
