"""Lloyd-Max tables: for a number of levels, the quantiser of the smallest mean squared error.

Lloyd's iteration on a density that is known: bounds are midpoints of neighbouring levels, levels
are the means of the density between bounds. Both integrals are closed forms:

- a coordinate of a uniform unit vector of D channels, f(t) ~ (1 - t^2)^((D - 3) / 2):
  mass through the incomplete beta function, mean through -(1 - t^2)^((D - 1) / 2) / (D - 1)
- a normal variable of variance 1: mass through the normal distribution, mean through its density
- a Laplace variable of variance 1: both through its density

Samples take the place of the density where there is no closed form.

Source: S. Lloyd, Least squares quantization in PCM, IEEE Trans. Inf. Theory 28 (1982);
TurboQuant, arXiv 2504.19874, section 3.1 (the density of a coordinate).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvxform.codecs.tables import cached_table

VERSION = 1  # of the method; part of the names of tables
STEPS = 50_000
TOLERANCE = 1e-8  # change of a level in one step, for variance 1
Array = NDArray[np.float64]


@functools.cache
def sphere_table(levels: int, dim: int) -> Tensor:
    """Return the levels for a coordinate of a uniform unit vector, ascending, float32 `[levels]`.

    Args:
        levels: Number of levels, at least 2.
        dim: Channels of the vector, at least 4.
    """
    return cached_table(f"sphere-{levels}-{dim}-v{VERSION}", lambda: _sphere(levels, dim))


@functools.cache
def normal_table(levels: int) -> Tensor:
    """Return the levels for a normal variable of variance 1, ascending, float32 `[levels]`."""
    return cached_table(f"normal-{levels}-v{VERSION}", lambda: _normal(levels))


@functools.cache
def laplace_table(levels: int) -> Tensor:
    """Return the levels for a Laplace variable of variance 1, ascending, float32 `[levels]`."""
    return cached_table(f"laplace-{levels}-v{VERSION}", lambda: _laplace(levels))


def fit_levels(samples: Array, levels: int) -> Array:
    """Return levels fitted on samples, ascending, float64 `[levels]`.

    Args:
        samples: Real numbers in any order, many times as many as `levels`.
        levels: Number of levels.
    """
    values = np.sort(samples)
    sums = np.concatenate([[0.0], np.cumsum(values)])

    def means(bounds: Array) -> Array:
        ends = np.searchsorted(values, np.clip(bounds, values[0], None))
        ends[0], ends[-1] = 0, len(values)
        return np.asarray(np.diff(sums[ends]) / np.maximum(np.diff(ends), 1))

    middles = (_middles(levels) * len(values)).astype(int)
    return _iterate(values[middles], means, float(np.std(values)))


def fit_density(
    density: Callable[[Array], Array], low: float, high: float, levels: int, points: int = 200_001
) -> Array:
    """Return levels for a density on an interval, by sums over a fine grid; float64 `[levels]`.

    Args:
        density: Density, up to a factor, at an array of points.
        low: Start of the interval.
        high: End of the interval.
        levels: Number of levels.
        points: Points of the grid.
    """
    grid = np.linspace(low, high, points)
    mass = density(grid)
    masses = np.concatenate([[0.0], np.cumsum(mass)])
    moments = np.concatenate([[0.0], np.cumsum(mass * grid)])

    def means(bounds: Array) -> Array:
        ends = np.searchsorted(grid, bounds)
        ends[0], ends[-1] = 0, points
        return np.diff(moments[ends]) / np.diff(masses[ends])

    start = np.interp(_middles(levels), masses[1:] / masses[-1], grid)
    return _iterate(start, means, high - low)


def bounds_of(table: Tensor) -> Tensor:
    """Return the midpoints between the levels of an ascending table, `[levels - 1]`."""
    return (table[1:] + table[:-1]) / 2


def _sphere(levels: int, dim: int) -> Tensor:
    from scipy.special import betainc, betaincinv  # only where a table is built: slow to import

    def means(bounds: Array) -> Array:
        t = np.clip(bounds, -1, 1)
        mass = np.sign(t) * betainc(0.5, (dim - 1) / 2, t * t) / 2
        factor = math.exp(math.lgamma(dim / 2) - math.lgamma((dim - 1) / 2)) / math.sqrt(math.pi)
        moment = -factor * (1 - t * t) ** ((dim - 1) / 2) / (dim - 1)
        return np.diff(moment) / np.diff(mass)

    share = 2 * _middles(levels) - 1  # a fine quantiser is as dense as the cube root of f
    start = np.sign(share) * np.sqrt(betaincinv(0.5, (dim - 3) / 6 + 1, np.abs(share)))
    return _symmetric(_iterate(start, means, 1 / math.sqrt(dim)))


def _normal(levels: int) -> Tensor:
    from scipy.special import ndtr, ndtri

    def means(bounds: Array) -> Array:
        moment = -np.exp(-bounds * bounds / 2) / math.sqrt(2 * math.pi)
        return np.diff(moment) / np.diff(ndtr(bounds))

    return _symmetric(_iterate(math.sqrt(3) * ndtri(_middles(levels)), means, 1.0))


def _laplace(levels: int) -> Tensor:
    root = math.sqrt(2)

    def means(bounds: Array) -> Array:
        decay = np.exp(-root * np.abs(bounds))
        mass = np.where(bounds < 0, decay, 2 - decay) / 2
        size = np.where(np.isinf(bounds), 0.0, np.abs(bounds))
        moment = -(size + 1 / root) * decay / 2
        return np.diff(moment) / np.diff(mass)

    share = 2 * _middles(levels) - 1
    start = -3 / root * np.sign(share) * np.log1p(-np.abs(share))
    return _symmetric(_iterate(start, means, 1.0))


def _middles(levels: int) -> Array:
    """Return the middles of `levels` equal parts of [0, 1]."""
    return (np.arange(levels) + 0.5) / levels


def _iterate(start: Array, means: Callable[[Array], Array], scale: float) -> Array:
    levels = start
    for _ in range(STEPS):
        bounds = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
        better = means(bounds)
        change = np.abs(better - levels).max()
        levels = better
        if change < TOLERANCE * scale:
            break
    return levels


def _symmetric(levels: Array) -> Tensor:
    """Remove the rounding that makes the two halves differ."""
    return torch.from_numpy((levels - levels[::-1]) / 2)
