"""Codec `low-rank-residual`: what another codec loses in a block of tokens, as a low-rank product.

A block is `block` tokens of one head. With E = X - X' the error of the inner codec, `[block, D]`:

    stored:  inner.encode(X),  A [block, r],  B [D, r]          decoded:  X' + A B^T

A is an orthonormal basis of the range of (E E^T)^(loops - 1) E P, found by subspace iteration from
a fixed random P, and B = E^T A, so that A B^T is the projection of E onto that range. A larger rank
contains the range of a smaller one.

Blocks are aligned to the end of the sink like every group of tokens, and each is encoded once.

Source: GEAR, arXiv 2403.05527, section 3 and algorithm 1.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from kvxform.codecs.base import (
    Codec,
    CodecSamples,
    PlaneSpec,
    WrapperCodec,
    register_codec,
    require_option,
)
from kvxform.codecs.integer import LARGEST_FLOAT16, IntCodec
from kvxform.errors import PassError

LOW_RANK_TOKENS, LOW_RANK_CHANNELS = "low_rank_tokens", "low_rank_channels"
SEED = 0


@register_codec
@dataclass(frozen=True)
class LowRankResidualCodec(WrapperCodec):
    """A low-rank correction of another codec.

    Attributes:
        inner: Codec that is corrected.
        rank: Columns of A and B, r.
        block: Tokens that share a B.
        loops: Products with E P; 2 or 3 are enough.
    """

    name: ClassVar[str] = "low-rank-residual"
    inner: Codec = field(default_factory=IntCodec)
    rank: int = 2
    block: int = 64
    loops: int = 3

    def __post_init__(self) -> None:
        """Check the options on their own; `check` compares them with a head_dim."""
        self._require(isinstance(self.inner, Codec), "inner must be a codec", self.inner)
        for option in ("rank", "block", "loops"):
            value = getattr(self, option)
            self._require(isinstance(value, int) and value > 0, f"{option} must be positive", value)
        self._require(self.rank <= self.block, "rank must be at most block", self.rank)
        names = {plane.name for plane in self.inner.planes(64)}
        rule = "inner must not be corrected itself"
        self._require(LOW_RANK_TOKENS not in names, rule, self.inner.name)

    @property
    def tokens_per_group(self) -> int:
        """Tokens that hold whole blocks and whole groups of the inner codec."""
        return math.lcm(self.block, self.inner.tokens_per_group)

    def check(self, head_dim: int) -> None:
        """Raise PassError KVX203 if the rank is larger than `head_dim`."""
        self.inner.check(head_dim)
        if self.rank > head_dim:
            raise PassError(
                "KVX203", f"rank must be at most head_dim {head_dim}", got=self.rank, hint="use 2"
            )

    def planes(self, head_dim: int) -> tuple[PlaneSpec, ...]:
        """Return the planes of the inner codec, a row of A for each token and B for each block."""
        return (
            *self.inner.planes(head_dim),
            PlaneSpec(LOW_RANK_TOKENS, "float16", self.rank),
            PlaneSpec(LOW_RANK_CHANNELS, "float16", self.rank * head_dim, self.block),
        )

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Encode `x`, `[..., Hk, T, D]`, in float32; the product is found in float64."""
        x = x.float()
        planes = self.inner.encode(x)
        error = x.double() - self.inner.decode(planes, torch.float32)
        a, b = self._factors(error.unflatten(-2, (-1, self.block)))
        return {
            **planes,
            LOW_RANK_TOKENS: _to_half(a).flatten(-3, -2),  # -> [..., T, r]
            LOW_RANK_CHANNELS: _to_half(b).flatten(-2),  # -> [..., T / block, D * r]
        }

    def decode(self, planes: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Decode to `dtype`; 16-bit dtypes are computed in float32."""
        wide = dtype if dtype.itemsize >= 4 else torch.float32
        values = self.inner.decode(planes, wide).unflatten(-2, (-1, self.block))
        a = planes[LOW_RANK_TOKENS].to(wide).unflatten(-2, (-1, self.block))
        b = planes[LOW_RANK_CHANNELS].to(wide).unflatten(-1, (-1, self.rank))
        corrected: Tensor = values + a @ b.mT
        return corrected.flatten(-3, -2).to(dtype)

    def fit(self, samples: CodecSamples) -> LowRankResidualCodec:
        """Return the codec with its inner codec fitted."""
        if not self.needs_calibration:
            return self
        return dataclasses.replace(self, inner=self.inner.fit(samples))

    def _factors(self, error: Tensor) -> tuple[Tensor, Tensor]:
        """Return A and B of errors `[..., block, D]`, float64."""
        b = start(error.shape[-1])[:, : self.rank].to(error)
        a = torch.linalg.qr(error @ b).Q
        for _ in range(self.loops - 1):
            a = torch.linalg.qr(error @ (error.mT @ a)).Q
        return a, error.mT @ a

    def _require(self, condition: bool, rule: str, got: object) -> None:
        require_option(condition, self.name, rule, got)


@functools.cache
def start(width: int) -> Tensor:
    """Return the P of the largest rank, float64 `[width, width]`; smaller ranks take a part."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn(width, width, generator=generator, dtype=torch.float64)


def _to_half(x: Tensor) -> Tensor:
    return x.clamp(-LARGEST_FLOAT16, LARGEST_FLOAT16).half()
