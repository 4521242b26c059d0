"""Codec `outliers`: a fixed number of elements of each vector is stored exactly, beside the codes.

A vector is one token of one head (`axis: token`), or a run of `group` tokens of one channel (`axis:
channel`). Its outliers are kept as float16 values with uint8 indices; in their place the inner
codec gets the mean of the rest of the vector, so that they no longer widen its range:

    stored:  inner.encode(x with outliers filled),  values,  indices
    decoded: inner.decode(...), with the values put back at their indices

How many there are follows from `share` and the length n of a vector, and is the same everywhere:

- `pick: extremes`   ceil(share / 2 n) largest and as many smallest elements (GEAR)
- `pick: deviation`  ceil(share n) elements that lie furthest out: by the range that an inner codec
  with ranges of its own gives them, else by the distance from the median of the vector (KVQuant)

Source: GEAR, arXiv 2403.05527, section 3; KVQuant, arXiv 2401.18079, section 3.4 (dense and
sparse).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol, runtime_checkable

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

LONGEST_VECTOR = 256  # what a uint8 can index
VALUE, INDEX = "outlier_value", "outlier_index"


@runtime_checkable
class Ranged(Protocol):
    """A codec that may know the usual range of each element."""

    @property
    def has_own_ranges(self) -> bool:
        """Whether it does."""

    def deviation(self, x: Tensor) -> Tensor:
        """Return how far out each element of `x` `[..., Hk, T, D]` lies; 1 at the ends."""


@register_codec
@dataclass(frozen=True)
class OutliersCodec(WrapperCodec):
    """Outliers in front of another codec.

    Attributes:
        inner: Codec of what remains.
        share: Outliers among the elements of a vector, in (0, 1); rounded up to whole elements.
        axis: `token`: a vector is one token of one head. `channel`: a run of tokens of a channel.
        group: Tokens of a run; None means those that the inner codec takes together.
        pick: Which elements are outliers, `extremes` or `deviation`.
    """

    name: ClassVar[str] = "outliers"
    inner: Codec = field(default_factory=IntCodec)
    share: float = 0.02
    axis: Literal["token", "channel"] = "token"
    group: int | None = None
    pick: Literal["extremes", "deviation"] = "extremes"

    def __post_init__(self) -> None:
        """Check the options on their own; `check` compares them with a head_dim."""
        self._require(isinstance(self.inner, Codec), "inner must be a codec", self.inner)
        self._require(0 < self.share < 1, "share must lie between 0 and 1", self.share)
        self._require(self.axis in ("token", "channel"), "axis must be token or channel", self.axis)
        picks = ("extremes", "deviation")
        self._require(self.pick in picks, "pick must be extremes or deviation", self.pick)
        rule = f"group must be a number of tokens, 2 to {LONGEST_VECTOR}, of the channel axis"
        if self.axis == "channel":
            self._require(2 <= self.run <= LONGEST_VECTOR, rule, self.run)
        else:
            self._require(self.group is None, rule, self.group)
        names = {plane.name for plane in self.inner.planes(64)}
        self._require(VALUE not in names, "inner must not store outliers itself", self.inner.name)

    @property
    def tokens_per_group(self) -> int:
        """Tokens that hold whole runs and whole groups of the inner codec."""
        own = self.run if self.axis == "channel" else 1
        return math.lcm(own, self.inner.tokens_per_group)

    def check(self, head_dim: int) -> None:
        """Raise PassError KVX203 if too many elements would be outliers, or too many to index."""
        self.inner.check(head_dim)
        length = self._length(head_dim)
        if length > LONGEST_VECTOR or self.count(length) >= length:
            raise PassError(
                "KVX203",
                f"codec outliers needs vectors of at most {LONGEST_VECTOR} elements, "
                f"fewer than all of them outliers; {self.count(length)} would be",
                got=length,
                hint="use a smaller share, or the channel axis",
            )

    def planes(self, head_dim: int) -> tuple[PlaneSpec, ...]:
        """Return the planes of the inner codec, values and indices of outliers."""
        vectors = head_dim if self.axis == "channel" else 1
        width = vectors * self.count(self._length(head_dim))
        rows = self.run if self.axis == "channel" else 1
        return (
            *self.inner.planes(head_dim),
            PlaneSpec(VALUE, "float16", width, rows),
            PlaneSpec(INDEX, "uint8", width, rows),
        )

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Encode `x`, `[..., Hk, T, D]`, in float32."""
        x = x.float()
        vectors = self._split(x)
        index = self._find(x)
        values = vectors.gather(-1, index).clamp(-LARGEST_FLOAT16, LARGEST_FLOAT16)
        rest = self._join(_fill(vectors, index))
        return {
            **self.inner.encode(rest),
            VALUE: self._flatten(values).half(),
            INDEX: self._flatten(index).to(torch.uint8),
        }

    def decode(self, planes: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Decode to `dtype`, `[..., Hk, T, D]`."""
        vectors = self._split(self.inner.decode(planes, dtype))
        shape = (*vectors.shape[:-1], -1)
        index = planes[INDEX].long().reshape(shape)
        values = planes[VALUE].to(dtype).reshape(shape)
        return self._join(vectors.scatter(-1, index, values))

    def fit(self, samples: CodecSamples) -> OutliersCodec:
        """Return the codec with its inner codec fitted; it finds outliers of its own first.

        Outliers have no weight in the fit of codes. An inner codec with ranges of its own leaves
        out by itself what lies beyond them.
        """
        if not self.knows_ranges:
            samples = self._without_outliers(samples)
        return dataclasses.replace(self, inner=self.inner.fit(samples))

    def _without_outliers(self, samples: CodecSamples) -> CodecSamples:
        tokens = samples.x.shape[-2] // self.tokens_per_group * self.tokens_per_group
        x = samples.x[..., :tokens, :].float()
        weights = torch.ones_like(x)
        if samples.weights is not None:
            weights = samples.weights[..., :tokens, :].to(x)
        index = self._find(x)
        rest = self._join(_fill(self._split(x), index))
        counted = self._join(self._split(weights).scatter(-1, index, 0.0))
        return dataclasses.replace(samples, x=rest, weights=counted)

    @property
    def knows_ranges(self) -> bool:
        """Whether the inner codec tells how far out an element lies."""
        return isinstance(self.inner, Ranged) and self.inner.has_own_ranges

    @property
    def run(self) -> int:
        """Tokens of a vector of the channel axis."""
        return self.inner.tokens_per_group if self.group is None else self.group

    def _length(self, head_dim: int) -> int:
        return self.run if self.axis == "channel" else head_dim

    def count(self, length: int) -> int:
        """Return outliers of a vector of `length` elements."""
        if self.pick == "extremes":
            return 2 * math.ceil(self.share / 2 * length)
        return math.ceil(self.share * length)

    def _split(self, x: Tensor) -> Tensor:
        """Return `x` as vectors in the last axis: `[..., T, D]` or `[..., T / run, D, run]`."""
        if self.axis == "token":
            return x
        runs: Tensor = x.unflatten(-2, (-1, self.run)).transpose(-1, -2)
        return runs

    def _join(self, vectors: Tensor) -> Tensor:
        if self.axis == "token":
            return vectors
        return vectors.transpose(-1, -2).flatten(-3, -2)

    def _flatten(self, found: Tensor) -> Tensor:
        """Return `[..., rows, width]` of what was found in each vector."""
        return found if self.axis == "token" else found.flatten(-2)

    def _find(self, x: Tensor) -> Tensor:
        """Return indices of the outliers in their vectors; among equals the first one wins."""
        vectors = self._split(x)
        count = self.count(vectors.shape[-1])
        if self.pick == "extremes":
            order = vectors.argsort(dim=-1, stable=True)
            return torch.cat([order[..., : count // 2], order[..., -(count // 2) :]], -1)
        if self.knows_ranges:
            assert isinstance(self.inner, Ranged), "it knows ranges"
            distance = self._split(self.inner.deviation(x))
        else:
            distance = (vectors - vectors.median(-1, keepdim=True).values).abs()
        return distance.argsort(dim=-1, descending=True, stable=True)[..., :count]

    def _require(self, condition: bool, rule: str, got: object) -> None:
        require_option(condition, self.name, rule, got)


def _fill(vectors: Tensor, index: Tensor) -> Tensor:
    """Return `vectors` with the mean of the other elements at `index`."""
    wide = vectors.double()
    others = wide.scatter(-1, index, 0.0).sum(-1, keepdim=True)
    mean = others / (vectors.shape[-1] - index.shape[-1])
    return wide.scatter(-1, index, mean.expand(index.shape)).to(vectors.dtype)
