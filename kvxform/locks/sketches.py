"""Sketches: a few numbers that stand for a tensor, from which differences can be estimated.

A number of a sketch is the sum over a tensor with random signs, one factor a token and one a
channel. For two tensors, the mean square of the differences of their numbers is, in expectation,
the squared distance of the tensors. Signs come from Python's own generator: the same everywhere.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sketch:
    """What is kept of a tensor `[tokens, *shape]`.

    Attributes:
        shape: Sizes of one token.
        rms: Root mean square of the values.
        steps: Numbers of the sketch, divided by what is expected of values with this root mean
            square, in steps of the grid.
    """

    shape: tuple[int, ...]
    rms: float
    steps: tuple[int, ...]

    def distance(self, other: Sketch, grid: float, other_grid: float) -> float | None:
        """Return the root mean square of the difference over that of this tensor, estimated.

        Args:
            other: Sketch of the other tensor, on the same tokens.
            grid: One step of this sketch.
            other_grid: One step of the other one.

        Returns:
            None if the tensors have other shapes. Infinite if only this tensor is zero.
        """
        if self.shape != other.shape or len(self.steps) != len(other.steps):
            return None
        pairs = zip(self.steps, other.steps, strict=True)
        one, two = self.rms * grid, other.rms * other_grid
        total = sum((a * one - b * two) ** 2 for a, b in pairs)
        if total == 0:
            return 0.0
        return math.sqrt(total / len(self.steps)) / self.rms if self.rms else math.inf


def make_sketch(x: Tensor, name: str, count: int, grid: float) -> Sketch:
    """Return the sketch of a tensor.

    Args:
        x: `[tokens, *shape]`, float64.
        name: What it is; other names have other signs.
        count: Numbers of the sketch.
        grid: One step.
    """
    flat = x.reshape(x.shape[0], -1)  # [tokens, channels]
    rms = float(f"{float(flat.square().mean().sqrt()):.6g}")
    left = torch.stack([_signs(f"{name} tokens {i}", flat.shape[0]) for i in range(count)])
    right = torch.stack([_signs(f"{name} channels {i}", flat.shape[1]) for i in range(count)])
    sums = ((left @ flat) * right).sum(1)
    unit = max(rms, 1e-300) * math.sqrt(flat.numel()) * grid
    steps = tuple(round(value) for value in (sums / unit).tolist())
    return Sketch(tuple(x.shape[1:]), rms, steps)


def _signs(seed: str, count: int) -> Tensor:
    """Return `count` signs, float64 of -1 and 1, by a text."""
    bits = random.Random(seed).getrandbits(count)
    data = torch.frombuffer(bytearray(bits.to_bytes((count + 7) // 8, "little")), dtype=torch.uint8)
    spread = (data[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return 1 - 2 * spread.flatten()[:count].double()
