"""balance-channels: channels of K in which queries are large are stored larger.

q . k does not change if a channel of k is multiplied by b and that of q divided by it. A token that
is quantised with one scale for all channels then spends its precision where queries need it, and
channels that are large in k alone no longer set the scale.

RoPE turns pairs of channels, so both of a pair have the same factor: that moves through RoPE into
W_q and W_k and costs nothing. Where something else stands between, such as a norm of every head, q
and k are multiplied after RoPE. Factors are powers of two: products with them are exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvxform.codecs.basis import Basis
from kvxform.errors import RecipeError
from kvxform.ir.calibration import Calibration
from kvxform.ir.facts import FactValue, Requirement
from kvxform.ir.linear import weight_uses
from kvxform.ir.program import AttentionSite, Program, Projection
from kvxform.pass_base import EXACT, GraphPass, Match, NoMatch, Numerics, Rewriter, register_pass
from kvxform.rotations.keys import dense_turn, turn_keys
from kvxform.rotations.values import check_basis, share_rows

MULTIPLY = torch.ops.aten.mul.Tensor
LARGEST_EXPONENT = 6  # factors stay within 1 / 64 and 64: float16 has room for that


@register_pass
@dataclass(frozen=True)
class BalanceChannels(GraphPass):
    """Multiply channels of K and divide those of q by factors from calibration.

    Attributes:
        alpha: Share of the ranges of q in a factor: |q|^alpha / |k|^(1 - alpha).
        online: Multiply after RoPE, at run time, where factors do not fit into the weights.
    """

    alpha: float = 0.5
    online: bool = False
    numerics: ClassVar[Numerics] = EXACT
    requires: ClassVar[tuple[Requirement, ...]] = (
        Requirement(
            "k.codec", ("none",), because="key scales would be fitted before channels are balanced"
        ),
        Requirement("k.rope", ("post",), because="ranges of keys are those after RoPE"),
    )
    source: ClassVar[str] = (
        "MiKV, arXiv 2402.18096, outlier balancer; SmoothQuant, arXiv 2211.10438, equation 4"
    )

    def __post_init__(self) -> None:
        """Check the share."""
        if not 0 <= self.alpha <= 1:
            rule = "alpha must lie between 0 and 1"
            raise RecipeError("KVX107", rule, where=self.pass_name(), got=repr(self.alpha))

    def ensures(self) -> Mapping[str, FactValue]:
        """State the basis of keys."""
        return {"k.basis": "scale"}

    @property
    def needs_calibration(self) -> bool:
        """Always: factors come from ranges."""
        return True

    def match(self, program: Program) -> list[Match | NoMatch]:
        """Match every site."""
        uses = weight_uses(program)
        return [self._check(program, site, uses) for site in program.sites]

    def rewrite(self, program: Program, match: Match, rewriter: Rewriter) -> None:
        """Scale q and k of one site, in the weights or in the graph, and record the basis."""
        assert match.layer is not None, "every match is at a site"
        site, name = program.site(match.layer), match.data["name"]
        if name not in program.weights:
            factors = match.data["factors"][:, None]  # [Hk, D] -> [Hk, 1, D]
            device = next(iter(program.weights.values())).device
            rewriter.set_weight(name, factors.to(device, program.dtype))
        of_key = program.weights[name]
        of_query = 1 / of_key.repeat_interleave(site.num_q_heads // site.num_kv_heads, 0)
        if match.data["folds"]:
            _fold(rewriter, site.q, of_query)
            if site.owner == site.layer:
                _fold(rewriter, site.k, of_key)
        else:
            own = f"balance_channels.q_{site.layer}"
            rewriter.set_weight(own, of_query)
            query, key = (dense_turn(rewriter, weight, MULTIPLY) for weight in (own, name))
            turn_keys(rewriter, site.layer, query, key)
        rewriter.set_basis(site.layer, key=Basis("scale", weight=name))

    def _check(
        self, program: Program, site: AttentionSite, uses: Mapping[str, int]
    ) -> Match | NoMatch:
        name = f"balance_channels.k_{site.owner}"
        if site.payload == "latent":
            return NoMatch("keys are latents, which are values too", site.layer)
        problem = check_basis(site.k_basis, Basis("scale", weight=name), "keys", site.layer)
        if problem is not None:
            return problem
        reason = _cannot_fold(program, site, uses)
        if reason and not self.online:
            return NoMatch(reason, site.layer, hint="use online: true")
        data = {"name": name, "factors": self._factors(program, site), "folds": not reason}
        return Match(site.layer, data=data)

    def _factors(self, program: Program, site: AttentionSite) -> Tensor:
        """Return the factors of keys, float32 `[Hk, D]`; those of a dry run are ones."""
        calibration = program.calibration
        if calibration is None:
            return torch.ones(site.num_kv_heads, site.head_dim)
        query = _query_reach(program, site, calibration).log2()
        key = calibration.layers[site.owner].envelope.log2()
        exponent = self.alpha * query - (1 - self.alpha) * key
        finite = exponent.nan_to_num(0.0, LARGEST_EXPONENT, -LARGEST_EXPONENT)
        centred = finite - finite.median(-1, keepdim=True).values  # a common factor does nothing
        factors: Tensor = centred.round().clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT).exp2()
        return factors


def _cannot_fold(program: Program, site: AttentionSite, uses: Mapping[str, int]) -> str:
    """Return why factors do not fit into W_q and W_k of all that read these keys, or nothing."""
    owner = program.site(site.owner)
    made = [owner.k, *(reader.q for reader in program.readers(site.owner))]
    if None in made:
        return "queries or keys are not made by a plain linear layer"
    if owner.v is None or (owner.k is not None and share_rows(owner, owner.k, owner.v)):
        return "values may be made by the same weights as keys"
    for projection in made:
        assert projection is not None, "looked at before"
        for name in filter(None, (projection.weight, projection.bias)):
            if uses[name] != 1:
                return f"weight {name} is read in {uses[name]} places"
    return ""


def _query_reach(program: Program, site: AttentionSite, calibration: Calibration) -> Tensor:
    """Return how far queries of each KV head reach in each channel, `[Hk, D]`.

    For a pair of channels that RoPE turns that is the largest radius the ranges allow.
    """
    readers = [calibration.layers[r.layer].q_post for r in program.readers(site.owner)]
    reach = torch.stack([torch.maximum(q.low.abs(), q.high.abs()) for q in readers]).amax(0)
    reach = reach.view(site.num_kv_heads, -1, site.head_dim).amax(1)
    if site.rope is None:
        return reach
    turned = reach[..., : site.rope.rotary_dim]
    pairs = turned.unflatten(-1, (-1, 2) if site.rope.interleaved else (2, -1))
    radius = pairs.norm(dim=-1 if site.rope.interleaved else -2, keepdim=True).expand_as(pairs)
    return torch.cat([radius.flatten(-2), reach[..., site.rope.rotary_dim :]], -1)


def _fold(rewriter: Rewriter, projection: Projection | None, factors: Tensor) -> None:
    """Multiply the rows that make heads, and their biases, by factors `[heads, 1, D]`."""
    assert projection is not None, "match found it"
    index = projection.indices(factors.shape[0], factors.shape[-1]).flatten()
    for name, axis in (
        (projection.weight, int(projection.layout == "in_out")),
        (projection.bias, 0),
    ):
        if name is None:
            continue
        weight = rewriter.program.weights[name]
        rows = index.to(weight.device)
        factor = factors.flatten().to(weight)
        own = weight.index_select(axis, rows).movedim(axis, -1) * factor
        rewriter.set_weight(name, weight.index_copy(axis, rows, own.movedim(-1, axis)))
