"""merge-kv-heads: several KV heads become one, so that fewer are cached.

Heads are grouped, and each group of t heads of D channels is mixed into one of D channels: their
mean, or the first D singular vectors of what calibration has seen of them. W_q and W_o read the
mix, so the result is an ordinary grouped-query attention.

RoPE turns pairs of channels by an angle of its own for each position, and a free mix of keys does
not commute with that. So there are three ways. `commuting`: one complex factor for each head and
pair of channels, folded into W_k and W_q. `post`: the best mix, of keys after RoPE, as a product in
the graph; W_k keeps its width. `latent`: the best mix of what is cached, undone at every read, once
there is a cache; the heads stay. V never has RoPE and always moves into W_v and W_o.

Without RoPE the best mix goes into the weights whatever the way.

A norm of every head stands between W_k and RoPE (QK-norm): it divides each head by its own length,
so only the mean, as a starting point, goes into the weights there; otherwise the way is `post`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from kvxform.errors import PassError, RecipeError
from kvxform.ir.facts import FactValue, Requirement
from kvxform.ir.layers import check_layers, named_layers
from kvxform.ir.linear import weight_uses
from kvxform.ir.program import AttentionSite, Program
from kvxform.pass_base import (
    Exactness,
    GraphPass,
    Match,
    NoMatch,
    Numerics,
    Rewriter,
    register_pass,
)
from kvxform.rotations.at_read import heads_together
from kvxform.structure.head_latents import keep_latents, latent_match
from kvxform.structure.head_merging import merge_heads
from kvxform.structure.head_plans import HeadPlanner, cannot_merge

WHERE = "merge-kv-heads"
RopeWay = Literal["auto", "commuting", "post", "latent"]


@register_pass
@dataclass(frozen=True)
class MergeKvHeads(GraphPass):
    """Mix groups of KV heads into one head each, and let queries and outputs read the mix.

    Attributes:
        heads: KV heads that are left; a divisor of those there are.
        ratio: Share of the KV heads that is left; rounded down to a divisor, to one at least.
        layers: KV heads that are left at some layers, by their names: `{"0-1,-1": 4}`. Of two
            entries for a layer the later one counts, and both before `heads` or `ratio`.
        planner: `svd`, the smallest error on the calibration text, or `mean`.
        rope: What is done about RoPE, see the module. `auto` is `post`; means go into the weights.
        objective: What `svd` makes small: the error of `vectors` K and V, or that of `attention`:
            of scores under calibrated queries, and of what W_o makes of values.
        grouping: `consecutive`, or `similar`: heads that are alike on the calibration text.
    """

    heads: int | None = None
    ratio: float | None = None
    layers: Mapping[str, int] | None = None
    planner: Literal["svd", "mean"] = "svd"
    rope: RopeWay = "auto"
    objective: Literal["vectors", "attention"] = "vectors"
    grouping: Literal["consecutive", "similar"] = "consecutive"
    numerics: ClassVar[Numerics] = Numerics(Exactness.NEEDS_TRAINING, "kl")
    requires: ClassVar[tuple[Requirement, ...]] = (
        Requirement("k.codec", ("none",), because="codes of keys cannot be mixed"),
        Requirement("v.codec", ("none",), because="codes of values cannot be mixed"),
        Requirement("k.basis", ("identity",), because="heads of keys would no longer be alike"),
        Requirement("v.basis", ("identity",), because="heads of values would no longer be alike"),
    )
    source: ClassVar[str] = "GQA, arXiv 2305.13245; Compress KV Heads, arXiv 2406.07056"

    def __post_init__(self) -> None:
        """Check the options as far as that goes without a model."""
        for layers in self.layers or {}:
            check_layers(layers, WHERE)
        counts = [n for n in (self.heads, *(self.layers or {}).values()) if n is not None]
        both = self.heads is not None and self.ratio is not None
        is_latent = self.rope == "latent"
        for is_fine, rule, got in (
            (counts or self.ratio is not None, "heads, ratio or layers must be given", None),
            (not both, "heads and ratio must not be given together", (self.heads, self.ratio)),
            (all(n >= 1 for n in counts), "KV heads that are left must be at least 1", counts),
            (self.ratio is None or 0 < self.ratio < 1, "ratio must lie in (0, 1)", self.ratio),
            (self.planner in ("svd", "mean"), "planner must be svd or mean", self.planner),
            (self.rope in ("auto", "commuting", "post", "latent"), _ROPE_RULE, self.rope),
            (self.objective in ("vectors", "attention"), _OBJECTIVE_RULE, self.objective),
            (self.grouping in ("consecutive", "similar"), _GROUPING_RULE, self.grouping),
            (not is_latent or self.planner == "svd", _LATENT_RULE, self.planner),
            (not is_latent or self.grouping == "consecutive", _LATENT_RULE, self.grouping),
            (not is_latent or self.objective == "vectors", _LATENT_RULE, self.objective),
        ):
            if not is_fine:
                raise RecipeError("KVX107", rule, where=WHERE, got=repr(got))

    def ensures(self) -> Mapping[str, FactValue]:
        """State that there are fewer heads; with `latent`, what is cached instead."""
        if self.rope == "latent":
            facts = ("k.basis", "v.basis"), ("k.codec", "v.codec")
            return dict.fromkeys(facts[0], "matrix") | dict.fromkeys(facts[1], "truncate")
        return {"kv_heads": "merged"}

    @property
    def needs_calibration(self) -> bool:
        """Always: what a merge loses is reported, whatever the planner."""
        return True

    def match(self, program: Program) -> list[Match | NoMatch]:
        """Match every site that owns its cache and has more heads than are to be left.

        Raises:
            PassError: KVX205 if the heads of a layer do not divide into so many groups.
        """
        uses, targets = weight_uses(program), self._targets(program)
        found: dict[int, Match | NoMatch] = {}
        for site in program.sites:
            if site.shared_with is not None:
                owner = found[site.owner]
                follows = isinstance(owner, Match) or owner.done
                reason = f"keys and values are those of layer {site.owner}"
                found[site.layer] = NoMatch(reason, site.layer, done=follows)
                continue
            groups = targets.get(site.layer)
            problem = self._problem(program, site, groups)
            found[site.layer] = problem or self._check(program, site, groups or 1, uses)
        return list(found.values())

    def rewrite(self, program: Program, match: Match, rewriter: Rewriter) -> None:
        """Mix the heads of one owner and of all that read its cache."""
        assert match.layer is not None, "every match is at a site"
        if self.rope == "latent":
            keep_latents(rewriter, match.layer, match.data)
            return
        merge_heads(rewriter, match.layer, match.data["merge"])

    def _targets(self, program: Program) -> dict[int, int]:
        """Return how many KV heads are to be left, by layer."""
        layers = sorted(site.layer for site in program.sites)
        found = {}
        for site in program.sites:
            if self.heads is not None:
                found[site.layer] = self.heads
            elif self.ratio is not None:
                wanted = self.ratio * site.num_kv_heads
                found[site.layer] = heads_together(site.num_kv_heads, wanted)
        for name, heads in (self.layers or {}).items():
            found |= dict.fromkeys(named_layers(name, layers, WHERE), heads)
        return found

    def _problem(self, program: Program, site: AttentionSite, groups: int | None) -> NoMatch | None:
        """Return why there is nothing to merge at a site, or None."""
        heads = site.num_kv_heads
        if groups is None:
            is_done = program.facts["kv_heads"] == "merged"
            return NoMatch("the recipe names other layers", site.layer, done=is_done)
        if site.payload == "latent" or site.latent is not None:
            return NoMatch("keys and values of all heads come from one latent", site.layer)
        if self.heads is None and not self.layers and program.facts["kv_heads"] == "merged":
            return NoMatch("heads have been merged already", site.layer, done=True)
        if heads == groups and (heads > 1 or self.ratio is None):
            there = f"there are {heads} KV heads" if heads > 1 else "there is one KV head"
            return NoMatch(f"{there} already", site.layer, done=True)
        if heads < 2:
            return NoMatch("one KV head cannot be merged with another", site.layer)
        if heads < groups:
            return NoMatch(f"there are only {heads} KV heads", site.layer)
        if heads % groups:
            fitting = ", ".join(str(n) for n in range(1, heads) if heads % n == 0)
            rule = f"the {heads} KV heads of a layer must divide into groups of equal size"
            hint = f"leave {fitting} heads"
            raise PassError("KVX205", rule, where=WHERE, got=groups, at=site.module, hint=hint)
        return None

    def _check(
        self, program: Program, site: AttentionSite, groups: int, uses: Mapping[str, int]
    ) -> Match | NoMatch:
        if self.rope == "latent":
            return latent_match(program, site, groups)
        if program.is_cached:
            hint = "move merge-kv-heads above insert-cache, or use rope: latent"
            return NoMatch("there is a cache of all heads already", site.layer, hint=hint)
        planner = HeadPlanner(program, site, groups, self.planner, self.rope, self.objective)
        problem = cannot_merge(planner, uses, moves=self.grouping == "similar")
        if problem is not None:
            return problem
        merge = planner.plan(search=self.grouping == "similar")
        return Match(
            site.layer,
            program.attention_node(site.layer).name,
            {"merge": merge},
            planner.losses(merge),
            self._note(site, groups),
        )

    def _note(self, site: AttentionSite, groups: int) -> str:
        """Say where a share of the heads was rounded."""
        if self.ratio is None or self.ratio * site.num_kv_heads == groups:
            return ""
        return f"{self.ratio:g} of {site.num_kv_heads} KV heads is no divisor: {groups} left"


_ROPE_RULE = "rope must be auto, commuting, post or latent"
_OBJECTIVE_RULE = "objective must be vectors or attention"
_GROUPING_RULE = "grouping must be consecutive or similar"
_LATENT_RULE = "rope: latent must go with no other planner, objective or grouping than the default"
