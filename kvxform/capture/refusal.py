"""How a candidate says that it is something else."""

from __future__ import annotations


class NotRaisedError(Exception):
    """A candidate is left alone; the text is the reason, without a full stop."""
