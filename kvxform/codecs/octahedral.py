"""Codec `octahedral`: one norm a vector; each three coordinates of x / |x| as a point and a length.

For a triplet t of u = x / |x| (zeros fill the last one), with rho = |t|:

1. p = t / (|t_1| + |t_2| + |t_3|); the octahedron is unfolded onto the square [-1, 1]^2:
   (xi, eta) = (p_1, p_2) if p_3 >= 0, else (sgn(p_1) (1 - |p_2|), sgn(p_2) (1 - |p_1|)), sgn(0) = 1
2. xi and eta share one Lloyd-Max table of `direction_bits` bits, rho has one of `radius_bits`.
3. `joint`: of the nine directions around the nearest codes of xi and eta, take the one with the
   largest s = t . n', n' its unit vector, and encode s in place of rho. Only the encoder differs.

Tables are fitted on the distributions that steps 1 and 2 produce for random directions, padding
included.

Source: OCTOPUS, arXiv 2605.21226.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kvxform.codecs.base import PlaneSpec, register_codec, require_option
from kvxform.codecs.directions import DirectionCodec
from kvxform.codecs.lloyd_tables import bounds_of, fit_levels
from kvxform.codecs.radix import pack_levels, packed_level_bytes, unpack_levels
from kvxform.codecs.tables import cached_table

VERSION = 2  # of the method; part of the names of tables
SAMPLES = 400_000  # triplets that tables are fitted on
NEIGHBOURS = tuple(itertools.product((0, -1, 1), repeat=2))  # the nearest codes come first
MOST_BITS = 8


@register_codec
@dataclass(frozen=True)
class OctahedralCodec(DirectionCodec):
    """Codes of triplets of a direction.

    Attributes:
        direction_bits: Bits of each of the two numbers of a point on the octahedron, 1 to 8.
        radius_bits: Bits of the length, 1 to 8.
        joint: Choose point and length together.
    """

    name: ClassVar[str] = "octahedral"
    direction_bits: int = 3
    radius_bits: int = 1
    joint: bool = True

    def __post_init__(self) -> None:
        """Check the options on their own."""
        super().__post_init__()
        for name in ("direction_bits", "radius_bits"):
            bits = getattr(self, name)
            fits = isinstance(bits, int) and 1 <= bits <= MOST_BITS
            require_option(fits, self.name, f"{name} must be 1 to {MOST_BITS}", bits)

    def code_planes(self, head_dim: int) -> tuple[PlaneSpec, ...]:
        """Return `codes`, all xi and then all eta, and `radius`."""
        count = triplet_count(head_dim)
        directions = packed_level_bytes(2 * count, 2**self.direction_bits)
        radius = packed_level_bytes(count, 2**self.radius_bits)
        return PlaneSpec("codes", "uint8", directions), PlaneSpec("radius", "uint8", radius)

    def encode_directions(self, u: Tensor) -> dict[str, Tensor]:
        """Encode `[..., D]` by triplets."""
        head_dim = u.shape[-1]
        points, lengths = (table.to(u.device) for table in self.tables(head_dim))
        triplets = _split(u)  # [..., n, 3]
        codes = torch.bucketize(octahedral_encode(triplets), bounds_of(points))
        if self.joint:
            codes, length = _best_neighbour(triplets, codes, points)
        else:
            length = torch.linalg.vector_norm(triplets, dim=-1)
        radius = torch.bucketize(length, bounds_of(lengths))
        return {
            "codes": pack_levels(codes.mT.flatten(-2), 2**self.direction_bits),
            "radius": pack_levels(radius, 2**self.radius_bits),
        }

    def decode_directions(
        self, planes: Mapping[str, Tensor], head_dim: int, dtype: torch.dtype
    ) -> Tensor:
        """Look up points and lengths."""
        count = triplet_count(head_dim)
        codes = unpack_levels(planes["codes"], 2**self.direction_bits, 2 * count)
        radius = unpack_levels(planes["radius"], 2**self.radius_bits, count)
        points, lengths = (t.to(codes.device, dtype) for t in self.tables(head_dim))
        first, second = codes.unflatten(-1, (2, count)).unbind(-2)
        unit = unit_vectors(points)[first * len(points) + second]
        triplets: Tensor = unit * lengths[radius].unsqueeze(-1)
        return triplets.flatten(-2)[..., :head_dim]

    def tables(self, head_dim: int) -> tuple[Tensor, Tensor]:
        """Return the table of xi and eta and that of the length."""
        return (
            _table("point", 2**self.direction_bits, head_dim),
            _table("length", 2**self.radius_bits, head_dim),
        )


def octahedral_encode(vectors: Tensor) -> Tensor:
    """Return points of the square, `[..., 2]`, for vectors `[..., 3]` of any length, zero too."""
    total = vectors.abs().sum(-1, keepdim=True)
    p = vectors / total.clamp_min(torch.finfo(vectors.dtype).tiny)
    return torch.where(p[..., 2:] >= 0, p[..., :2], _fold(p[..., :2]))


def octahedral_decode(points: Tensor) -> Tensor:
    """Return unit vectors `[..., 3]` for points of the square, `[..., 2]`."""
    z = 1 - points.abs().sum(-1, keepdim=True)
    plane = torch.where(z >= 0, points, _fold(points))
    unit: Tensor = F.normalize(torch.cat([plane, z], -1), dim=-1)
    return unit


def _fold(points: Tensor) -> Tensor:
    """Mirror points over the edges of the octahedron; its own inverse outside of the middle."""
    signs = torch.where(points >= 0, 1.0, -1.0).to(points)
    folded: Tensor = signs * (1 - points.abs().flip(-1))
    return folded


def unit_vectors(points: Tensor) -> Tensor:
    """Return the unit vector of each pair of codes, `[L * L, 3]`."""
    return octahedral_decode(torch.cartesian_prod(points, points))


def _best_neighbour(triplets: Tensor, codes: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes `[..., 2]` of the best of nine directions, and the length along it."""
    levels, directions = len(points), unit_vectors(points)
    best = torch.full(triplets.shape[:-1], -torch.inf, device=triplets.device)
    chosen = torch.zeros_like(codes[..., 0])
    for offset in NEIGHBOURS:
        near = [(codes[..., i] + offset[i]).clamp(0, levels - 1) for i in (0, 1)]
        pair = near[0] * levels + near[1]
        along = torch.linalg.vecdot(triplets, directions[pair])
        is_better = along > best
        best = torch.where(is_better, along, best)
        chosen = torch.where(is_better, pair, chosen)
    return torch.stack([chosen // levels, chosen % levels], -1), best


def triplet_count(head_dim: int) -> int:
    """Return the number of triplets of a vector."""
    return -(-head_dim // 3)


def _split(u: Tensor) -> Tensor:
    count = triplet_count(u.shape[-1])
    triplets: Tensor = F.pad(u, (0, 3 * count - u.shape[-1])).unflatten(-1, (count, 3))
    return triplets


@functools.cache
def _table(kind: str, levels: int, head_dim: int) -> Tensor:
    name = f"octahedral-{kind}-{levels}-{head_dim}-v{VERSION}"
    return cached_table(name, lambda: _fit(kind, levels, head_dim))


def _fit(kind: str, levels: int, head_dim: int) -> Tensor:
    generator = np.random.default_rng(0)
    count = -(-SAMPLES // triplet_count(head_dim))
    vectors = torch.from_numpy(generator.standard_normal((count, head_dim)))
    triplets = _split(F.normalize(vectors, dim=-1))
    if kind == "length":
        samples = torch.linalg.vector_norm(triplets, dim=-1)
    else:
        samples = octahedral_encode(triplets)
    return torch.from_numpy(fit_levels(samples.flatten().numpy(), levels))
