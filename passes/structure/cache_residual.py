"""cache-residual: what keys and values are made from is kept instead of them.

`xcache`: each layer caches the normed residual stream x that goes into it, and makes
K = RoPE(W_k x) and V = W_v x when it reads. Less only where x is narrower than K and V of all
heads.

`checkpoint`: of all tokens the id alone is kept, and K and V of the last ones. A step runs the
others through the model once more, layer by layer, so that K and V of one layer exist at a time.
The result is that of the whole cache, to rounding. The price is a prefill in every step, and it is
never hidden: `CachePlan.recomputed_tokens` says how long.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from kvxform.errors import RecipeError
from kvxform.ir.facts import FactValue, Requirement
from kvxform.ir.plan import Layout
from kvxform.ir.program import Program
from kvxform.pass_base import EXACT, GraphPass, Match, NoMatch, Numerics, Rewriter, register_pass
from kvxform.structure.residual_input import cache_input, check_site

WHERE = "cache-residual"
BECAUSE = "codes of K and V say nothing of what they are made from"


@register_pass
@dataclass(frozen=True)
class CacheResidual(GraphPass):
    """Keep what keys and values are made from: token ids, or the input of each layer.

    Attributes:
        mode: `checkpoint` keeps ids and a window, and computes other tokens anew in every step;
            `xcache` keeps the input of each layer where that is narrower than K and V.
        hot_window: Last tokens of each row whose K and V a checkpoint keeps.
    """

    mode: Literal["checkpoint", "xcache"] = "checkpoint"
    hot_window: int = 256
    numerics: ClassVar[Numerics] = EXACT
    requires: ClassVar[tuple[Requirement, ...]] = (
        Requirement("cache.inserted", (True,), because="there would be no cached tokens yet"),
        Requirement("k.codec", ("none",), because=BECAUSE),
        Requirement("v.codec", ("none",), because=BECAUSE),
    )
    source: ClassVar[str] = "KV-Direct, arXiv 2603.19664"

    def __post_init__(self) -> None:
        """Check the window."""
        if self.hot_window < 0:
            rule = "hot_window must not be negative"
            raise RecipeError("KVX107", rule, where=WHERE, got=self.hot_window)

    def ensures(self) -> Mapping[str, FactValue]:
        """State the layout."""
        return {"cache.layout": str(self._layout)} if self.mode == "checkpoint" else {}

    def match(self, program: Program) -> list[Match | NoMatch]:
        """Match the plan once, or each site whose input is narrower than its K and V."""
        plan = program.plan
        if plan is None:
            return [NoMatch("there is no cache", hint="put insert-cache before it")]
        if self.mode == "xcache":
            return [check_site(program, site) for site in program.sites]
        if plan.layout == self._layout:
            return [NoMatch("ids are already what is kept", done=True)]
        return [Match()]

    def rewrite(self, program: Program, match: Match, rewriter: Rewriter) -> None:
        """Set the layout of the plan, or cache the input of one site."""
        assert program.plan is not None, "match found a plan"
        if self.mode == "xcache":
            cache_input(program, match, rewriter)
        else:
            rewriter.set_plan(dataclasses.replace(program.plan, layout=self._layout))

    @property
    def _layout(self) -> Layout:
        return Layout("checkpoint", hot_window=self.hot_window)
