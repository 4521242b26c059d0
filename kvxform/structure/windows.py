"""Pieces of the calibration text."""

from __future__ import annotations

from torch import Tensor


def spread_windows(token_ids: Tensor, tokens: int, window: int) -> Tensor:
    """Return windows spread evenly over a text, int64 `[windows, window]`.

    Args:
        token_ids: The text, int64 `[rows, length]`; each row is a sequence of its own.
        tokens: Tokens wanted; whole windows are taken, one at least.
        window: Tokens of one; shorter if the rows are.
    """
    window = min(window, token_ids.shape[1])
    pieces = token_ids.unfold(1, window, window).flatten(0, 1)
    count = min(max(1, tokens // window), len(pieces))
    return pieces[[len(pieces) * i // count for i in range(count)]]
