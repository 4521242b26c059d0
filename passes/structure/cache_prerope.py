"""cache-prerope: keys are cached before RoPE, and turned when they are read.

RoPE depends on the position alone, and a cache knows the position of every token it holds. So the
append takes the keys that RoPE would have turned, and attention turns what it reads: the same keys
at the same scores. Before RoPE the channels of keys keep their means and their correlations, which
codecs can use; the price is one RoPE over the whole cache in every step.

Legal where what is cached comes right out of RoPE at the positions of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import fx

import kvxform.ir.ops as kvx
from kvxform.ir.facts import FactValue, Requirement
from kvxform.ir.program import AttentionSite, Program
from kvxform.pass_base import EXACT, GraphPass, Match, NoMatch, Numerics, Rewriter, register_pass

ROPE_OPTIONS = ("rotary_dim", "attention_scaling", "interleaved")


@register_pass
@dataclass(frozen=True)
class CachePrerope(GraphPass):
    """Append keys before RoPE, and let every attention that reads them apply it."""

    numerics: ClassVar[Numerics] = EXACT
    requires: ClassVar[tuple[Requirement, ...]] = (
        Requirement("cache.inserted", (True,), because="there would be no cached keys yet"),
        Requirement("k.codec", ("none",), because="codes of turned keys cannot be turned back"),
        Requirement("k.basis", ("identity",), because="RoPE would turn keys in another basis"),
    )
    source: ClassVar[str] = "KVQuant, arXiv 2401.18079, section 3.2"

    def ensures(self) -> Mapping[str, FactValue]:
        """State that keys are stored before RoPE."""
        return {"k.rope": "pre"}

    def match(self, program: Program) -> list[Match | NoMatch]:
        """Match every site with RoPE, or none if one of them keeps keys that are turned."""
        found = [_check(program, site) for site in program.sites]
        blocked = any(isinstance(f, NoMatch) and not f.done for f in found)
        if not blocked:
            return found
        because = "all layers cache keys before RoPE or none"
        return [NoMatch(because, f.layer, f.node) if isinstance(f, Match) else f for f in found]

    def rewrite(self, program: Program, match: Match, rewriter: Rewriter) -> None:
        """Append what goes into RoPE, and move RoPE to the attention of every reader."""
        assert match.layer is not None, "every match is at a site"
        rope, append = rewriter.node(match.node), program.append_node(match.layer)
        assert append is not None, "match found it"
        options: dict[str, Any] = {
            name: rope.kwargs[name] for name in ROPE_OPTIONS if name in rope.kwargs
        }
        for reader in program.readers(match.layer):
            attention = program.attention_node(reader.layer)
            rewriter.set_args(attention, inv_freq=rope.args[2], **options)
            assert program.plan is not None, "there is a cache"
            key = replace(program.plan.site(reader.layer).key, rope="pre")
            rewriter.update_site_plan(reader.layer, key=key)
        rewriter.set_args(append, (rope.args[0], *append.args[1:]))


def _check(program: Program, site: AttentionSite) -> Match | NoMatch:
    if site.shared_with is not None:
        return NoMatch(f"keys are those of layer {site.owner}", site.layer, done=True)
    if site.payload == "latent":
        hint = "leave out cache-prerope, or cache-latent"
        return NoMatch("RoPE turns only a part of a latent", site.layer, hint=hint)
    if site.rope is None:
        return NoMatch("there is no RoPE", site.layer, done=True)
    assert program.plan is not None, "it has a cache"
    if program.plan.site(site.layer).key.rope == "pre":
        return NoMatch("keys are already cached before RoPE", site.layer, done=True)
    append = program.append_node(site.layer)
    assert append is not None, "an owner appends"
    keys = append.args[0]
    assert isinstance(keys, fx.Node), "operands of an append are nodes"
    if keys.target is not kvx.ROPE:
        hint = "leave nothing between RoPE and the cache"
        return NoMatch("keys are changed after RoPE", site.layer, keys.name, hint=hint)
    if keys.args[1] is not program.placeholder("position_ids"):
        reason = "positions are not those given to the model"
        return NoMatch(reason, site.layer, keys.name)
    return Match(site.layer, keys.name)
