"""rotate-v: values are stored rotated, at no cost at run time.

Attention is linear in V: softmax(S) (V R) R^T = softmax(S) V for every orthogonal R. So the rows of
W_v that make one KV head absorb R, and the columns of W_o that read the query heads of its group
absorb R^T. Legal where both are plain linear layers whose weights nothing else reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvxform.codecs.basis import Basis, basis_fact, make_basis
from kvxform.codecs.hadamard import is_block
from kvxform.errors import RecipeError
from kvxform.ir.facts import FactValue, Requirement
from kvxform.ir.linear import weight_uses
from kvxform.ir.program import AttentionSite, Program, Projection
from kvxform.pass_base import EXACT, GraphPass, Match, NoMatch, Numerics, Rewriter, register_pass


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
        site, basis = program.site(match.layer), match.data["basis"]
        assert site.v is not None, "match found it"
        made = site.v.indices(site.num_kv_heads, site.v_head_dim)
        out_axis = 0 if site.v.layout == "out_in" else 1
        weight = program.weights[site.v.weight]
        rewriter.set_weight(site.v.weight, _rotate_heads(weight, out_axis, made, basis))
        if site.v.bias is not None:
            bias = program.weights[site.v.bias]
            rewriter.set_weight(site.v.bias, _rotate_heads(bias, 0, made, basis))
        for reader in program.readers(site.layer):
            assert reader.o is not None, "match found it"
            read = reader.o.indices(reader.num_q_heads, reader.v_head_dim)
            in_axis = 1 if reader.o.layout == "out_in" else 0
            weight = program.weights[reader.o.weight]
            rewriter.set_weight(reader.o.weight, _rotate_heads(weight, in_axis, read, basis))
            rewriter.set_basis(reader.layer, value=basis)

    def _check(
        self, program: Program, site: AttentionSite, uses: Mapping[str, int]
    ) -> Match | NoMatch:
        if site.payload == "latent":
            return NoMatch(
                "values are part of the latent, which keys rotate", site.layer, done=True
            )
        if site.shared_with is not None:
            found = self._check(program, program.site(site.owner), uses)
            rotated = isinstance(found, Match) or found.done
            return NoMatch(f"values are those of layer {site.owner}", site.layer, done=rotated)
        outputs = [reader.o for reader in program.readers(site.layer)]
        if site.v is None:
            hint = "leave only views and splits between a linear layer and the values"
            return NoMatch("values are not made by a plain linear layer", site.layer, hint=hint)
        if None in outputs:
            hint = "leave only views between attention and one linear layer"
            return NoMatch("heads are not read by a plain linear layer", site.layer, hint=hint)
        if self.block is None and site.v_head_dim % 2:
            return NoMatch(f"no Hadamard block fits head_dim {site.v_head_dim}", site.layer)
        basis = make_basis(self.block, self.seed, site.v_head_dim, self.pass_name(), site.module)
        if site.v_basis == basis:
            return NoMatch("already rotated", site.layer, done=True)
        if site.v_basis != Basis():
            reason = f"values are in basis {site.v_basis}, and rotations do not stack"
            return NoMatch(reason, site.layer, hint="keep one rotation of values in the recipe")
        read = [output.weight for output in outputs if output is not None]
        for name in filter(None, (site.v.weight, site.v.bias, *read)):
            if uses[name] != 1:
                reason = f"weight {name} is read in {uses[name]} places"
                hint = "untie it: give every layer that reads it a weight of its own"
                return NoMatch(reason, site.layer, hint=hint)
        if site.k is not None and _overlap(site, site.k):
            hint = "give keys and values rows of their own in the projection"
            return NoMatch("keys and values are made by the same weights", site.layer, hint=hint)
        return Match(site.layer, data={"basis": basis})


def _overlap(site: AttentionSite, k: Projection) -> bool:
    assert site.v is not None, "checked before"
    if k.weight != site.v.weight:
        return False
    keys = k.indices(site.num_kv_heads, site.head_dim).flatten().tolist()
    values = site.v.indices(site.num_kv_heads, site.v_head_dim).flatten().tolist()
    return not set(keys).isdisjoint(values)


def _rotate_heads(weight: Tensor, axis: int, heads: Tensor, basis: Basis) -> Tensor:
    """Return a copy of `weight` whose heads on `axis`, indices `[heads, D]`, are rotated."""
    index = heads.flatten().to(weight.device)
    rows = weight.index_select(axis, index).double().movedim(axis, -1)  # [..., heads * D]
    rotated = basis.rotate(rows.unflatten(-1, tuple(heads.shape))).flatten(-2)
    return weight.index_copy(axis, index, rotated.movedim(-1, axis).to(weight.dtype))
