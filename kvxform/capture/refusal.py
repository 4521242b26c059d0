"""How a candidate says that it is something else."""

from __future__ import annotations

from torch import fx


class NotRaisedError(Exception):
    """A candidate is left alone.

    Args:
        reason: Why, without a full stop.
        node: The first node that differs from what was expected, if one can be named.
        hint: What would have to change in the model, or empty.
    """

    def __init__(self, reason: str, *, node: fx.Node | None = None, hint: str = "") -> None:
        super().__init__(reason)
        self.reason, self.node, self.hint = reason, node, hint
