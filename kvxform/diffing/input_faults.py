"""How what a model hands to its cache differs: other heads, a factor, or other angles of RoPE."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Return the largest difference as a share of the largest expected value."""
    worst = (got.double() - expected.to(got.device).double()).abs().max()
    return float(worst / expected.double().abs().max().clamp_min(1e-30).to(worst.device))


def explain_inputs(x: Tensor, y: Tensor, stream: str, tolerance: float) -> str:
    """Say how `y` came from `x`, both `[B, H, S, D]` with token 0 of every row first, or nothing.

    Args:
        x: What A handed in.
        y: What B handed in.
        stream: `query`, `key` or `value`.
        tolerance: Relative error that is rounding.
    """
    return (
        _factor(x, y, tolerance)
        or _other_heads(x, y, tolerance)
        or (_angles(x, y, tolerance) if stream != "value" else "")
    )


def _factor(x: Tensor, y: Tensor, tolerance: float) -> str:
    factor = float((x.double() * y.double()).sum() / x.double().square().sum().clamp_min(1e-30))
    same = relative_error(y, factor * x) <= tolerance * max(1.0, abs(factor))
    return f"times {factor:.4g}" if same and abs(factor - 1) > tolerance else ""


def _other_heads(x: Tensor, y: Tensor, tolerance: float) -> str:
    heads = x.shape[1]
    order = [
        next((i for i in range(heads) if relative_error(y[:, h], x[:, i]) <= tolerance), -1)
        for h in range(heads)
    ]
    if -1 in order or order == list(range(heads)):
        return ""
    return f"heads {', '.join(map(str, order))} in the place of 0 to {heads - 1}"


def _angles(x: Tensor, y: Tensor, tolerance: float) -> str:
    """Say if every vector is as long as before, but points elsewhere: it was turned otherwise."""
    lengths, others = (
        torch.linalg.vector_norm(x.double(), dim=-1),
        torch.linalg.vector_norm(y.double(), dim=-1),
    )
    return "turned by other angles" if relative_error(others, lengths) <= tolerance else ""
