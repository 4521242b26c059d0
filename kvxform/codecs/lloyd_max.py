"""Codec `lloyd-max`: one norm a vector, and one Lloyd-Max table for the coordinates of u = x / |x|.

    q_j = the nearest level to u_j          u'_j = table[q_j]

A coordinate of a uniform direction has the same distribution in every channel, so one table serves
all, which depends on nothing but head_dim and the number of levels (`lloyd_tables`). Levels need
not be a power of two: `radix` packs 5, 11 or 20 levels at 2.33, 3.50 and 4.36 bits.

`qjl` adds the signs of a random projection of what is left, r = u - u', and its norm:

    u'' = u' + sqrt(pi / 2) / D * |r| * S^T sign(S r),          S normal, D x D, from a seed

Scores q . x'' are then unbiased, but their variance is about five times that which one more bit per
code gives.

Source: TurboQuant, arXiv 2504.19874, algorithms 1 (mse) and 2 (prod, `qjl`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvxform.codecs.base import PlaneSpec, register_codec, require_option
from kvxform.codecs.directions import DirectionCodec
from kvxform.codecs.lloyd_tables import bounds_of, sphere_table
from kvxform.codecs.packing import pack, unpack
from kvxform.codecs.radix import pack_levels, packed_level_bytes, unpack_levels

MOST_LEVELS = 256
SEED = 0  # of the projection of qjl


@register_codec
@dataclass(frozen=True)
class LloydMaxCodec(DirectionCodec):
    """Scalar codes of a direction.

    Attributes:
        levels: Levels of the table, 2 to 256.
        qjl: Store signs and norm of the rest too; needs `gain: norm`.
    """

    name: ClassVar[str] = "lloyd-max"
    levels: int = 16
    qjl: bool = False

    def __post_init__(self) -> None:
        """Check the options on their own."""
        super().__post_init__()
        fits = isinstance(self.levels, int) and 2 <= self.levels <= MOST_LEVELS
        require_option(fits, self.name, "levels must be 2 to 256", self.levels)
        rule = "qjl corrects the direction, which leaves gain: norm only"
        require_option(not self.qjl or self.gain == "norm", self.name, rule, self.gain)

    def code_planes(self, head_dim: int) -> tuple[PlaneSpec, ...]:
        """Return `codes`, and with `qjl` `signs` and `residual`."""
        codes = PlaneSpec("codes", "uint8", packed_level_bytes(head_dim, self.levels))
        if not self.qjl:
            return (codes,)
        return (
            codes,
            PlaneSpec("signs", "uint8", head_dim // 8),
            PlaneSpec("residual", "float16", 1),
        )

    def encode_directions(self, u: Tensor) -> dict[str, Tensor]:
        """Encode `[..., D]` by the nearest level of each coordinate."""
        table = sphere_table(self.levels, u.shape[-1]).to(u.device)
        codes = torch.bucketize(u, bounds_of(table), out_int32=True)
        planes = {"codes": pack_levels(codes, self.levels)}
        if not self.qjl:
            return planes
        rest = u - table[codes]
        signs = rest @ projection(u.shape[-1]).to(u).mT >= 0
        norm = torch.linalg.vector_norm(rest, dim=-1, keepdim=True)
        return {**planes, "signs": pack(signs.to(torch.uint8), 1), "residual": norm.half()}

    def decode_directions(
        self, planes: Mapping[str, Tensor], head_dim: int, dtype: torch.dtype
    ) -> Tensor:
        """Look up every coordinate."""
        codes = unpack_levels(planes["codes"], self.levels, head_dim)
        found = sphere_table(self.levels, head_dim).to(codes.device, dtype)[codes]
        if not self.qjl:
            return found
        signs = unpack(planes["signs"], 1).to(dtype) * 2 - 1
        rest = planes["residual"].to(dtype) * (math.sqrt(math.pi / 2) / head_dim)
        return found + rest * (signs @ projection(head_dim).to(signs))


@functools.cache
def projection(dim: int) -> Tensor:
    """Return S, float32 `[dim, dim]` of independent normal numbers."""
    return torch.randn(dim, dim, generator=torch.Generator().manual_seed(SEED))
