"""Codec `slerp-pair`: keys and values of two layers as one direction each and a norm a layer.

The vector of a token and a head is [K_a | V_a | K_b | V_b], a the lower layer. K_a and K_b become
their norms and one unit vector between their directions (spherical interpolation), and so do V_a
and V_b. In every chunk of tokens a fixed number of them, those whose keys differ most by angle,
stay as they are: K_a and V_a stand where the directions would be, with norms of one, and K_b and
V_b in a plane of their own.

Source: MiniCache, arXiv 2405.14366, section 4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvxform.codecs.base import Codec, PlaneSpec, dtype_from_name, register_codec, require_option
from kvxform.errors import PassError

SMALL_SINE = 1e-6  # directions so near, or so opposed, are interpolated along the chord
LARGEST_CHUNK = 256  # an index is one byte


@register_codec
@dataclass(frozen=True)
class SlerpPairCodec(Codec):
    """Two layers in one.

    Attributes:
        key_dim: Channels of a key, D.
        chunk: Tokens of a chunk, C.
        kept: Tokens of a chunk and head that stay as they are.
        t: Where between the layers directions lie: 0 is the lower one, 1 the upper one.
        dtype: Stored dtype by torch name.
    """

    name: ClassVar[str] = "slerp-pair"
    key_dim: int
    chunk: int = 64
    kept: int = 3
    t: float = 0.6
    dtype: str = "float16"

    def __post_init__(self) -> None:
        """Check the options on their own."""
        dtype_from_name(self.dtype)
        in_range = 1 <= self.chunk <= LARGEST_CHUNK
        rule = f"chunk must be from 1 to {LARGEST_CHUNK} tokens"
        require_option(in_range, self.name, rule, self.chunk)
        rule = "kept must be from 0 to the tokens of a chunk"
        require_option(0 <= self.kept <= self.chunk, self.name, rule, self.kept)
        require_option(0 <= self.t <= 1, self.name, "t must be from 0 to 1", self.t)

    @property
    def tokens_per_group(self) -> int:
        """Tokens of a chunk."""
        return self.chunk

    def check(self, head_dim: int) -> None:
        """Require two keys of `key_dim` channels and two values."""
        if head_dim % 2 or head_dim <= 2 * self.key_dim:
            rule = "a pair must be two keys and two values of a head"
            raise PassError("KVX203", rule, where=self.name, got=f"{head_dim} channels")

    def planes(self, head_dim: int) -> tuple[PlaneSpec, ...]:
        """Return directions `[T, D + Dv]`, norms `[T, 4]`, and kept tokens with their places."""
        half = head_dim // 2
        planes = [PlaneSpec("direction", self.dtype, half), PlaneSpec("norm", self.dtype, 4)]
        if self.kept:
            planes += [
                PlaneSpec("kept", self.dtype, self.kept * half, self.chunk),
                PlaneSpec("place", "uint8", self.kept, self.chunk),
            ]
        return tuple(planes)

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Merge pairs `[..., T, 2 (D + Dv)]`, T a multiple of `chunk`."""
        dtype, wide = dtype_from_name(self.dtype), torch.promote_types(x.dtype, torch.float32)
        lower, upper = x.to(wide).chunk(2, -1)  # [..., T, D + Dv]
        merged = [self._merge(a, b) for a, b in zip(*map(self._parts, (lower, upper)), strict=True)]
        direction = torch.cat([m[0] for m in merged], -1)
        norms = torch.cat([merged[0][1], merged[1][1], merged[0][2], merged[1][2]], -1)
        planes = {"direction": direction.to(dtype), "norm": norms.to(dtype)}
        if self.kept:
            self._keep(planes, lower.to(dtype), upper.to(dtype), merged[0][3])
        return planes

    def decode(self, planes: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Return pairs `[..., T, 2 (D + Dv)]`."""
        wide = torch.promote_types(dtype_from_name(self.dtype), torch.float32)
        direction, norms = planes["direction"].to(wide), planes["norm"].to(wide)
        key, value = self._parts(direction)
        lower, upper = (
            torch.cat([key * pair[..., :1], value * pair[..., 1:]], -1)
            for pair in norms.split(2, -1)
        )
        if self.kept:
            chunks = upper.unflatten(-2, (-1, self.chunk))  # [..., T / C, C, D + Dv]
            kept = planes["kept"].to(wide).unflatten(-1, (self.kept, -1))
            place = planes["place"].long()[..., None].expand(kept.shape)
            upper = chunks.scatter(-2, place, kept).flatten(-3, -2)
        return torch.cat([lower, upper], -1).to(dtype)

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Split `[..., D + Dv]` into keys and values."""
        return x[..., : self.key_dim], x[..., self.key_dim :]

    def _merge(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the direction, both norms and the angle of two vectors `[..., T, n]`."""
        (unit_a, norm_a), (unit_b, norm_b) = _unit(a), _unit(b)
        cosine = (unit_a * unit_b).sum(-1, keepdim=True).clamp(-1, 1)
        angle = torch.arccos(cosine)
        sine = torch.sin(angle)
        is_chord = sine < SMALL_SINE
        safe = sine.masked_fill(is_chord, 1.0)
        first = torch.where(is_chord, 1 - self.t, torch.sin((1 - self.t) * angle) / safe)
        second = torch.where(is_chord, self.t, torch.sin(self.t * angle) / safe)
        between, length = _unit(first * unit_a + second * unit_b)
        opposed = length < SMALL_SINE  # halfway between opposed vectors there is no direction
        return torch.where(opposed, unit_b, between), norm_a, norm_b, angle[..., 0] / math.pi

    def _keep(self, planes: dict[str, Tensor], lower: Tensor, upper: Tensor, angle: Tensor) -> None:
        """Put the tokens whose keys differ most into the planes as they are, in place."""
        chunks = angle.unflatten(-1, (-1, self.chunk))
        order = torch.sort(chunks, dim=-1, descending=True, stable=True).indices
        place = order[..., : self.kept]  # [..., T / C, r]
        index = place[..., None].expand(*place.shape, lower.shape[-1])
        by_chunk = [x.unflatten(-2, (-1, self.chunk)) for x in (lower, upper)]
        kept = [x.gather(-2, index) for x in by_chunk]
        direction = planes["direction"].unflatten(-2, (-1, self.chunk))
        planes["direction"] = direction.scatter(-2, index, kept[0]).flatten(-3, -2)
        norms = planes["norm"].unflatten(-2, (-1, self.chunk))
        ones = place[..., None].expand(*place.shape, 2)
        lower_norms = norms[..., :2].scatter(-2, ones, 1.0)
        planes["norm"] = torch.cat([lower_norms, norms[..., 2:]], -1).flatten(-3, -2)
        planes["kept"] = kept[1].flatten(-2)
        planes["place"] = place.to(torch.uint8)


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return unit vectors and norms `[..., 1]`; a zero vector stays zero."""
    norm = x.norm(dim=-1, keepdim=True)
    return x / norm.clamp_min(torch.finfo(x.dtype).tiny), norm
