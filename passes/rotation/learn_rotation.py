"""learn-rotation: K and V are stored in bases that were learnt on calibration tokens.

Any rotation leaves the model as it is; only what rounding does to K and V depends on it. So the
loss of the model with rounded K and V is minimised over rotations, the weights held still: descent
over orthogonal matrices, from a Hadamard matrix, with gradients straight through the rounding. The
learnt basis of V lives in W_v and W_o; that of K costs one product on q and one on each new k.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from kvxform.errors import RecipeError
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
from kvxform.rotations.learning import Schedule, learn_bases
from kvxform.rotations.orders import hadamard_factors, hadamard_of_width, random_orthogonal

BITS = (2, 3, 4, 8)


@register_pass
@dataclass(frozen=True)
class LearnRotation(GraphPass):
    """Learn a rotation of V for each KV head, and one of K if asked, and store K and V in them.

    Attributes:
        bits: Bits of K and V while learning, with one scale and zero point a token and head.
        keys: Learn a rotation of K too, instead of leaving K in the basis that it has.
        steps: Gradient steps.
        tokens: Tokens of the calibration windows that a step uses.
        learning_rate: Length of the first step; it falls along a cosine.
    """

    bits: int = 4
    keys: bool = False
    steps: int = 60
    tokens: int = 256
    learning_rate: float = 1.5
    numerics: ClassVar[Numerics] = EXACT
    requires: ClassVar[tuple[Requirement, ...]] = (
        Requirement(
            "v.codec", ("none",), because="value scales would be fitted before V changes its basis"
        ),
        Requirement(
            "k.codec", ("none",), because="key scales would be fitted before K changes its basis"
        ),
        Requirement("cache.inserted", (False,), because="gradients do not pass through a cache"),
    )
    source: ClassVar[str] = "SpinQuant, arXiv 2405.16406, section 3 (R2); K: own extension of R3"

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name, rule, is_fine in (
            ("bits", f"must be one of {', '.join(map(str, BITS))}", self.bits in BITS),
            ("steps", "must be positive", self.steps > 0),
            ("tokens", "must be at least 2", self.tokens > 1),
            ("learning_rate", "must be positive", self.learning_rate > 0),
        ):
            if not is_fine:
                got = repr(getattr(self, name))
                raise RecipeError("KVX107", f"{name} {rule}", where=self.pass_name(), got=got)

    def ensures(self) -> Mapping[str, FactValue]:
        """State the bases of values, and of keys if asked."""
        return {"v.basis": "matrix", **({"k.basis": "matrix"} if self.keys else {})}

    @property
    def needs_calibration(self) -> bool:
        """Always: the loss is that on its tokens."""
        return True

    def match(self, program: Program) -> list[Match | NoMatch]:
        """Match every stream that can be rotated, and learn all rotations at once."""
        uses = weight_uses(program)
        values = [self._check_values(program, site, uses) for site in program.sites]
        keys = [self._check_keys(site) for site in program.sites if self.keys]
        return self._learn(program, both_or_none([values, keys]))

    def rewrite(self, program: Program, match: Match, rewriter: Rewriter) -> None:
        """Rotate V in the weights, or K in the graph, and record the basis."""
        rotate_stream(rewriter, match)

    def _check_values(
        self, program: Program, site: AttentionSite, uses: Mapping[str, int]
    ) -> Match | NoMatch:
        basis = dense_basis(self.pass_name(), "v", site.owner)
        problem = check_dense_values(program, site, basis, uses)
        return problem or rotation_match(site, "value", basis, _start(site, site.v_head_dim))

    def _check_keys(self, site: AttentionSite) -> Match | NoMatch:
        basis = dense_basis(self.pass_name(), "k", site.owner)
        problem = check_dense_keys(site, basis)
        return problem or rotation_match(site, "key", basis, _start(site, site.head_dim))

    def _learn(self, program: Program, found: list[Match | NoMatch]) -> list[Match | NoMatch]:
        """Replace the matrices of all matches by learnt ones; not in a dry run."""
        matches = [f for f in found if isinstance(f, Match)]
        if program.calibration is None or not matches:
            return found
        start = {_place(program, match): match.data["matrices"] for match in matches}
        schedule = Schedule(self.bits, self.steps, self.tokens, self.learning_rate)
        learned = learn_bases(program, program.calibration.token_ids, start, schedule)

        def fill(match: Match) -> Match:
            matrices = learned.bases[_place(program, match)].cpu()
            return replace(match, data={**match.data, "matrices": matrices})

        return [fill(f) if isinstance(f, Match) else f for f in found]


def _place(program: Program, match: Match) -> tuple[str, int]:
    assert match.layer is not None, "every match is at a site"
    return match.data["stream"], program.site(match.layer).owner


def _start(site: AttentionSite, width: int) -> Tensor:
    """Return where to start, `[Hk, D, D]`: a Hadamard matrix, or a random rotation."""
    is_known = hadamard_factors(width) is not None
    one = hadamard_of_width(width) if is_known else random_orthogonal(width, 0)
    return one.expand(site.num_kv_heads, -1, -1)
