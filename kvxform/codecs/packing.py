"""Codes of 1 to 8 bits in bytes, along the channel axis.

Packing is split-half, generalised: with n = 8 / bits codes a byte, byte j holds the channels
j, j + D / n, j + 2 D / n, ..., the first one in the lowest bits. Unpacking is then a shift, a mask
and a concatenation; no two channels of a byte are neighbours, so nothing has to be interleaved.

Three bits do not divide a byte. Such codes are stored as two parts side by side: the low two bits
(D / 4 bytes), then the high bit (D / 8 bytes). 5, 6 and 7 bits likewise: a part of four bits, then
parts of two and of one. No bit is wasted. `radix` packs codes of other numbers of levels.
"""

from __future__ import annotations

import torch
from torch import Tensor

BITS = (2, 3, 4, 8)  # of codec `int`; kernels know these


def channel_multiple(bits: int) -> int:
    """Return the number that head_dim must be a multiple of to pack codes of `bits` bits."""
    return 8 // part_widths(bits)[-1]


def packed_bytes(num_channels: int, bits: int) -> int:
    """Return bytes of one packed row of `num_channels` codes."""
    return num_channels * bits // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes along the last axis.

    Args:
        codes: uint8 `[..., D]`, each below `2**bits`; D a multiple of `channel_multiple(bits)`.
        bits: 1 to 8.

    Returns:
        uint8 `[..., D * bits / 8]`.
    """
    if bits == 8:
        return codes
    parts, shift = [], 0
    for width in part_widths(bits):
        parts.append(_pack_part((codes >> shift) & (2**width - 1), width))
        shift += width
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Return the codes, uint8 `[..., D]`, of `packed`, uint8 `[..., D * bits / 8]`."""
    if bits == 8:
        return packed
    widths = part_widths(bits)
    parts = packed.split([packed.shape[-1] * width // bits for width in widths], -1)
    codes, shift = _unpack_part(parts[0], widths[0]), widths[0]
    for part, width in zip(parts[1:], widths[1:], strict=True):
        codes = codes | (_unpack_part(part, width) << shift)
        shift += width
    return codes


def part_widths(bits: int) -> tuple[int, ...]:
    """Return the bits of each part, powers of two: 7 -> 4, 2, 1."""
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def _pack_part(codes: Tensor, bits: int) -> Tensor:
    parts = codes.chunk(8 // bits, -1)  # [..., D] -> n of [..., D / n]
    packed = parts[0]
    for i, part in enumerate(parts[1:], start=1):
        packed = packed | (part << (bits * i))
    return packed


def _unpack_part(packed: Tensor, bits: int) -> Tensor:
    mask = 2**bits - 1
    return torch.cat([(packed >> (bits * i)) & mask for i in range(8 // bits)], -1)
