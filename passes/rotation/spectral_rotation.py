"""spectral-rotation: K and V are stored in bases that calibration has found.

An error in a key matters as much as queries point along it, and an error in a value as much as
attention reads it. So the basis of K comes from the second moment of the queries of each KV head,
and that of V from the values as attention weighs them: eigenvectors first, then a Hadamard matrix,
so that every stored channel holds an equal share of what matters.

The basis of K costs one D x D product on q and one on each new k; that of V lives in W_v and W_o.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvxform.errors import RecipeError
from kvxform.ir.calibration import Calibration
from kvxform.ir.facts import FactValue, Requirement
from kvxform.ir.linear import weight_uses
from kvxform.ir.program import AttentionSite, Program
from kvxform.pass_base import EXACT, GraphPass, Match, NoMatch, Numerics, Rewriter, register_pass
from kvxform.rotations.dense import (
    both_or_none,
    check_dense_keys,
    check_dense_values,
    dense_basis,
    rotate_stream,
    rotation_match,
)
from kvxform.rotations.orders import hadamard_factors
from kvxform.rotations.spectral import query_moments, spectral_basis, value_moments


@register_pass
@dataclass(frozen=True)
class SpectralRotation(GraphPass):
    """Store K in the eigenbasis of queries, V in that of attended values, both mixed evenly.

    Attributes:
        keys: Rotate K, at the price of one product on q and on each new k.
        values: Rotate V, inside of the weights.
    """

    keys: bool = True
    values: bool = True
    numerics: ClassVar[Numerics] = EXACT
    requires: ClassVar[tuple[Requirement, ...]] = (
        Requirement(
            "k.codec", ("none",), because="key scales would be fitted before K changes its basis"
        ),
        Requirement(
            "v.codec", ("none",), because="value scales would be fitted before V changes its basis"
        ),
        Requirement("k.rope", ("post",), because="RoPE would turn keys that are already mixed"),
    )
    source: ClassVar[str] = "OSCAR, arXiv 2605.17757; not OScaR, arXiv 2605.19660"

    def __post_init__(self) -> None:
        """Check that there is something to do."""
        if not (self.keys or self.values):
            rule = "keys or values must be true"
            raise RecipeError("KVX107", rule, where=self.pass_name(), got="false and false")

    def ensures(self) -> Mapping[str, FactValue]:
        """State the bases of keys and values."""
        found = {"k.basis": self.keys, "v.basis": self.values}
        return {fact: "matrix" for fact, is_asked in found.items() if is_asked}

    @property
    def needs_calibration(self) -> bool:
        """Always: the bases are eigenvectors of what it collects."""
        return True

    def match(self, program: Program) -> list[Match | NoMatch]:
        """Match K and V of every site, each on its own."""
        uses = weight_uses(program)
        keys = [self._check_keys(program, site) for site in program.sites if self.keys]
        values = [self._check_values(program, s, uses) for s in program.sites if self.values]
        return both_or_none([keys, values])

    def rewrite(self, program: Program, match: Match, rewriter: Rewriter) -> None:
        """Rotate K in the graph, or V in the weights, and record the basis."""
        rotate_stream(rewriter, match)

    def _check_keys(self, program: Program, site: AttentionSite) -> Match | NoMatch:
        basis = dense_basis(self.pass_name(), "k", site.owner)
        problem = check_dense_keys(site, basis) or _check_width(site.head_dim, site.layer)
        if problem is not None:
            return problem
        found = _spectral(program, site, site.head_dim, query_moments)
        return rotation_match(site, "key", basis, found)

    def _check_values(
        self, program: Program, site: AttentionSite, uses: Mapping[str, int]
    ) -> Match | NoMatch:
        basis = dense_basis(self.pass_name(), "v", site.owner)
        problem = check_dense_values(program, site, basis, uses)
        problem = problem or _check_width(site.v_head_dim, site.layer)
        if problem is not None:
            return problem
        found = _spectral(program, site, site.v_head_dim, value_moments)
        return rotation_match(site, "value", basis, found)


def _check_width(width: int, layer: int) -> NoMatch | None:
    if hadamard_factors(width) is None:
        return NoMatch(f"no Hadamard matrix of order {width} is known", layer)
    return None


def _spectral(
    program: Program,
    site: AttentionSite,
    width: int,
    moments: Callable[[Program, AttentionSite, Calibration], Tensor],
) -> Tensor:
    """Return the bases of one stream, `[Hk, D, D]`; those of a dry run are identities."""
    if program.calibration is None:
        return torch.eye(width).expand(site.num_kv_heads, -1, -1)
    return spectral_basis(moments(program, site, program.calibration))
