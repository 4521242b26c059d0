"""Rotation of many tokens by a block Hadamard matrix, as one product in the dtype of the tokens."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from kvxform.codecs.hadamard import hadamard_matrix


def rotate(x: Tensor, block: int, signs: Tensor | None) -> Tensor:
    """Return `x` `[..., D]` rotated, as `kvx::hadamard` does, in its own dtype.

    The entries of the matrix are powers of two, so that no rounding of theirs scales the result;
    for blocks of 32 and 128 the rest of the factor is applied to `x`.
    """
    if signs is not None:
        x = x * signs.to(x)
    matrix = _matrix(block, x.dtype, x.device)
    is_square = block.bit_length() % 2 == 1  # 1 / sqrt(block) is a power of two
    x = x if is_square else x * 2**-0.5
    rotated = x.reshape(-1, block) @ matrix  # one product of many rows, not many of one row
    return rotated.view(x.shape)


@functools.lru_cache(maxsize=16)
def _matrix(block: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    entry = 2.0 ** -((block.bit_length() - 1) // 2)
    with torch.inference_mode(False):
        return (hadamard_matrix(block).sign() * entry).to(device, dtype)
