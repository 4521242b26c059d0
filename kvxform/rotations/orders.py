"""Hadamard matrices of sizes that are not powers of two.

Paley's constructions give one of order q + 1 for every prime q = 3 mod 4, and one of order
2 (q + 1) for every prime q = 1 mod 4. Kronecker products of these with Sylvester's 2 x 2 matrix
cover the widths of models: 576 = 12 * 12 * 4, 896 = 28 * 32, 2880 = 20 * 36 * 4.

Source: R. E. A. C. Paley, On orthogonal matrices, J. Math. Phys. 12 (1933), 311-320.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from kvxform.codecs.hadamard import hadamard_matrix, make_signs

COST_OF_PASS = 16  # of one pass over a vector, in multiplications a value


@dataclass(frozen=True)
class DenseRotation:
    """An orthogonal matrix Q of any size, applied without being built where that is cheaper.

    Attributes:
        size: Rows of Q.
        kind: `hadamard`: random signs, then a Hadamard matrix; `orthogonal`: a random one.
        seed: Seed of the signs, or of the matrix.
    """

    size: int
    kind: str
    seed: int

    def apply(self, x: Tensor) -> Tensor:
        """Return `x @ Q` for x `[..., size]`, in the dtype of `x`."""
        if self.kind == "orthogonal":
            return x @ random_orthogonal(self.size, self.seed).to(x)
        signs = make_signs(self.size, self.seed)
        factors = hadamard_factors(self.size)
        assert signs is not None, "there is a seed"
        assert factors is not None, "a pass has looked"
        y = (x * signs.to(x)).reshape(-1, *factors)
        for axis, order in enumerate(factors, 1):
            y = (y.movedim(axis, -1) @ hadamard_of_order(order).to(y)).movedim(-1, axis)
        return y.reshape(x.shape)


@functools.cache
def hadamard_factors(size: int) -> tuple[int, ...] | None:
    """Return orders of known Hadamard matrices whose product is `size`, or None.

    The cheapest are taken: a factor costs its order in products, and one pass over the values.
    """
    if size == 1:
        return ()
    best: tuple[int, ...] | None = None
    for order in range(2, size + 1):
        if size % order or not _is_known(order):
            continue
        rest = hadamard_factors(size // order)
        if rest is None:
            continue
        found = tuple(sorted((order, *rest), reverse=True))
        if best is None or _cost(found) < _cost(best):
            best = found
    return best


@functools.cache
def hadamard_of_order(order: int) -> Tensor:
    """Return a normalised Hadamard matrix of one construction, float64 `[order, order]`."""
    if order & (order - 1) == 0:
        return hadamard_matrix(order)
    signs = _paley_one(order - 1) if _is_prime(order - 1) else _paley_two(order // 2 - 1)
    normalised: Tensor = signs / order**0.5
    return normalised


def hadamard_of_width(size: int) -> Tensor:
    """Return the Kronecker product of `hadamard_factors(size)`, float64 `[size, size]`."""
    factors = hadamard_factors(size)
    assert factors is not None, "a pass has looked"
    product = torch.ones(1, 1, dtype=torch.float64)
    for order in factors:
        product = torch.kron(product, hadamard_of_order(order))
    return product


@functools.cache
def random_orthogonal(size: int, seed: int) -> Tensor:
    """Return a matrix drawn evenly from all orthogonal ones, float64 `[size, size]`."""
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(size, size, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    matrix: Tensor = q * r.diagonal().sign()  # without it QR prefers some matrices
    return matrix


def _cost(factors: tuple[int, ...]) -> int:
    return sum(order + COST_OF_PASS for order in factors)


def _is_known(order: int) -> bool:
    if order & (order - 1) == 0:
        return order >= 2
    if order % 4:
        return False
    q, half = order - 1, order // 2 - 1
    return _is_prime(q) or (half % 4 == 1 and _is_prime(half))


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def _jacobsthal(q: int) -> Tensor:
    """Return the quadratic characters of all differences, float64 `[q, q]`: 0, 1 or -1."""
    squares = {i * i % q for i in range(1, q)}
    character = torch.tensor([0] + [1 if i in squares else -1 for i in range(1, q)])
    index = torch.arange(q)
    return character[(index[:, None] - index) % q].double()


def _bordered(q: int, corner: float) -> Tensor:
    """Return the Jacobsthal matrix below a row of ones, right of a column of `corner`."""
    bordered = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    bordered[0, 1:], bordered[1:, 0] = 1, corner
    bordered[1:, 1:] = _jacobsthal(q)
    return bordered


def _paley_one(q: int) -> Tensor:
    """Return I + S, with S skew, for a prime q = 3 mod 4."""
    return torch.eye(q + 1, dtype=torch.float64) + _bordered(q, -1)


def _paley_two(q: int) -> Tensor:
    """Replace entries of a symmetric S by 2 x 2 blocks, for a prime q = 1 mod 4."""
    sylvester = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    eye = torch.eye(q + 1, dtype=torch.float64)
    return torch.kron(_bordered(q, 1), sylvester) + torch.kron(eye, diagonal)
