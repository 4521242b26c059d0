"""rotate-v: values are stored rotated, at no cost at run time.

Attention is linear in V: softmax(S) (V R) R^T = softmax(S) V for every orthogonal R. So the rows of
W_v that make one KV head absorb R, and the columns of W_o that read the query heads of its group
absorb R^T. Legal where both are plain linear layers whose weights nothing else reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from kvxform.codecs.basis import basis_fact, make_basis
from kvxform.codecs.hadamard import is_block
from kvxform.errors import RecipeError
from kvxform.ir.facts import FactValue, Requirement
from kvxform.ir.linear import weight_uses
from kvxform.ir.program import AttentionSite, Program
from kvxform.pass_base import EXACT, GraphPass, Match, NoMatch, Numerics, Rewriter, register_pass
from kvxform.rotations.values import check_basis, check_values, fold_values


@register_pass
@dataclass(frozen=True)
class RotateV(GraphPass):
    """Fold a block Hadamard rotation of V into W_v and W_o, head by head.

    Attributes:
        block: Channels rotated together; None means the largest power of two that divides
            head_dim.
        seed: Seed of random signs before the transform, or None for no signs.
    """

    block: int | None = None
    seed: int | None = None
    numerics: ClassVar[Numerics] = EXACT
    requires: ClassVar[tuple[Requirement, ...]] = (
        Requirement(
            "v.codec",
            ("none",),
            because="value scales would be fitted before rotate-v changes the basis of V",
        ),
    )
    source: ClassVar[str] = "QuaRot, arXiv 2404.00456, section 4; R2 of SpinQuant, arXiv 2405.16406"

    def __post_init__(self) -> None:
        """Check the block on its own; `match` compares it with head_dim."""
        if not is_block(self.block):
            rule = "block must be a power of two, at least 2"
            raise RecipeError("KVX107", rule, where="rotate-v", got=repr(self.block))

    def ensures(self) -> Mapping[str, FactValue]:
        """State the basis of values."""
        return {"v.basis": basis_fact(self.block, self.seed)}

    def match(self, program: Program) -> list[Match | NoMatch]:
        """Match every site whose W_v and W_o can absorb the rotation.

        Raises:
            PassError: KVX204 if the block does not divide head_dim.
        """
        uses = weight_uses(program)
        return [self._check(program, site, uses) for site in program.sites]

    def rewrite(self, program: Program, match: Match, rewriter: Rewriter) -> None:
        """Rotate W_v and its bias, un-rotate W_o of every reader, and record the basis."""
        assert match.layer is not None, "every match is at a site"
        fold_values(rewriter, match.layer, match.data["basis"])

    def _check(
        self, program: Program, site: AttentionSite, uses: Mapping[str, int]
    ) -> Match | NoMatch:
        if site.shared_with is not None:
            found = self._check(program, program.site(site.owner), uses)
            rotated = isinstance(found, Match) or found.done
            return NoMatch(f"values are those of layer {site.owner}", site.layer, done=rotated)
        problem = check_values(program, site, uses)
        if problem is not None:
            return problem
        if self.block is None and site.v_head_dim % 2:
            return NoMatch(f"no Hadamard block fits head_dim {site.v_head_dim}", site.layer)
        basis = make_basis(self.block, self.seed, site.v_head_dim, self.pass_name(), site.module)
        problem = check_basis(site.v_basis, basis, "values", site.layer)
        return problem or Match(site.layer, data={"basis": basis})
