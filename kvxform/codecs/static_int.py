"""Codec `static-int`: symmetric integers of 8 or 4 bits with scales that are part of the plan.

With a scale s of a stream (`axis: tensor`) or of each channel of each head (`axis: channel`), and
h = 2**(bits - 1):

    q = round((x - c) / s), clamped to [-h, h - 1],         x' = s q + c

c is zero, or with `center` the mean of each channel of each head, moved by less than half a step so
that the mean of first tokens is a code; scales of channels reach as far as that. Much of attention
goes to first tokens; in many models they are nearly the same in all sequences, with small values,
for which a step is coarse.

A constant that is taken from all keys takes the same from all scores of a query, which softmax does
not see: lowerings to operators that know no c leave it out of keys, and add it to what attention
returns of values.

Nothing is stored beside codes. They are the bytes that GroupQueryAttention and PagedAttention of
ONNX Runtime keep: int8, or two codes a byte as q + 8, element 2 i in the low half. `round` is half
to even, and a 16-bit x is divided in float32, as there.

Scales come from a calibration, threshold / (h - 1/2), so that both ends of [-threshold, threshold]
are half a step beyond the last code at most. The threshold is

- `minmax`      the largest magnitude;
- `percentile`  that of magnitudes;
- `mse`         the one with the least squared error of what is decoded;

of the samples as they are, and of keys after RoPE as they would be at positions drawn over the
whole context. Codes of a calibration text alone would clip keys at positions that it does not have.

Source: operator schema of com.microsoft.GroupQueryAttention and PagedAttention (ONNX Runtime 1.31).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvxform.codecs.base import (
    Codec,
    CodecSamples,
    PlaneSpec,
    register_codec,
    require_option,
)
from kvxform.errors import PassError

SMALLEST_SCALE = 2.0**-24  # of a channel of zeros
STEPS = (0.1, 0.02)  # between fractions of the largest magnitude that `mse` tries, coarse to fine
MOST_VALUES = 1 << 18  # of a scale for its search; more of them cost time and change nothing


@register_codec
@dataclass(frozen=True)
class StaticIntCodec(Codec):
    """Symmetric codes with static scales.

    Attributes:
        bits: 8 or 4 bits a code.
        axis: One scale for the stream (`tensor`), or one for each channel of each head (`channel`).
        threshold: How the scale is chosen: `minmax`, `percentile` or `mse`.
        percentile: Share of magnitudes below the threshold, in percent; for `percentile`.
        any_position: Choose scales of keys after RoPE for all positions of the context.
        center: Take the mean of each channel away first, with first tokens on a code.
        scale: The scales, one number, or head by head one for each channel; fitted.
        offset: What is taken away, head by head one for each channel; fitted.
    """

    name: ClassVar[str] = "static-int"
    bits: int = 8
    axis: Literal["tensor", "channel"] = "tensor"
    threshold: Literal["minmax", "percentile", "mse"] = "mse"
    percentile: float = 99.99
    any_position: bool = True
    center: bool = False
    scale: tuple[float, ...] | None = None
    offset: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        """Check the options on their own; `check` compares them with a head_dim."""
        self._require(self.bits in (4, 8), "bits must be 4 or 8", self.bits)
        self._require(
            self.axis in ("tensor", "channel"), "axis must be tensor or channel", self.axis
        )
        known = ("minmax", "percentile", "mse")
        rule = f"threshold must be {', '.join(known[:-1])} or {known[-1]}"
        self._require(self.threshold in known, rule, self.threshold)
        rule = "percentile must lie in (50, 100]"
        self._require(50 < self.percentile <= 100, rule, self.percentile)
        if self.scale is not None:
            positive = all(0 < s < float("inf") for s in self.scale) and len(self.scale) > 0
            self._require(positive, "scale must be positive numbers", self.scale)
            rule = "scale must be one number on the tensor axis"
            self._require(self.axis == "channel" or len(self.scale) == 1, rule, len(self.scale))
        is_due = self.center and self.scale is not None
        rule = "offset must come with center and scale" if self.offset else "center needs an offset"
        self._require((self.offset is not None) == is_due, rule, self.offset)

    @property
    def is_headwise(self) -> bool:
        """Whether no head has constants of its own."""
        return self.axis == "tensor" and not self.center

    @property
    def needs_calibration(self) -> bool:
        """Whether scales are still to be fitted."""
        return self.scale is None

    @property
    def half(self) -> int:
        """Codes lie in [-half, half - 1]."""
        return 1 << (self.bits - 1)

    def check(self, head_dim: int) -> None:
        """Raise PassError KVX203 if codes cannot be packed, or scales are of another size."""
        if self.bits == 4 and head_dim % 2:
            rule = "4-bit codes need a head_dim that is a multiple of 2"
            raise PassError("KVX203", rule, got=head_dim, hint="use 8 bits")
        for name, numbers in self._by_channel.items():
            if len(numbers) % head_dim:
                rule = f"{name} of codec static-int must be of heads of {head_dim} channels"
                hint = f"leave {name} out, to have it calibrated"
                raise PassError("KVX203", rule, got=len(numbers), hint=hint)

    def check_heads(self, num_heads: int, head_dim: int) -> None:
        """Raise PassError KVX203 if constants are of another number of heads."""
        for name, numbers in self._by_channel.items():
            if len(numbers) != num_heads * head_dim:
                rule = f"{name} of codec static-int must have {num_heads} x {head_dim} numbers"
                hint = "take those of this model"
                raise PassError("KVX203", rule, got=len(numbers), hint=hint)

    def planes(self, head_dim: int) -> tuple[PlaneSpec, ...]:
        """Return `codes`, int8 or two in a uint8."""
        if self.bits == 8:
            return (PlaneSpec("codes", "int8", head_dim),)
        return (PlaneSpec("codes", "uint8", head_dim // 2),)

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Encode `x`, `[..., Hk, T, D]`, in float32."""
        head_dim, x = x.shape[-1], x.float()
        if self.center:
            x = x - self.offsets(head_dim).to(x)
        codes = self._quantise(x, self.scales(head_dim).to(x))
        if self.bits == 8:
            return {"codes": codes.to(torch.int8)}
        nibbles = (codes + self.half).to(torch.uint8)
        return {"codes": nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)}

    def decode(self, planes: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Decode to `dtype`; 16-bit dtypes are computed in float32."""
        wide = dtype if dtype.itemsize >= 4 else torch.float32
        codes = self._codes(planes["codes"], wide)
        values = codes * self.scales(codes.shape[-1]).to(codes)
        if self.center:
            values = values + self.offsets(codes.shape[-1]).to(codes)
        return values.to(dtype)

    def fit(self, samples: CodecSamples) -> StaticIntCodec:
        """Return the codec with scales and means for `samples`, unless it has them."""
        if not self.needs_calibration:
            return self
        x = self._seen(samples)
        if not self.center:
            scale = self._fit_scale(x, samples.envelope)
            return dataclasses.replace(self, scale=_numbers(scale))
        center, first = x.mean(-2), samples.first
        reach = None if samples.envelope is None else samples.envelope + center.abs()
        scale = self._fit_scale(x - center[:, None], reach)
        if first is not None and self.axis == "channel":
            scale = torch.maximum(scale, (first - center).abs() / (self.half - 1))
        fitted = dataclasses.replace(self, scale=_numbers(scale), offset=_numbers(center))
        if first is not None:
            center = center + fitted._missing(first - center)
        return dataclasses.replace(fitted, offset=_numbers(center.half()))  # exact in any model

    def scales(self, head_dim: int) -> Tensor:
        """Return the scales, float32 `[1]`, or `[Hk, 1, D]` on the channel axis."""
        table = self._scale_table
        return table if self.axis == "tensor" else table.view(-1, 1, head_dim)

    def offsets(self, head_dim: int) -> Tensor:
        """Return the means, float32 `[Hk, 1, D]`; only with `center`."""
        return self._offset_table.view(-1, 1, head_dim)

    @functools.cached_property
    def _scale_table(self) -> Tensor:
        assert self.scale is not None, "scales have been fitted"
        return torch.tensor(self.scale)

    @functools.cached_property
    def _offset_table(self) -> Tensor:
        assert self.offset is not None, "means have been fitted"
        return torch.tensor(self.offset)

    @property
    def _by_channel(self) -> dict[str, tuple[float, ...]]:
        """Return the constants that have a number for each channel of each head."""
        found = {"scale": self.scale if self.axis == "channel" else None, "offset": self.offset}
        return {name: numbers for name, numbers in found.items() if numbers is not None}

    def _codes(self, packed: Tensor, dtype: torch.dtype) -> Tensor:
        """Return signed codes `[..., D]` of `dtype`."""
        if self.bits == 8:
            return packed.to(dtype)
        nibbles = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
        return nibbles.to(dtype) - self.half

    def _quantise(self, x: Tensor, scale: Tensor) -> Tensor:
        return (x / scale).round_().clamp_(-self.half, self.half - 1)

    def _seen(self, samples: CodecSamples) -> Tensor:
        """Return what scales must hold for, float32 `[Hk, N, D]`."""
        seen = [samples.x]
        if self.any_position and samples.elsewhere is not None:
            seen.append(samples.elsewhere)
        return torch.cat(seen, -2).float()

    def _missing(self, x: Tensor) -> Tensor:
        """Return what codes leave of vectors `[Hk, D]`; nothing where they are beyond the codes."""
        scale = self.scales(x.shape[-1])
        steps = x[:, None] / scale
        nearest = steps.round()
        inside = nearest.clamp(-self.half, self.half - 1) == nearest
        return ((steps - nearest) * scale * inside)[:, 0]

    def _fit_scale(self, x: Tensor, reach: Tensor | None) -> Tensor:
        """Return scales, `[1]` or `[Hk, D]`, for values `[Hk, N, D]` that may reach `[Hk, D]`."""
        threshold = self._threshold(x, reach if self.any_position else None)
        return (threshold / (self.half - 0.5)).clamp_min(SMALLEST_SCALE)

    def _threshold(self, x: Tensor, reach: Tensor | None) -> Tensor:
        """Return thresholds, float32 `[1]` or `[Hk, D]`."""
        largest = x.abs().amax(-2)
        if reach is not None and self.threshold == "minmax":
            largest = torch.maximum(largest, reach.float())
        if self.axis == "tensor":
            x, largest = x.reshape(-1, 1), largest.max()[None]
        if self.threshold == "minmax":
            return largest
        if self.threshold == "percentile":
            return _quantile(x.abs(), self.percentile / 100)
        return self._least_error(x[..., :: -(-x.shape[-2] // MOST_VALUES), :], largest)

    def _least_error(self, x: Tensor, largest: Tensor) -> Tensor:
        """Return which share of `largest` leaves the least squared error, column by column."""
        best, least = torch.full_like(largest, 0.6), torch.full_like(largest, torch.inf)
        for step in STEPS:
            middle = best
            for i in range(-4, 5):
                share = middle + i * step
                scale = (largest * share / (self.half - 0.5)).clamp_min(SMALLEST_SCALE)[
                    ..., None, :
                ]
                error = self._quantise(x, scale).mul_(scale).sub_(x).square_().sum(-2)
                best = torch.where(error < least, share, best)
                least = torch.minimum(error, least)
        return largest * best

    def _require(self, condition: bool, rule: str, got: object) -> None:
        require_option(condition, self.name, rule, got)


def _quantile(x: Tensor, share: float) -> Tensor:
    """Return the smallest values that at least `share` of those along axis -2 do not exceed."""
    count = x.shape[-2]
    return x.kthvalue(min(count, math.ceil(share * count)), -2).values


def _numbers(table: Tensor) -> tuple[float, ...]:
    return tuple(table.float().flatten().tolist())
