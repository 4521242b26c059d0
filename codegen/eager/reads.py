"""One stream as attention reads it in a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from kvxform.codegen.eager.flush import RuleStep
from kvxform.codegen.eager.folded_body import FoldedBody


@dataclass(frozen=True)
class StreamRead:
    """One stream as the queries of a step see it; tokens of one row in several copies.

    Attributes:
        rule_step: Positions and masks that belong to the copies.
        sink: Exact first tokens `[B, Hk, sink, D]`, or None.
        body: Body `[B, Hk, body_len, D]`, decoded or still encoded, or None if it is empty.
        fresh: Exact copies of the positions from `rule_step.fresh_start` on, `[B, Hk, n, D]`, or
            None if the rule keeps nothing exact past the sink.
    """

    rule_step: RuleStep
    sink: Tensor | None = None
    body: Tensor | FoldedBody | None = None
    fresh: Tensor | None = None

    def turned(self, turn: Callable[[Tensor, int], Tensor]) -> StreamRead:
        """Return the stream in another form, made by `turn(values, position of the first)`."""
        assert not isinstance(self.body, FoldedBody), "check_plan lets no such stream through"
        places = (0, self.rule_step.rule.sink, self.rule_step.fresh_start)
        parts = [
            None if part is None else turn(part, first)
            for part, first in zip((self.sink, self.body, self.fresh), places, strict=True)
        ]
        return StreamRead(self.rule_step, *parts)

    def channels(self, part: slice) -> StreamRead:
        """Return some channels alone."""
        return self.turned(lambda stored, _: stored[..., part])

    def heads(self, first: int, last: int) -> StreamRead:
        """Return heads `first` to `last` - 1 alone."""
        own = (slice(None), slice(first, last))
        return StreamRead(
            self.rule_step,
            None if self.sink is None else self.sink[own],
            None if self.body is None else self.body[own],
            None if self.fresh is None else self.fresh[own],
        )
