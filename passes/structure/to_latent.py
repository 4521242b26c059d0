"""to-latent: ordinary attention becomes latent attention, which `cache-latent` can cache as such.

Keys of all heads before RoPE are mixed over heads, frequency by frequency, which commutes with
RoPE. `rope_dim` channels of the mix keep RoPE and are shared by all heads; the others lose it, and
join the values in a latent of `rank` channels. The graph then has the form of DeepSeek's MLA:

    c = down x,  e = RoPE(shared x),  k_h = [up_k_h c | e],  v_h = up_v_h c
    q_h = [q_h | RoPE(q_h E_h)]

A model needs training afterwards. It is exact only if all keys keep RoPE and the latent is as wide
as all values. See `structure.latent_maps` for the algebra.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

import kvxform.ir.ops as kvx
from kvxform.errors import RecipeError
from kvxform.ir.calibration import LayerStatistics
from kvxform.ir.facts import Requirement
from kvxform.ir.linear import as_linear
from kvxform.ir.program import AttentionSite, Program
from kvxform.pass_base import (
    Exactness,
    GraphPass,
    Loss,
    Match,
    NoMatch,
    Numerics,
    Rewriter,
    register_pass,
)
from kvxform.structure.latent_maps import LatentMaps, Mixing, Turning, fit_latent, mix_heads
from kvxform.structure.latent_writer import LatentWriter

REACH = 1024  # longest distance in a dry run, which chooses nothing


@register_pass
@dataclass(frozen=True)
class ToLatent(GraphPass):
    """Make keys and values of all heads from one latent and one shared part with RoPE.

    Attributes:
        rope_dim: Channels of all KV heads that keep RoPE, an even number; None for those of a head.
        rank: Channels of the latent; None for as many as lose nothing but RoPE.
        balance: How much keys without RoPE weigh beside values in the choice of the latent.
    """

    rope_dim: int | None = None
    rank: int | None = None
    balance: float = 1.0
    numerics: ClassVar[Numerics] = Numerics(Exactness.NEEDS_TRAINING, "kl")
    requires: ClassVar[tuple[Requirement, ...]] = (
        Requirement("cache.inserted", (False,), because="K and V would already be what is cached"),
        Requirement("k.basis", ("identity",), because="RoPE commutes with no other basis of keys"),
        Requirement("v.basis", ("identity",), because="the statistics are those of the source"),
    )
    source: ClassVar[str] = "TransMLA, arXiv 2502.07864; MHA2MLA, arXiv 2502.14837"

    def __post_init__(self) -> None:
        """Check the options on their own."""
        rope, rank = self.rope_dim, self.rank
        for is_fine, rule, got in (
            (rope is None or (rope > 0 and rope % 2 == 0), "rope_dim must be even", rope),
            (rank is None or rank > 0, "rank must be a number of channels", rank),
            (self.balance > 0, "balance must be positive", self.balance),
        ):
            if not is_fine:
                raise RecipeError("KVX107", rule, where=self.pass_name(), got=repr(got))

    @property
    def needs_calibration(self) -> bool:
        """Always: mixes and latents are principal components."""
        return True

    def match(self, program: Program) -> list[Match | NoMatch]:
        """Match every site with plain projections and RoPE over whole heads."""
        return [self._check(program, site) for site in program.sites]

    def rewrite(self, program: Program, match: Match, rewriter: Rewriter) -> None:
        """Write keys, values and queries of latent attention before the attention."""
        assert match.layer is not None, "every match is at a site"
        site, data = program.site(match.layer), match.data
        source = rewriter.node(data["source"])
        LatentWriter(rewriter, site, source, data["mixing"], data["maps"]).write()

    def _check(self, program: Program, site: AttentionSite) -> Match | NoMatch:
        layer, node = site.layer, program.attention_node(site.layer)
        if site.latent is not None or site.payload == "latent":
            return NoMatch("keys and values are made from a latent", layer, done=True)
        reason = _reason_against(program, site)
        source = None if reason else _source(program, site)
        if source is None:
            reason = reason or "keys and values are not linear layers of the same values"
            return NoMatch(reason, layer, node.name)
        statistics = program.calibration.layers[layer] if program.calibration else None
        if statistics is not None and (statistics.k_pre is None or statistics.q_pre is None):
            return NoMatch("RoPE turns a part of the keys", layer, node.name)
        mixing, maps = self._maps(program, site, statistics)
        losses = (Loss(layer, "key", maps.key_error), Loss(layer, "value", maps.value_error))
        note = f"{len(mixing.shared)} channels of keys keep RoPE"
        data = {"source": source, "mixing": mixing, "maps": maps}
        return Match(layer, node.name, data, losses if statistics else (), note)

    def _maps(
        self, program: Program, site: AttentionSite, statistics: LayerStatistics | None
    ) -> tuple[Mixing, LatentMaps]:
        """Return what makes the shared part and the latent; without mixing in a dry run."""
        assert site.rope is not None, "checked before"
        heads = site.num_kv_heads
        widths = heads * site.head_dim, heads * site.v_head_dim
        rope_dim = min(self.rope_dim or site.head_dim, heads * site.rope.rotary_dim)
        rank = min(self.rank or sum(widths), sum(widths) - rope_dim)
        inv_freq = _inv_freq(program, site)
        turning = Turning.of(inv_freq, site.head_dim, interleaved=site.rope.interleaved)
        if statistics is None:
            mixing = mix_heads(turning, heads, rope_dim // 2, None, REACH)
            return mixing, fit_latent(mixing, None, None, widths, rank=rank, balance=self.balance)
        assert statistics.k_pre is not None, "checked before"
        assert statistics.q_pre is not None, "checked before"
        k, q = statistics.k_pre.samples, statistics.q_pre.samples
        reach = int(statistics.k_pre.positions.max()) + 1
        mixing = mix_heads(turning, heads, rope_dim // 2, (k, q), reach)
        k, v = (x.transpose(0, 1).flatten(1) for x in (k, statistics.v.samples))
        return mixing, fit_latent(mixing, k, v, widths, rank=rank, balance=self.balance)


def _reason_against(program: Program, site: AttentionSite) -> str:
    """Return why a site cannot have a latent, or nothing."""
    q, k = program.attention_node(site.layer).args[:2]
    assert isinstance(q, fx.Node), "operands of attention are nodes"
    assert isinstance(k, fx.Node), "operands of attention are nodes"
    if len(program.readers(site.owner)) > 1 or site.shared_with is not None:
        return "layers share these keys and values"
    if site.rope is None:
        return "there is no RoPE"
    if q.target is not kvx.ROPE or k.target is not kvx.ROPE:
        return "something lies between RoPE and the attention"
    if any(x.args[1] is not program.placeholder("position_ids") for x in (q, k)):
        return "positions are not those given to the model"
    if site.k is None or site.v is None:
        return "keys or values are not the output of a plain linear layer"
    return ""


def _source(program: Program, site: AttentionSite) -> str | None:
    """Return the name of the node `[B, S, in]` that K and V are projected from, or None."""
    assert site.k is not None, "checked before"
    assert site.v is not None, "checked before"
    found = set()
    for name in (site.k.weight, site.v.weight):
        calls = [
            x
            for node in program.graph.nodes
            for x in node.all_input_nodes
            for call in [as_linear(node, x)]
            if call is not None and call.weight == name
        ]
        found.update(calls)
    if len(found) != 1:
        return None
    (source,) = found
    return source.name if source.meta["type"].shape[:2] == ("B", "S") else None


def _inv_freq(program: Program, site: AttentionSite) -> Tensor:
    """Return the angles of a site; ones in a dry run, where weights have no values."""
    assert site.rope is not None, "checked before"
    held = program.weights[site.rope.inv_freq].flatten()
    return torch.ones(len(held)) if held.is_meta else held
