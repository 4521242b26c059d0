"""rotate-qk: queries and new keys are rotated after RoPE, so that keys are stored rotated.

(Q R)(K R)^T = Q K^T for every orthogonal R. RoPE stands between the projections and the scores, so
R cannot be folded into weights; it costs one block Hadamard on the query and one on each new key,
and nothing per cached element. Legal at every site that attends to keys cached after RoPE.

A cached latent is key and value at once. There a block must not reach from the latent into the
shared key part, and what attention returns is rotated too; the matrices that read it absorb that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

import kvxform.ir.ops as kvx
from kvxform.codecs.basis import Basis, basis_fact, make_basis
from kvxform.codecs.hadamard import is_block, make_signs
from kvxform.errors import RecipeError
from kvxform.ir.facts import FactValue, Requirement
from kvxform.ir.program import AttentionSite, Program
from kvxform.ir.types import TensorType
from kvxform.pass_base import EXACT, GraphPass, Match, NoMatch, Numerics, Rewriter, register_pass
from kvxform.rotations.keys import Turn, turn_keys
from kvxform.rotations.values import check_basis


@register_pass
@dataclass(frozen=True)
class RotateQk(GraphPass):
    """Rotate q and new k by a block Hadamard matrix right before they are used.

    Attributes:
        block: Channels rotated together; None means the largest power of two that divides
            head_dim, or both parts of a cached latent.
        seed: Seed of random signs before the transform, or None for no signs.
    """

    block: int | None = None
    seed: int | None = None
    numerics: ClassVar[Numerics] = EXACT
    requires: ClassVar[tuple[Requirement, ...]] = (
        Requirement(
            "k.codec",
            ("none",),
            because="key scales would be fitted before rotate-qk changes the basis of K",
        ),
        Requirement(
            "k.rope",
            ("post",),
            because="RoPE would turn keys that rotate-qk has already mixed",
        ),
    )
    source: ClassVar[str] = (
        "QuaRot, arXiv 2404.00456, section 4; block form: SAW-INT4, arXiv 2604.19157, section 3"
    )

    def __post_init__(self) -> None:
        """Check the block on its own; `match` compares it with head_dim."""
        if not is_block(self.block):
            rule = "block must be a power of two, at least 2"
            raise RecipeError("KVX107", rule, where="rotate-qk", got=repr(self.block))

    def ensures(self) -> Mapping[str, FactValue]:
        """State the basis of keys."""
        return {"k.basis": basis_fact(self.block, self.seed)}

    def match(self, program: Program) -> list[Match | NoMatch]:
        """Match every site.

        Raises:
            PassError: KVX204 if the block does not divide head_dim, or a part of a latent.
        """
        return [self._check(program, site) for site in program.sites]

    def rewrite(self, program: Program, match: Match, rewriter: Rewriter) -> None:
        """Rotate q where it is read, k where it is read or appended, and record the basis."""
        assert match.layer is not None, "every match is at a site"
        basis = match.data["basis"]
        turn = _hadamard_turn(rewriter, basis)
        turn_keys(rewriter, match.layer, turn, turn)
        if program.site(match.layer).payload == "latent":
            _absorb_in_output(rewriter, program.attention_node(match.layer), basis)
        rewriter.set_basis(match.layer, key=basis)

    def _check(self, program: Program, site: AttentionSite) -> Match | NoMatch:
        node = program.attention_node(site.layer).name
        width = site.head_dim
        if site.payload == "latent":
            width = math.gcd(site.v_head_dim, site.head_dim - site.v_head_dim)
        if self.block is None and width % 2:
            return NoMatch(f"no Hadamard block fits head_dim {width}", site.layer, node)
        basis = make_basis(self.block, self.seed, width, self.pass_name(), site.module)
        problem = check_basis(site.k_basis, basis, "keys", site.layer)
        return problem or Match(site.layer, node, {"basis": basis})


def _hadamard_turn(rewriter: Rewriter, basis: Basis) -> Turn:
    """Return a block Hadamard transform with the signs of `basis`."""

    def turn(value: fx.Node, user: fx.Node) -> fx.Node:
        kind = value.meta["type"]
        options: dict[str, Any] = {"block": basis.block}
        if basis.seed is not None:
            options["signs"] = _signs_node(rewriter, user, kind, basis.seed)
        return rewriter.call_before(user, kvx.HADAMARD, (value,), options, type_=kind, like=value)

    return turn


def _absorb_in_output(rewriter: Rewriter, attention: fx.Node, basis: Basis) -> None:
    """Un-rotate what attention to rotated latents returns, in the matrices that read it."""
    (reader,) = attention.users
    stack = reader.args[1]
    assert isinstance(stack, fx.Node), "cache-latent has written a product with a weight"
    weight = rewriter.program.weights[str(stack.target)]  # [H, rank, v_head_dim]
    rank, query = weight.shape[1], attention.args[0]
    assert isinstance(query, fx.Node), "operands of attention are nodes"
    rotation = basis.matrix(query.meta["type"].shape[-1])[:rank, :rank].to(weight.device)
    rewriter.set_weight(str(stack.target), (rotation.T @ weight.double()).to(weight.dtype))
    rewriter.set_args(reader)
    if attention.target is kvx.ATTENTION:
        q, k, v, *rest = attention.args
        assert isinstance(v, fx.Node), "operands of attention are nodes"
        assert callable(v.target), "cache-latent has cut it from the key"
        first = rewriter.call_before(attention, v.target, (k, *v.args[1:]), type_=v.meta["type"])
        rewriter.set_args(attention, (q, k, first, *rest))


def _signs_node(rewriter: Rewriter, anchor: fx.Node, x: TensorType, seed: int) -> fx.Node:
    """Return a node for the signs `[D]`, a weight that all sites with this seed share."""
    dim = x.shape[-1]
    assert isinstance(dim, int), "head_dim is static"
    name = f"rotate_qk.signs_{dim}_{seed}"
    weights = rewriter.program.weights
    if name not in weights:
        signs = make_signs(dim, seed)
        assert signs is not None, "there is a seed"
        device = next(iter(weights.values())).device
        rewriter.set_weight(name, signs.to(device=device, dtype=x.dtype))
    return rewriter.get_weight_node(name, anchor, TensorType(x.dtype, (dim,)))
