"""Norms of vectors as they are stored: float16, never zero."""

from __future__ import annotations

from torch import Tensor

SMALLEST_NORM = 2.0**-14  # smallest normal float16: below it, rounding would cost more than codes
LARGEST_NORM = 65504.0


def stored_norm(norm: Tensor) -> Tensor:
    """Return `norm` as float16, clamped to its normal range; zeros stay divisible."""
    return norm.clamp(SMALLEST_NORM, LARGEST_NORM).half()
