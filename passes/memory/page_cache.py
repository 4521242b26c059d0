"""page-cache: cached tokens live in pages of a fixed number of tokens, shared by all sequences.

Legal once there is a cache, if no group of tokens that is encoded together crosses a page. Only
the plan changes; the graph does not know where rows live.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from kvxform.errors import PassError, RecipeError
from kvxform.ir.facts import FactValue, Requirement
from kvxform.ir.plan import Layout
from kvxform.ir.program import Program
from kvxform.pass_base import EXACT, GraphPass, Match, NoMatch, Numerics, Rewriter, register_pass

PAGE_SIZES = (16, 32, 64, 128, 256)


@register_pass
@dataclass(frozen=True)
class PageCache(GraphPass):
    """Allocate the cache in pages instead of one run a sequence.

    Attributes:
        page_size: Tokens a page: a power of two from 16 to 256.
    """

    page_size: int = 64
    numerics: ClassVar[Numerics] = EXACT
    requires: ClassVar[tuple[Requirement, ...]] = (
        Requirement("cache.inserted", (True,), because="there would be no cache to page yet"),
    )
    source: ClassVar[str] = "PagedAttention, Kwon et al., arXiv 2309.06180, section 4"

    def __post_init__(self) -> None:
        """Check the page size on its own."""
        if self.page_size not in PAGE_SIZES:
            raise RecipeError(
                "KVX107",
                "page_size must be a power of two from 16 to 256",
                where="page-cache",
                got=repr(self.page_size),
            )

    def ensures(self) -> Mapping[str, FactValue]:
        """State the layout."""
        return {"cache.layout": str(self._layout)}

    def match(self, program: Program) -> list[Match | NoMatch]:
        """Match the plan once.

        Raises:
            PassError: KVX205 if a group of tokens would cross a page.
        """
        plan = program.plan
        if plan is None:
            return [NoMatch("there is no cache", hint="put insert-cache before it")]
        if plan.layout == self._layout:
            return [NoMatch("already paged", done=True)]
        if plan.layout.kind == "checkpoint":
            hint = "leave out page-cache, or cache-residual"
            return [NoMatch("tokens out of the window are computed anew, not kept", hint=hint)]
        if self.page_size % plan.granule():
            raise PassError(
                "KVX205",
                f"page_size must be a multiple of the {plan.granule()} tokens that are encoded "
                "together",
                where="page-cache",
                got=self.page_size,
                hint="use larger pages, or a smaller group in quantize-kv",
            )
        return [Match()]

    def rewrite(self, program: Program, match: Match, rewriter: Rewriter) -> None:
        """Set the layout of the plan."""
        assert program.plan is not None, "match found a plan"
        rewriter.set_plan(dataclasses.replace(program.plan, layout=self._layout))

    @property
    def _layout(self) -> Layout:
        return Layout("paged", self.page_size)
