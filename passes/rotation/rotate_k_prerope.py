"""rotate-k-prerope: keys are cached before RoPE, rotated over several heads and put in order.

RotateKV: a Hadamard matrix over the channels of several KV heads spreads outliers over all of them;
then all channels of all heads are sorted by a statistic of the calibration, so that channels which
look alike fall into the same group of a codec. Both are undone when keys are read, before RoPE.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvxform.codecs.basis import Basis
from kvxform.errors import RecipeError
from kvxform.ir.facts import FactValue, Requirement
from kvxform.ir.fitting import stream_statistics
from kvxform.ir.program import AttentionSite, Program
from kvxform.pass_base import EXACT, GraphPass, Match, NoMatch, Numerics, Rewriter, register_pass
from kvxform.rotations.at_read import heads_together, turn_at_read
from kvxform.rotations.orders import hadamard_factors, hadamard_of_width

STATISTICS = ("sum", "abs_sum", "absmax", "none")


@register_pass
@dataclass(frozen=True)
class RotateKPrerope(GraphPass):
    """Rotate keys before RoPE over several heads, then reorder their channels.

    Attributes:
        heads: KV heads that are rotated together, at most; the largest number that divides theirs.
        order: What channels are sorted by, in rising order: sum of values as in the code of the
            authors, sum of magnitudes, or largest magnitude as in their text; `none` leaves them.
    """

    heads: int = 4
    order: Literal["sum", "abs_sum", "absmax", "none"] = "sum"
    numerics: ClassVar[Numerics] = EXACT
    requires: ClassVar[tuple[Requirement, ...]] = (
        Requirement(
            "k.rope", ("pre",), because="RoPE would mix channels that are no longer its pairs"
        ),
        Requirement("k.codec", ("none",), because="codes cannot change their basis"),
        Requirement("k.basis", ("identity",), because="rotations do not stack"),
    )
    source: ClassVar[str] = "RotateKV, arXiv 2501.16383, sections 3.1 and 3.2"

    def __post_init__(self) -> None:
        """Check the options on their own."""
        if not (isinstance(self.heads, int) and self.heads >= 1):
            rule = "heads must be a number of KV heads, at least 1"
            raise RecipeError("KVX107", rule, where=self.pass_name(), got=repr(self.heads))
        if self.order not in STATISTICS:
            rule = f"order must be {', '.join(STATISTICS)}"
            raise RecipeError("KVX107", rule, where=self.pass_name(), got=repr(self.order))

    def ensures(self) -> Mapping[str, FactValue]:
        """State the basis of keys."""
        return {"k.basis": "matrix"}

    @property
    def needs_calibration(self) -> bool:
        """Whether channels are put in order."""
        return self.order != "none"

    def match(self, program: Program) -> list[Match | NoMatch]:
        """Match every site that owns keys from before RoPE."""
        return [self._check(program, site) for site in program.sites]

    def rewrite(self, program: Program, match: Match, rewriter: Rewriter) -> None:
        """Rotate new keys, and let attention undo it."""
        assert match.layer is not None, "every match is at a site"
        matrices = match.data["matrices"]
        turn_at_read(rewriter, match.layer, "key", matrices, matrices.mT.contiguous())

    def _check(self, program: Program, site: AttentionSite) -> Match | NoMatch:
        if site.shared_with is not None:
            return NoMatch(f"keys are those of layer {site.owner}", site.layer, done=True)
        if site.k_basis != Basis():
            is_own = (site.k_basis.weight or "").startswith("rotate_k_prerope.")
            reason = f"keys are in basis {site.k_basis}, and rotations do not stack"
            return NoMatch("already rotated" if is_own else reason, site.layer, done=is_own)
        if program.plan is None or program.plan.site(site.layer).key.rope != "pre":
            return NoMatch("keys are not cached before RoPE", site.layer)
        heads = heads_together(site.num_kv_heads, self.heads)
        while hadamard_factors(heads * site.head_dim) is None and heads > 1:
            heads = heads_together(site.num_kv_heads, heads - 1)
        size = heads * site.head_dim
        if hadamard_factors(size) is None:
            return NoMatch(f"no Hadamard matrix of order {size} is known", site.layer)
        runs = site.num_kv_heads // heads
        rotation = hadamard_of_width(size).expand(runs, -1, -1)
        if self.order == "none":
            return Match(site.layer, data={"matrices": rotation})
        whole = torch.block_diag(*rotation)  # [Hk D, Hk D]
        order = self._channel_order(program, site.layer, whole)
        return Match(site.layer, data={"matrices": whole[:, order][None]})

    def _channel_order(self, program: Program, layer: int, rotation: Tensor) -> Tensor:
        """Return channels of all heads in rising order; as they come in a dry run."""
        if program.calibration is None:
            return torch.arange(len(rotation))
        samples = stream_statistics(program, layer, "key", "pre").samples
        x = samples.transpose(0, 1).flatten(1).double() @ rotation  # [N, Hk D]
        statistics = {"sum": x.sum(0), "abs_sum": x.abs().sum(0), "absmax": x.abs().amax(0)}
        return statistics[self.order].argsort(stable=True)
