"""Decides how the KV heads of one layer become fewer, from calibration."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

from kvxform.ir.program import AttentionSite, Program
from kvxform.pass_base import Loss, NoMatch
from kvxform.rotations.spectral import query_moments
from kvxform.rotations.values import UNTIE, check_values
from kvxform.structure.head_groups import (
    mean_similarity,
    plain_similarity,
    similar_order,
    turning_similarity,
)
from kvxform.structure.head_merging import Merge
from kvxform.structure.head_mixes import (
    Mix,
    Turns,
    mean_mix,
    output_roots,
    plain_mix,
    score_roots,
    turning_mix,
    weighed_mix,
)
from kvxform.structure.head_paths import (
    HeadPath,
    has_own_gains,
    norm_weights,
    output_rows,
    read_path,
)


@dataclass(frozen=True)
class HeadPlanner:
    """Plans the heads of one site.

    Attributes:
        program: Has a calibration, or none in a dry run.
        site: A site that owns its cache.
        groups: KV heads that are left.
        planner: `svd` or `mean`.
        rope: `auto`, `commuting` or `post`.
        objective: `vectors` or `attention`: what has the smallest squared error.
    """

    program: Program
    site: AttentionSite
    groups: int
    planner: str
    rope: str
    objective: str = "vectors"

    @functools.cached_property
    def way(self) -> Literal["fold", "project"]:
        """Where the mix of keys goes."""
        if self.planner == "mean" and self.rope != "post":
            return "fold"
        if self.site.rope is not None and self.rope != "commuting":
            return "project"
        is_plain = all(isinstance(p, HeadPath) and p.norm is None for p in self.paths())
        return "fold" if is_plain else "project"

    @property
    def turns(self) -> Turns | None:
        """Channels that RoPE turns after keys are mixed, or None."""
        rope = self.site.rope
        if rope is None or self.way == "project":
            return None
        return Turns(rope.rotary_dim, rope.interleaved)

    def paths(self) -> list[HeadPath | str]:
        """Return how keys, and queries of all readers, are made."""
        found = [_path(self.program, self.site, 1)]
        return found + [_path(self.program, r, 0) for r in self.program.readers(self.site.layer)]

    def plan(self, *, search: bool) -> Merge:
        """Return the merge; with `search`, of heads that are alike.

        Alike are heads that lose little together, so the groups are compared with neighbours by
        what is lost.
        """
        neighbours = self._merge(tuple(range(self.site.num_kv_heads)))
        if not search or self.program.calibration is None:
            return neighbours
        keys, values = self.samples("key"), self.samples("value")
        similarity = self._similarity(keys, self.turns) + self._similarity(values, None)
        alike = self._merge(similar_order(similarity, self.groups))
        return min(neighbours, alike, key=self._lost)

    def losses(self, merge: Merge) -> tuple[Loss, ...]:
        """Return what each group of heads loses of K and V; nothing in a dry run.

        Nothing is known of keys that a norm follows after they are mixed.
        """
        if self.program.calibration is None:
            return ()
        groups = torch.tensor(merge.order).view(self.groups, -1).tolist()
        found = []
        for name, mix in (("key", merge.key), ("value", merge.value)):
            if name == "key" and self._is_normed(merge):
                continue
            errors = mix.errors(self.samples(name)[list(merge.order)])
            heads = zip(errors, groups, strict=True)
            found += [Loss(self.site.layer, name, error, tuple(own)) for error, own in heads]
        return tuple(found)

    def samples(self, name: str) -> Tensor:
        """Return calibrated keys or values where they are mixed, `[Hk, N, D]`."""
        assert self.program.calibration is not None, "not a dry run"
        statistics = self.program.calibration.layers[self.site.layer]
        if name == "value":
            return statistics.v.samples
        before = statistics.k_pre if self.way == "fold" else None
        return (before or statistics.k_post).samples

    def _merge(self, order: tuple[int, ...]) -> Merge:
        return Merge(self.way, order, self._mix("key", order), self._mix("value", order))

    def _mix(self, name: str, order: tuple[int, ...]) -> Mix:
        turns = self.turns if name == "key" else None
        if self.planner == "mean" or self.program.calibration is None:
            dim = self.site.head_dim if name == "key" else self.site.v_head_dim
            return mean_mix(len(order), self.groups, dim)
        samples = self.samples(name)[list(order)].double()
        roots = self._roots(name)[list(order)] if self.objective == "attention" else None
        if roots is not None:
            samples = samples @ roots
        if turns is None:
            mix = plain_mix(samples, self.groups)
        else:
            mix = turning_mix(samples, self.groups, turns)
        return mix if roots is None else weighed_mix(mix, roots)

    def _roots(self, name: str) -> Tensor:
        """Return what errors of K cost in scores, or errors of V in outputs, `[Hk, D, D]`."""
        program, site = self.program, self.site
        assert program.calibration is not None, "not a dry run"
        if name == "key":
            return score_roots(query_moments(program, site, program.calibration), self.turns)
        rows = [
            output_rows(program, reader).cpu().unflatten(0, (site.num_kv_heads, -1))
            for reader in program.readers(site.layer)
        ]
        return output_roots(torch.cat(rows, 1).flatten(0, 1), site.num_kv_heads)

    def _similarity(self, x: Tensor, turns: Turns | None) -> Tensor:
        if self.planner == "mean":
            return mean_similarity(x)
        return plain_similarity(x) if turns is None else turning_similarity(x, turns)

    def _lost(self, merge: Merge) -> float:
        return sum(loss.error**2 for loss in self.losses(merge))

    def _is_normed(self, merge: Merge) -> bool:
        path = _path(self.program, self.site, 1)
        return merge.way == "fold" and isinstance(path, HeadPath) and path.norm is not None


def cannot_merge(planner: HeadPlanner, uses: Mapping[str, int], *, moves: bool) -> NoMatch | None:
    """Return why the heads of a site cannot be merged so, or None if they can.

    Args:
        planner: Of the site.
        uses: Readers of each weight; see `ir.linear.weight_uses`.
        moves: Whether heads may change their places.
    """
    program, site = planner.program, planner.site
    problem = check_values(program, site, uses)
    if problem is not None:
        return problem
    node = program.attention_node(site.layer)
    if moves and node.kwargs.get("bias") is not None:
        hint = "use grouping: consecutive"
        return NoMatch(
            "a bias on the scores belongs to heads in their order", site.layer, hint=hint
        )
    values = _path(program, site, 2)
    if isinstance(values, str):
        return NoMatch(f"values: {values}", site.layer)
    if planner.way == "project":
        return _cannot_commute(planner) if planner.rope == "commuting" else None
    return _cannot_fold(planner, uses)


def _cannot_commute(planner: HeadPlanner) -> NoMatch | None:
    site, hint = planner.site, "use rope: post"
    for path in planner.paths():
        if isinstance(path, str):
            return NoMatch(f"keys or queries: {path}", site.layer, hint=hint)
        if path.norm is not None:
            reason = (
                "a norm divides every head by its own length between W_k and RoPE, so no mix of"
                " heads can move into W_k"
            )
            return NoMatch(reason, site.layer, hint=hint)
    return None


def _cannot_fold(planner: HeadPlanner, uses: Mapping[str, int]) -> NoMatch | None:
    program, layer, hint = planner.program, planner.site.layer, "use rope: post"
    for path in planner.paths():
        if isinstance(path, str):
            return NoMatch(f"keys or queries: {path}", layer, hint=hint)
        if has_own_gains(program, path):
            return NoMatch("every head has gains of its own in its norm", layer, hint=hint)
        own = (path.linear.weight, path.linear.bias, *_wide_weights(program, path))
        for name in filter(None, own):
            if uses[name] != 1:
                reason = f"weight {name} is read in {uses[name]} places"
                return NoMatch(reason, layer, hint=UNTIE)
    return None


def _wide_weights(program: Program, path: HeadPath) -> tuple[str, ...]:
    return norm_weights(program, path) if path.is_wide else ()


def _path(program: Program, site: AttentionSite, index: int) -> HeadPath | str:
    operand = program.attention_node(site.layer).args[index]
    assert isinstance(operand, fx.Node), "operands of attention are nodes"
    return read_path(program, operand, site.num_kv_heads if index else site.num_q_heads)
