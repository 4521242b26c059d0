"""Codec `token-norm`: each token is divided by a norm of it, and the rest goes to another codec.

With n_t a norm of token t over its channels, of one head or of all KV heads of the site:

    stored:  n_t,  inner.encode(x_t / n_t)          decoded:  n_t * inner.decode(...)

One token with an unusual norm then no longer widens the range of the group of tokens that it is in.
The norm that divides is not rounded, the stored one is float16: multiplying a token by a constant
leaves the codes of all tokens as they are.

Source: OScaR, arXiv 2605.19660 (all heads: Omni-Token Scaling).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

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
from kvxform.codecs.directions import LARGEST_NORM
from kvxform.codecs.integer import IntCodec

SMALLEST_NORM = 2.0**-14  # smallest float16 of full precision
KINDS = ("l2", "max", "mean")
SCOPES = ("site", "head")


@register_codec
@dataclass(frozen=True)
class TokenNormCodec(WrapperCodec):
    """Norms per token in front of another codec.

    Attributes:
        inner: Codec of the normalised tokens.
        over: One norm over all KV heads of the `site`, stored once, or one for each `head`.
        norm: `l2`, the largest magnitude (`max`), or the mean magnitude (`mean`).
    """

    name: ClassVar[str] = "token-norm"
    inner: Codec = field(default_factory=lambda: IntCodec(bits=2, axis="channel"))
    over: Literal["site", "head"] = "site"
    norm: Literal["l2", "max", "mean"] = "l2"

    def __post_init__(self) -> None:
        """Check the options on their own."""
        require_option(
            isinstance(self.inner, Codec), self.name, "inner must be a codec", self.inner
        )
        require_option(self.over in SCOPES, self.name, "over must be site or head", self.over)
        require_option(self.norm in KINDS, self.name, "norm must be l2, max or mean", self.norm)
        names = {plane.name for plane in self.inner.planes(64)}
        require_option(
            "norm" not in names, self.name, "inner must not store norms", self.inner.name
        )

    @property
    def is_headwise(self) -> bool:
        """Whether each head has its own norm, and the inner codec takes heads alone."""
        return self.over == "head" and self.inner.is_headwise

    def check(self, head_dim: int) -> None:
        """Raise PassError KVX203 if the inner codec cannot take `head_dim`."""
        self.inner.check(head_dim)

    def planes(self, head_dim: int) -> tuple[PlaneSpec, ...]:
        """Return the planes of the inner codec and `norm`, one number a token."""
        norm = PlaneSpec("norm", "float16", 1, shared=self.over == "site")
        return (*self.inner.planes(head_dim), norm)

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Encode `x`, `[..., Hk, T, D]`, in float32."""
        x = x.float()
        norm = self._norms(x).clamp(SMALLEST_NORM, LARGEST_NORM)
        return {**self.inner.encode(x / norm), "norm": norm.half()}

    def decode(self, planes: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Decode to `dtype`; 16-bit dtypes are computed in float32."""
        wide = dtype if dtype.itemsize >= 4 else torch.float32
        return (self.inner.decode(planes, wide) * planes["norm"].to(wide)).to(dtype)

    def fit(self, samples: CodecSamples) -> TokenNormCodec:
        """Return the codec with its inner codec fitted on normalised tokens.

        A squared gradient grows with the square of the norm that it is taken off. No envelope is
        known of normalised tokens.
        """
        norm = self._norms(samples.x.float()).clamp(SMALLEST_NORM, LARGEST_NORM)
        weights = None if samples.weights is None else samples.weights * norm.square()
        inner = self.inner.fit(CodecSamples(samples.x / norm, weights))
        return dataclasses.replace(self, inner=inner)

    def _norms(self, x: Tensor) -> Tensor:
        """Return norms `[..., 1 or Hk, T, 1]`."""
        axes = (-3, -1) if self.over == "site" else (-1,)
        if self.norm == "max":
            return x.abs().amax(axes, keepdim=True)
        if self.norm == "mean":
            return x.abs().mean(axes, keepdim=True)
        norms: Tensor = torch.linalg.vector_norm(x, dim=axes, keepdim=True)
        return norms
