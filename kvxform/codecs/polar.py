"""Codec `polar`: blocks of 16 coordinates as one length and 15 angles, level by level.

Level 1 turns neighbours (x_2j, x_2j+1) into an angle atan2(x_2j+1, x_2j) in [0, 2 pi) and a
length; levels 2 to 4 turn neighbouring lengths into an angle in [0, pi / 2] and a length. What is
left is the length of the block, float16. For random directions the angle of level l >= 2 has the
density sin(2 a)^(2^(l - 1) - 1), independent of the others, so each level has its own Lloyd-Max
table; the angle of level 1 is uniform.

    decoded, top down:  r_2j = r_j cos(a_j),  r_2j+1 = r_j sin(a_j)

Source: PolarQuant, arXiv 2502.02617.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from kvxform.codecs.base import Codec, PlaneSpec, register_codec, require_option
from kvxform.codecs.lloyd_tables import bounds_of, fit_density
from kvxform.codecs.radix import pack_levels, packed_level_bytes, unpack_levels
from kvxform.codecs.tables import cached_table
from kvxform.errors import PassError

VERSION = 1  # of the method; part of the names of tables
BLOCK = 16
LEVELS = 4
LARGEST_LENGTH = 65504.0  # largest float16


@register_codec
@dataclass(frozen=True)
class PolarCodec(Codec):
    """Codes of angles, and one length for 16 values.

    Attributes:
        bits: Bits of an angle of levels 1 to 4, each 1 to 8.
    """

    name: ClassVar[str] = "polar"
    bits: tuple[int, ...] = (4, 2, 2, 2)

    def __post_init__(self) -> None:
        """Check the options on their own."""
        fits = len(self.bits) == LEVELS and all(b in range(1, 9) for b in self.bits)
        require_option(fits, self.name, "bits must be four numbers of 1 to 8", self.bits)

    def check(self, head_dim: int) -> None:
        """Raise PassError KVX203 unless `head_dim` is a multiple of 16."""
        if head_dim % BLOCK:
            raise PassError(
                "KVX203",
                f"codec polar needs a head_dim that is a multiple of {BLOCK}",
                got=head_dim,
                hint="use codec lloyd-max, or int",
            )

    def planes(self, head_dim: int) -> tuple[PlaneSpec, ...]:
        """Return `codes`, level after level, and `norm`, the length of each block."""
        widths = self.widths(head_dim)
        lengths = PlaneSpec("norm", "float16", head_dim // BLOCK)
        return PlaneSpec("codes", "uint8", sum(widths)), lengths

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Encode `x`, `[..., T, D]`, in float32."""
        angles, length = to_polar(x.float())
        packed = []
        for level, angle in enumerate(angles):
            bounds = bounds_of(self.table(level)).to(angle.device)
            codes = torch.bucketize(angle.contiguous(), bounds, out_int32=True)
            packed.append(pack_levels(codes, 2 ** self.bits[level]))
        return {"codes": torch.cat(packed, -1), "norm": length.clamp(max=LARGEST_LENGTH).half()}

    def decode(self, planes: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Decode to `dtype`; 16-bit dtypes are computed in float32."""
        wide = dtype if dtype.itemsize >= 4 else torch.float32
        length = planes["norm"].to(wide)
        head_dim = length.shape[-1] * BLOCK
        parts = planes["codes"].split(self.widths(head_dim), -1)
        angles = []
        for level, part in enumerate(parts):
            table = self.table(level).to(part.device, wide)
            codes = unpack_levels(part, 2 ** self.bits[level], _count(head_dim, level))
            angles.append(table[codes])
        return from_polar(angles, length).to(dtype)

    def table(self, level: int) -> Tensor:
        """Return the decoded angles of level `level` + 1, ascending, float32."""
        return angle_table(level + 1, 2 ** self.bits[level])

    def widths(self, head_dim: int) -> list[int]:
        """Return the bytes of the codes of each level."""
        sizes = ((_count(head_dim, level), 2**bits) for level, bits in enumerate(self.bits))
        return [packed_level_bytes(count, levels) for count, levels in sizes]


def _count(head_dim: int, level: int) -> int:
    """Return the angles of level `level` + 1."""
    return head_dim >> (level + 1)


def to_polar(x: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return the angles of levels 1 to 4, `[..., D / 2^l]`, and the lengths `[..., D / 16]`."""
    angles, length = [], x
    for level in range(LEVELS):
        first, second = length.unflatten(-1, (-1, 2)).unbind(-1)
        angle = torch.atan2(second, first)
        angles.append(angle % (2 * math.pi) if level == 0 else angle)
        length = torch.hypot(first, second)
    return angles, length


def from_polar(angles: list[Tensor], length: Tensor) -> Tensor:
    """Return the values `[..., D]`; the inverse of `to_polar`."""
    for angle in reversed(angles):
        length = torch.stack([length * angle.cos(), length * angle.sin()], -1).flatten(-2)
    return length


def angle_density(level: int, angle: np.ndarray) -> np.ndarray:
    """Return the density of angles of `level` >= 2 on [0, pi / 2], up to a factor."""
    return np.asarray(np.sin(2 * angle) ** (2 ** (level - 1) - 1))


@functools.cache
def angle_table(level: int, count: int) -> Tensor:
    """Return the decoded angles of a level, ascending, float32 `[count]`."""
    if level == 1:
        return (torch.arange(count) + 0.5) * (2 * math.pi / count)

    def build() -> Tensor:
        density = functools.partial(angle_density, level)
        return torch.from_numpy(fit_density(density, 0.0, math.pi / 2, count))

    return cached_table(f"polar-{level}-{count}-v{VERSION}", build)
