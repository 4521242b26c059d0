"""Calibrated transform coding: a basis in which errors count alike, and bits where they count most.

With g the gradient of the loss at a stored vector x, an error e costs about E[(g e)^2] / 2. So with
F = E[g g^T] and A = F^(1/2), errors of y = (x - mean) A all count alike, and the eigenvectors U of
the covariance of y make components that are not correlated. Stored is c = x T, T = A U W^(-1/2),
where W holds the eigenvalues, so that every component has deviation 1; x = c T^(-1). An error of a
share s of the variance of component i costs s W_i: that is what bits are bought with.

Without gradients A is the identity, and T the eigenbasis of x, scaled.

Source: reverse water-filling, Cover and Thomas, Elements of Information Theory, section 10.3.3; the
gradient as a weight: KVQuant, arXiv 2401.18079, section 3.3. Their combination is our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvxform.codecs.klt import MOST_BITS, unit_errors
from kvxform.codecs.klt_trellis import trellis_errors

SMALLEST_SHARE = 1e-9  # of the largest eigenvalue; keeps the transform invertible


@dataclass(frozen=True, eq=False)
class Transform:
    """The basis of one run of heads with n channels; all float64.

    Attributes:
        forward: T, `[n, n]`; stored = x @ forward.
        inverse: Its inverse.
        mean: Mean of the components, `[n]`.
        cost: Of an error as large as a component, `[n]`, falling.
    """

    forward: Tensor
    inverse: Tensor
    mean: Tensor
    cost: Tensor

    @classmethod
    def identity(cls, size: int) -> Transform:
        """Return the transform that changes nothing."""
        eye = torch.eye(size, dtype=torch.float64)
        return cls(eye, eye, torch.zeros(size).double(), torch.ones(size).double())


def fit_transform(x: Tensor, gradients: Tensor | None, ridge: float) -> Transform:
    """Return the transform of vectors of which `x` are samples.

    Args:
        x: `[N, n]`, N several times n.
        gradients: Of the loss at each of them, `[N, n]`, or None to count all errors alike.
        ridge: Added to F, as a share of its mean eigenvalue: how much to distrust it.
    """
    mean, covariance = x.double().mean(0), torch.cov(x.double().T)
    root = back = torch.eye(len(mean), dtype=torch.float64)
    if gradients is not None:
        g = gradients.double()
        found, vectors = torch.linalg.eigh(g.T @ g / len(g))
        values = (found + ridge * found.mean()).clamp_min(1e-30)
        root = (vectors * values.sqrt()) @ vectors.T
        back = (vectors * values.rsqrt()) @ vectors.T
    found, vectors = torch.linalg.eigh(root @ covariance @ root)
    found, vectors = found.flip(0), vectors.flip(1)
    cost = found.clamp_min(float(found[0].clamp_min(1e-30)) * SMALLEST_SHARE)
    forward = root @ (vectors * cost.rsqrt())
    inverse = (vectors * cost.sqrt()).T @ back
    return Transform(forward, inverse, mean @ forward, cost)


def share_bytes(
    costs: Sequence[Tensor],
    overhead: Sequence[int],
    total: int,
    tails: str,
    *,
    trellis: bool = False,
) -> Bits:
    """Return the bits of each component of each row, so that rows have whole bytes.

    Bits are bought one byte at a time, where eight bits lower the cost most. The benefit of a bit
    of a component falls with every bit that it has, so the greedy choice is the best one.

    Args:
        costs: Of the components of each row, `[n]`.
        overhead: Bits of each row that are no bits of components, at most 8.
        total: Bytes of all rows; every row gets one at least.
        tails: Tables that the components are coded with; see `KltCodec`.
        trellis: Whether codec `klt-trellis` codes them.
    """
    errors = trellis_errors(tails) if trellis else unit_errors(tails)
    steps = -torch.diff(errors)  # what each bit takes off the error of a component
    benefits = [(cost[:, None] * steps).flatten() for cost in costs]
    order = [benefit.argsort(descending=True, stable=True) for benefit in benefits]
    offers = []
    for row, (benefit, best) in enumerate(zip(benefits, order, strict=True)):
        own = torch.cat([torch.zeros(overhead[row], dtype=torch.float64), benefit[best]])
        offer = torch.nn.functional.pad(own, (0, -len(own) % 8)).unflatten(0, (-1, 8)).sum(-1)
        offer[0] = torch.inf  # a row cannot be empty
        offers.append(offer.cummin(0).values)
    flat = torch.cat(offers)
    taken = torch.zeros(len(flat), dtype=torch.bool)
    taken[flat.argsort(descending=True, stable=True)[: max(total, len(costs))]] = True
    counts = [int(own.sum()) for own in taken.split([len(offer) for offer in offers])]
    found = []
    for best, cost, bits, count in zip(order, costs, overhead, counts, strict=True):
        components = best[: 8 * count - bits] // MOST_BITS
        found.append(torch.bincount(components, minlength=len(cost)))
    return found


Bits = list[Tensor]
