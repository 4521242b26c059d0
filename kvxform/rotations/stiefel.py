"""Descent over orthogonal matrices: gradient steps along Cayley transforms.

Source: Li et al., Efficient Riemannian optimization on the Stiefel manifold via the Cayley
transform, arXiv 2002.01113, algorithm 1, as SpinQuant, arXiv 2405.16406, section 3.2, uses it. The
transform is solved for, not iterated, so that matrices stay orthogonal to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class CayleySgd:
    """Gradient descent with momentum for stacks of orthogonal matrices.

    Args:
        points: Where to start, each `[n, D, D]`, orthogonal.
        momentum: Share of the last direction that is kept.

    Attributes:
        points: Where it is, float64, each `[n, D, D]`.
    """

    def __init__(self, points: Sequence[Tensor], *, momentum: float = 0.0) -> None:
        self.points = [point.detach().double() for point in points]
        self._momentum = momentum
        self._directions = [torch.zeros_like(point) for point in self.points]

    def step(self, gradients: Sequence[Tensor], learning_rate: float) -> None:
        """Move against `gradients`, each shaped like its point.

        A matrix moves by `learning_rate` at most, less where its direction is steep.
        """
        for i, (point, gradient) in enumerate(zip(self.points, gradients, strict=True)):
            direction = self._momentum * self._directions[i] - gradient.to(point)
            skew = _skew(point, direction)
            steepness = skew.abs().sum(-2).amax(-1)[..., None, None]
            length = (1 / (steepness + 1e-8)).clamp_max(learning_rate)
            self.points[i] = cayley(point, length * skew)
            self._directions[i] = skew @ point


def cayley(point: Tensor, skew: Tensor) -> Tensor:
    """Return `(I - W / 2)^-1 (I + W / 2) R`: as orthogonal as R, for skew-symmetric W.

    Args:
        point: R, `[..., D, D]`.
        skew: W, `[..., D, D]`.
    """
    eye = torch.eye(point.shape[-1], dtype=point.dtype, device=point.device)
    moved: Tensor = torch.linalg.solve(eye - skew / 2, (eye + skew / 2) @ point)
    return moved


def _skew(point: Tensor, direction: Tensor) -> Tensor:
    """Return the skew matrix W whose `W R` is the part of `direction` along the manifold."""
    half = direction @ point.mT - 0.5 * point @ (point.mT @ direction @ point.mT)
    return half - half.mT
