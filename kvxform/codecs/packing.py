"""Codes of 2, 3, 4 and 8 bits in bytes, along the channel axis.

Packing is split-half, generalised: with n = 8 / bits codes a byte, byte j holds the channels
j, j + D / n, j + 2 D / n, ..., the first one in the lowest bits. Unpacking is then a shift, a mask
and a concatenation; no two channels of a byte are neighbours, so nothing has to be interleaved.

Three bits do not divide a byte. Such codes are stored as two parts side by side: the low two bits
(D / 4 bytes), then the high bit (D / 8 bytes). No bit is wasted.
"""

from __future__ import annotations

import torch
from torch import Tensor

BITS = (2, 3, 4, 8)
_CHANNEL_MULTIPLE = {2: 4, 3: 8, 4: 2, 8: 1}


def channel_multiple(bits: int) -> int:
    """Return the number that head_dim must be a multiple of to pack codes of `bits` bits."""
    return _CHANNEL_MULTIPLE[bits]


def packed_bytes(num_channels: int, bits: int) -> int:
    """Return bytes of one packed row of `num_channels` codes."""
    return num_channels * bits // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes along the last axis.

    Args:
        codes: uint8 `[..., D]`, each below `2**bits`; D a multiple of `channel_multiple(bits)`.
        bits: 2, 3, 4 or 8.

    Returns:
        uint8 `[..., D * bits / 8]`.
    """
    if bits == 8:
        return codes
    if bits == 3:
        return torch.cat([_pack_part(codes & 3, 2), _pack_part(codes >> 2, 1)], -1)
    return _pack_part(codes, bits)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Return the codes, uint8 `[..., D]`, of `packed`, uint8 `[..., D * bits / 8]`."""
    if bits == 8:
        return packed
    if bits == 3:
        low_bytes = packed.shape[-1] // 3 * 2
        high = _unpack_part(packed[..., low_bytes:], 1)
        return _unpack_part(packed[..., :low_bytes], 2) | (high << 2)
    return _unpack_part(packed, bits)


def _pack_part(codes: Tensor, bits: int) -> Tensor:
    parts = codes.chunk(8 // bits, -1)  # [..., D] -> n of [..., D / n]
    packed = parts[0]
    for i, part in enumerate(parts[1:], start=1):
        packed = packed | (part << (bits * i))
    return packed


def _unpack_part(packed: Tensor, bits: int) -> Tensor:
    mask = 2**bits - 1
    return torch.cat([(packed >> (bits * i)) & mask for i in range(8 // bits)], -1)
