"""Orthogonal bases of heads joined to one vector, the components that matter most first.

`principal_components`: the eigenvectors of the covariance. Of all linear maps to r channels and
back they have the smallest squared error (Eckart and Young), so they are what training such maps
layer by layer ends at, whatever it starts from.

`activation_components`: of a projection y = W x, the left singular vectors of W S, where S has the
roots of the mean magnitudes of the channels of x on its diagonal (ASVD, arXiv 2312.05821). With
W S = U Z V^T the factors of CSKV are A = Z^(1/2) V^T S^-1 = Z^(-1/2) U^T W and B = U Z^(1/2). So
A x is U^T y but for the factors of its channels, and B A x = U U^T y.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Components:
    """An orthogonal basis of vectors of n channels, and what samples are in it; all float64.

    Attributes:
        basis: Components as columns, `[n, n]`; stored = x @ basis.
        mean: Mean of each component, `[n]`.
        energy: Mean square of each component, `[n]`.
    """

    basis: Tensor
    mean: Tensor
    energy: Tensor

    @classmethod
    def identity(cls, size: int) -> Components:
        """Return the basis that changes nothing, of which no samples are known."""
        zeros = torch.zeros(size, dtype=torch.float64)
        return cls(torch.eye(size, dtype=torch.float64), zeros, zeros)

    def lost(self, rank: int, *, has_mean: bool) -> float:
        """Return the energy of samples that is lost without the components from `rank` on.

        Args:
            rank: Components that are kept.
            has_mean: Whether the others come back as their mean rather than as zero.
        """
        own = self.energy - self.mean.square() if has_mean else self.energy
        return float(own[rank:].clamp_min(0).sum())


def principal_components(x: Tensor, *, centred: bool) -> Components:
    """Return the eigenvectors of the covariance, or of the second moments, of samples `[N, n]`."""
    wide = x.double()
    own = wide - wide.mean(0) if centred else wide
    return _in_basis(wide, _eigenvectors(own.T @ own / len(own)))


def activation_components(weight: Tensor, magnitude: Tensor, x: Tensor) -> Components:
    """Return the left singular vectors of W S; see the module.

    Args:
        weight: W, `[n, in]`.
        magnitude: Mean magnitudes of the channels that W multiplies, `[in]`.
        x: Samples of what it makes, `[N, n]`.
    """
    scaled = weight.double() * magnitude.double().sqrt()
    return _in_basis(x.double(), _eigenvectors(scaled @ scaled.T))


def _in_basis(x: Tensor, basis: Tensor) -> Components:
    components = x @ basis
    return Components(basis, components.mean(0), components.square().mean(0))


def _eigenvectors(matrix: Tensor) -> Tensor:
    """Return eigenvectors as columns, largest eigenvalue first, the largest entry positive."""
    vectors = torch.linalg.eigh(matrix).eigenvectors.flip(-1)
    largest = vectors.abs().argmax(-2, keepdim=True)
    signed: Tensor = vectors * vectors.gather(-2, largest).sign()
    return signed
