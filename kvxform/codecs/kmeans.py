"""Weighted k-means of numbers: tables for quantisers that are fitted on samples."""

from __future__ import annotations

import torch
from torch import Tensor

ITERATIONS = 300
SMALLEST_MOVE = 1e-5  # of the range of the levels; the error no longer changes by then


def weighted_kmeans(x: Tensor, weights: Tensor, count: int) -> Tensor:
    """Return the levels of smallest weighted squared error that Lloyd's iteration finds.

    It starts from levels of equal distance and from levels of equal weight, and keeps the better
    end. An iteration never makes the error larger, so the result is at least as good as equal
    distances between the extremes.

    Args:
        x: Samples, `[n]`, any float dtype.
        weights: Their weights, not negative, `[n]`; all alike if they are all zero.
        count: Levels, k.

    Returns:
        float64 `[k]`, sorted.
    """
    if not bool((weights > 0).any()):
        weights = torch.ones_like(x)
    ordered, order = x.double().sort()
    sums = _Sums(ordered, weights.double()[order])
    fractions = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    spread = torch.linspace(float(ordered[0]), float(ordered[-1]), count, dtype=torch.float64)
    found = [sums.descend(start) for start in (spread, sums.quantiles(fractions))]
    errors = [float(sums.error(levels)) for levels in found]
    return found[errors.index(min(errors))]


class _Sums:
    """Sorted samples with running sums, so that the moments of a cell are differences."""

    def __init__(self, x: Tensor, weights: Tensor) -> None:
        self.x = x
        zero = torch.zeros(1, dtype=torch.float64)
        self.moments = torch.stack(
            [torch.cat([zero, (weights * x**power).cumsum(0)]) for power in range(3)]
        )  # [3, n + 1]

    def quantiles(self, fractions: Tensor) -> Tensor:
        """Return the samples below which these fractions of the weight lie."""
        total = self.moments[0, -1]
        index = torch.searchsorted(self.moments[0, 1:].contiguous(), fractions * total)
        return self.x[index.clamp_max(len(self.x) - 1)]

    def descend(self, levels: Tensor) -> Tensor:
        """Return the end of Lloyd's iteration from `levels` `[k]`, sorted."""
        for _ in range(ITERATIONS):
            weight, first, _ = self._cells(levels)
            means = torch.where(weight > 0, first / weight.clamp_min(1e-300), levels)
            means = means.sort().values
            moved = float((means - levels).abs().max())
            levels = means
            if moved <= SMALLEST_MOVE * float(levels[-1] - levels[0]):
                break
        return levels

    def error(self, levels: Tensor) -> Tensor:
        """Return the weighted squared error of `levels` `[k]`."""
        weight, first, second = self._cells(levels)
        errors: Tensor = second - 2 * levels * first + levels.square() * weight
        return errors.sum()

    def _cells(self, levels: Tensor) -> Tensor:
        """Return weight, first and second moment of each cell, `[3, k]`."""
        bounds = torch.searchsorted(self.x, (levels[1:] + levels[:-1]) / 2)
        ends = torch.tensor([len(self.x)])
        at = torch.cat([torch.zeros(1, dtype=bounds.dtype), bounds, ends])
        return self.moments[:, at].diff(dim=1)
