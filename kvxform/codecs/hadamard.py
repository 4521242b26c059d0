"""Orthogonal Hadamard transforms of the channel axis, in blocks.

Source: QuaRot, arXiv 2404.00456, section 4; block form: SAW-INT4, arXiv 2604.19157, section 3.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from kvxform.errors import PassError


def largest_block(dim: int) -> int:
    """Return the largest power of two that divides `dim`."""
    return dim & -dim


def is_block(block: int | None) -> bool:
    """Return whether `block` can be an option: None, or a power of two, at least 2."""
    return block is None or (isinstance(block, int) and block >= 2 and block & (block - 1) == 0)


def check_block(block: int, dim: int, where: str, at: str = "") -> None:
    """Raise PassError KVX204 unless `block` is a power of two, at least 2, that divides `dim`."""
    if not is_block(block) or dim % block:
        largest = largest_block(dim)
        raise PassError(
            "KVX204",
            f"a Hadamard block must be a power of two that divides head_dim {dim}",
            where=where,
            got=block,
            at=at,
            hint=f"use block: {largest}" if largest > 1 else "leave the rotation out",
        )


@functools.cache
def make_signs(dim: int, seed: int | None) -> Tensor | None:
    """Return `dim` random signs, float32 of -1 and 1 on the CPU, or None if `seed` is None."""
    if seed is None:
        return None
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (dim,), generator=generator).float() * 2 - 1


def block_hadamard(x: Tensor, block: int, signs: Tensor | None) -> Tensor:
    """Multiply each run of `block` channels of the last axis by the normalised Hadamard matrix.

    Args:
        x: Values, shape `[..., D]`, any float dtype; D a multiple of `block`.
        block: Power of two; Sylvester order, so the matrix is symmetric and its own inverse.
        signs: Optional signs `[D]`, multiplied in before the transform.

    Returns:
        Same shape and dtype as `x`; float16 and bfloat16 are computed in float32.
    """
    dtype = x.dtype
    if dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    if signs is not None:
        x = x * signs.to(x)
    h = hadamard_matrix(block).to(x)
    runs = x.reshape(*x.shape[:-1], -1, block)  # [..., D] -> [..., D / block, block]
    y: Tensor = (runs @ h).reshape(x.shape)
    return y.to(dtype)


@functools.cache
def hadamard_matrix(n: int) -> Tensor:
    """Return the normalised Sylvester-Hadamard matrix, float64 `[n, n]`, n a power of two."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.shape[0] < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    normalised: Tensor = h / n**0.5
    return normalised
