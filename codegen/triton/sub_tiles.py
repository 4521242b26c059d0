"""Which channels of a row of codes are unpacked together."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from kvxform.codegen.triton.spec import StreamSpec


@dataclass(frozen=True)
class SubTile:
    """Channels of codes that are unpacked together and share a scale.

    Attributes:
        first_byte: First byte of the row that holds them.
        shift: Bits below them in each byte.
        first_channel: First of the channels.
        width: Channels, one a byte.
        group: Index of the scale, along channels.
    """

    first_byte: int
    shift: int
    first_channel: int
    width: int
    group: int


def sub_tiles(stream: StreamSpec) -> Iterator[SubTile]:
    """Yield the sub-tiles of a coded row of 2, 4 or 8 bits, in the order of their bytes."""
    assert stream.bits in (2, 4, 8), "rows of 3 and 6 bits have two parts"
    row = stream.head_dim * stream.bits // 8
    group = stream.group if stream.axis == "token" else stream.head_dim
    width = math.gcd(row, group)
    for first_byte in range(0, row, width):
        for part in range(8 // stream.bits):
            channel = part * row + first_byte
            yield SubTile(first_byte, part * stream.bits, channel, width, channel // group)
