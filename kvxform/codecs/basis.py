"""The basis of a cached stream: its own, a block Hadamard, dense matrices, or factors alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvxform.codecs.hadamard import block_hadamard, check_block, largest_block, make_signs

Matrices = Mapping[str, Tensor]


@dataclass(frozen=True)
class Basis:
    """The basis a stream is expressed in: stored = x @ R.

    Attributes:
        kind: `identity`, `hadamard`, `matrix`, or `scale`: a factor for each channel.
        block: Channels rotated together; a power of two that divides head_dim (hadamard only).
        seed: Seed of random signs applied before the transform, or None for no signs.
        weight: Name of R among the weights of the program: orthogonal matrices `[Hk / heads,
            heads * D, heads * D]`, or factors `[Hk, 1, D]` (matrix and scale only).
        heads: KV heads that are rotated together (matrix only).
        inverse: Name of the inverses of R among the weights, where the stream is turned back when
            it is read, and R need not be orthogonal (matrix only). None where queries or weights
            have absorbed the inverse.
    """

    kind: str = "identity"
    block: int = 0
    seed: int | None = None
    weight: str | None = None
    heads: int = 1
    inverse: str | None = None

    def __str__(self) -> str:
        """Return the fact value: `identity`, `hadamard(64, seed=1)`, `matrix(4 heads)`, ..."""
        if self.kind == "hadamard":
            seed = "" if self.seed is None else f", seed={self.seed}"
            return f"{self.kind}({self.block}{seed})"
        return self.kind if self.heads == 1 else f"{self.kind}({self.heads} heads)"

    def rotate(self, x: Tensor, matrices: Matrices | None = None) -> Tensor:
        """Return `x @ R` along the last axis, in the dtype of `x`.

        Args:
            x: `[..., D]`, or `[..., Hk, T, D]` where R has a weight.
            matrices: Where that weight is found.
        """
        if self.kind == "identity":
            return x
        if self.kind == "matrix":
            return rotate_heads(x, self._find(matrices))
        if self.kind == "scale":
            return x * self._find(matrices).to(x)
        return block_hadamard(x, self.block, make_signs(x.shape[-1], self.seed))

    def unrotate(self, x: Tensor, matrices: Matrices | None = None) -> Tensor:
        """Return `x @ R^-1`: the inverse of `rotate`."""
        if self.kind == "identity":
            return x
        if self.kind == "matrix" and self.inverse is not None:
            assert matrices is not None, "used with the weights of the program"
            return rotate_heads(x, matrices[self.inverse])
        if self.kind == "matrix":
            return rotate_heads(x, self._find(matrices).mT)
        if self.kind == "scale":
            return x / self._find(matrices).to(x)
        y = block_hadamard(x, self.block, None)
        signs = make_signs(x.shape[-1], self.seed)
        return y if signs is None else y * signs.to(y)

    def rotate_gradient(self, gradient: Tensor, matrices: Matrices | None = None) -> Tensor:
        """Return `gradient @ R^-T`: what a gradient by x is by `x @ R`."""
        if self.kind == "scale":
            return self.unrotate(gradient, matrices)
        if self.kind == "matrix" and self.inverse is not None:
            assert matrices is not None, "used with the weights of the program"
            return rotate_heads(gradient, matrices[self.inverse].mT)
        return self.rotate(gradient, matrices)  # R is orthogonal

    def matrix(self, dim: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return R of a basis that is the same for all heads, shape `[dim, dim]`."""
        return self.rotate(torch.eye(dim, dtype=dtype))

    def _find(self, matrices: Matrices | None) -> Tensor:
        assert matrices is not None, "used with the weights of the program"
        assert self.weight is not None, "it has a weight"
        return matrices[self.weight]


def rotate_heads(x: Tensor, matrices: Tensor) -> Tensor:
    """Return `x @ R`, with an R of its own for each KV head, or for each run of KV heads.

    Args:
        x: `[..., H, S, D]`.
        matrices: `[Hk, D, D]` and H a multiple of Hk: head h uses matrix `h // (H / Hk)`; or
            `[H / g, g * D, g * D]`, where g heads are joined to one vector.

    Returns:
        Same shape and dtype as `x`; computed in the wider of the two dtypes.
    """
    heads, new, width = x.shape[-3:]
    count, size, _ = matrices.shape
    wide = x.to(torch.promote_types(x.dtype, matrices.dtype))
    groups = wide.unflatten(-3, (count, heads // count))
    joined = size != width
    # [..., H / g, S, g * D], or the query heads of a KV head as rows: [..., Hk, H / Hk * S, D]
    rows = groups.transpose(-3, -2).flatten(-2) if joined else groups.flatten(-3, -2)
    # a plain product would copy the matrices for every sequence
    turned: Tensor = torch.einsum("...knd,kde->...kne", rows, matrices.to(wide))
    if joined:
        groups = turned.unflatten(-1, (heads // count, width)).transpose(-3, -2)
    else:
        groups = turned.unflatten(-2, (heads // count, new))
    rotated: Tensor = groups.flatten(-4, -3).to(x.dtype)
    return rotated


def make_basis(block: int | None, seed: int | None, dim: int, where: str, at: str) -> Basis:
    """Return the Hadamard basis of vectors of `dim` channels.

    Args:
        block: Channels rotated together; None means the largest block that fits.
        seed: Seed of random signs, or None.
        dim: Channels of one head.
        where: Pass that asks, for the error text.
        at: Module path of the site, for the error text.

    Raises:
        PassError: KVX204, see `check_block`.
    """
    block = largest_block(dim) if block is None else block
    check_block(block, dim, where, at)
    return Basis("hadamard", block, seed)


def basis_fact(block: int | None, seed: int | None) -> str:
    """Return the fact value of options; only the kind where the size depends on the model."""
    return "hadamard" if block is None else str(Basis("hadamard", block, seed))
