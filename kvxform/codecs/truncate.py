"""Codec `truncate`: the first channels of a vector through another codec; the rest is constant.

It stores a stream in an orthogonal basis whose first components matter most. g KV heads are joined
to one vector of g D channels, as a basis over g heads joins them:

    stored:  inner.encode(x[:rank])          decoded:  inner.decode(...), then `fill`

With `fill` their means, what is lost is the variance of the channels that are left out, without it
their energy; and what the inner codec loses.

Source: the low-rank features of CSKV, arXiv 2409.10593, in an orthogonal basis.
"""

from __future__ import annotations

import dataclasses
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
from kvxform.codecs.exact import ExactCodec
from kvxform.errors import PassError


@register_codec
@dataclass(frozen=True)
class TruncateCodec(WrapperCodec):
    """The first channels of joined heads.

    Attributes:
        rank: Channels of a joined vector that are stored.
        head_dim: Channels of one head.
        heads: KV heads of a joined vector; a divisor of those of the site.
        inner: Codec of the stored channels, which sees vectors of `rank` channels.
        fill: What the other channels come back as, for each joined vector of a token in order;
            empty for zeros.
    """

    name: ClassVar[str] = "truncate"
    rank: int
    head_dim: int
    heads: int = 1
    inner: Codec = field(default_factory=lambda: ExactCodec("float16"))
    fill: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        """Check the options on their own."""
        for name in ("rank", "head_dim", "heads"):
            value = getattr(self, name)
            is_count = isinstance(value, int) and value > 0
            require_option(is_count, self.name, f"{name} must be a positive number", value)
        rule = f"rank must be at most the {self.heads * self.head_dim} channels there are"
        require_option(self.missing >= 0, self.name, rule, self.rank)
        sizes = {len(own) for own in self.fill}
        rule = f"fill must have {self.missing} numbers for each joined vector"
        require_option(sizes <= {self.missing}, self.name, rule, sizes)
        is_alone = isinstance(self.inner, Codec) and self.inner.is_headwise
        rule = "inner must be a codec that takes each head alone"
        require_option(is_alone, self.name, rule, self.inner)

    @property
    def is_headwise(self) -> bool:
        """Whether no heads are joined, and all are alike."""
        return self.heads == 1 and len(self.fill) <= 1

    @property
    def missing(self) -> int:
        """Channels of a joined vector that are not stored."""
        return self.heads * self.head_dim - self.rank

    def filling(self) -> Tensor:
        """Return what is added to decoded vectors, float32 `[1 or Hk / g, 1, g D]`."""
        assert self.fill, "there is something to add"
        return torch.nn.functional.pad(torch.tensor(self.fill), (self.rank, 0)).unsqueeze(1)

    def check(self, head_dim: int) -> None:
        """Raise PassError KVX203 if heads have another size, or `inner` cannot take the rank."""
        if head_dim != self.head_dim:
            rule = f"codec truncate must be made for a head_dim of {head_dim}"
            raise PassError("KVX203", rule, got=self.head_dim, hint=f"use head_dim: {head_dim}")
        self.inner.check(self.rank)

    def planes(self, head_dim: int) -> tuple[PlaneSpec, ...]:
        """Return the planes of the inner codec, one row for the heads that are joined."""
        planes = self.inner.planes(self.rank)
        return tuple(dataclasses.replace(plane, joined=self.heads) for plane in planes)

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Encode the first channels of joined heads of `x`, `[..., Hk, T, D]`."""
        return self.inner.encode(self._kept(x))

    def decode(self, planes: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Decode to `dtype`, `[..., Hk, T, D]`."""
        kept = self.inner.decode(planes, dtype)  # [..., Hk / g, T, rank]
        joined = torch.nn.functional.pad(kept, (0, self.missing))
        if self.fill:
            joined = joined + self.filling().to(joined)
        if self.heads == 1:
            return joined
        apart = joined.unflatten(-1, (self.heads, self.head_dim)).transpose(-3, -2)
        x: Tensor = apart.flatten(-4, -3)
        return x

    def fit(self, samples: CodecSamples) -> TruncateCodec:
        """Return the codec with its inner codec fitted on the channels that are stored."""
        weights = None if samples.weights is None else self._kept(samples.weights)
        envelope = samples.envelope
        if envelope is not None:
            envelope = self._kept(envelope[:, None])[:, 0]
        own = CodecSamples(self._kept(samples.x), weights, envelope)
        return dataclasses.replace(self, inner=self.inner.fit(own))

    def _kept(self, x: Tensor) -> Tensor:
        """Return the channels that are stored, `[..., Hk / g, T, rank]`."""
        if self.heads > 1:
            groups = x.unflatten(-3, (x.shape[-3] // self.heads, self.heads))
            x = groups.transpose(-3, -2).flatten(-2)
        return x[..., : self.rank]
