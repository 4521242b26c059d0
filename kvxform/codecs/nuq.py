"""Codec `nuq`: codes index a table of levels that are not equally far apart.

With centre c and half width w of the range of an element, and a table of 2**bits levels:

    q = the nearest level to (x - c) / w,          x' = c + w table[q]

Ranges are static or stored:

- `axis: channel`             static: percentiles of each channel of each head, from a calibration;
                              nothing is stored beside codes
- `axis: channel, group: n`   c and w of n tokens of a channel
- `axis: token`               c and w of a token, of one head or of all KV heads together

The table is fitted once per stream (`levels: fitted`): k-means of the values inside their ranges,
weighted with squared gradients, so that the error that counts is `sum of g^2 (x - x')^2`. Or it
holds the quantiles of a normal distribution (`levels: normal`, NF4 at 4 bits); with stored ranges
nothing has to be calibrated then.

With `q_norm` decoded values get the mean and the deviation of the calibration back (for 2 bits).
Outliers beyond the ranges are cut off; codec `outliers` with `pick: deviation` keeps them.

Source: KVQuant, arXiv 2401.18079, sections 3.1 to 3.5; normal levels: QLoRA, arXiv 2305.14314.
"""

from __future__ import annotations

import dataclasses
import functools
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
from kvxform.codecs.integer import LARGEST_FLOAT16, SMALLEST_SCALE
from kvxform.codecs.kmeans import weighted_kmeans
from kvxform.codecs.packing import BITS, channel_multiple, pack, packed_bytes, unpack
from kvxform.errors import PassError

Numbers = tuple[float, ...]
MOST_VALUES = 1 << 17  # for the fit of a table; more of them cost time and change nothing


@register_codec
@dataclass(frozen=True)
class NuqCodec(Codec):
    """Levels from a table, in ranges of channels or tokens.

    Attributes:
        bits: 2, 3, 4 or 8 bits a code.
        axis: Ranges of channels (`channel`) or of tokens (`token`).
        group: Tokens of a stored range of a channel; None means static ranges.
        across_heads: The range of a token is one for all KV heads.
        levels: `fitted` on a calibration, or `normal`.
        keep: Share of calibration values inside static ranges; the rest lies beyond both ends.
        any_position: Widen static ranges of keys so that they hold at positions that the
            calibration text does not reach.
        q_norm: Restore mean and standard deviation of the calibration.
        table: Levels that values are compared with; fitted.
        values: Levels that codes decode to; the table, unless `q_norm`; fitted.
        center: Static centres, by KV head and channel; fitted.
        width: Static half widths, likewise.
    """

    name: ClassVar[str] = "nuq"
    bits: int = 4
    axis: Literal["token", "channel"] = "channel"
    group: int | None = None
    across_heads: bool = False
    levels: Literal["fitted", "normal"] = "fitted"
    keep: float = 0.99
    any_position: bool = False
    q_norm: bool = False
    table: Numbers | None = None
    values: Numbers | None = None
    center: tuple[Numbers, ...] | None = None
    width: tuple[Numbers, ...] | None = None

    def __post_init__(self) -> None:
        """Check the options on their own; `check` compares them with a head_dim."""
        self._require(self.bits in BITS, "bits must be 2, 3, 4 or 8", self.bits)
        self._require(self.axis in ("token", "channel"), "axis must be token or channel", self.axis)
        is_known = self.levels in ("fitted", "normal")
        self._require(is_known, "levels must be fitted or normal", self.levels)
        self._require(0.5 < self.keep <= 1, "keep must lie in (0.5, 1]", self.keep)
        is_run = isinstance(self.group, int) and self.group > 0 and self.axis == "channel"
        rule = "group must be a positive number of tokens of the channel axis"
        self._require(self.group is None or is_run, rule, self.group)
        rule = "across_heads must come with the token axis"
        self._require(self.axis == "token" or not self.across_heads, rule, self.across_heads)
        rule = "any_position must come with static ranges"
        self._require(self.has_own_ranges or not self.any_position, rule, self.any_position)
        rule = f"table must have {2**self.bits} levels"
        self._require(self.table is None or len(self.table) == 2**self.bits, rule, self.table)

    @property
    def has_own_ranges(self) -> bool:
        """Whether ranges are static, so that what lies beyond them is known of each element."""
        return self.axis == "channel" and self.group is None

    @property
    def is_headwise(self) -> bool:
        """Whether heads have no constants of their own and share no range."""
        return not (self.has_own_ranges or self.across_heads)

    @property
    def needs_calibration(self) -> bool:
        """Whether the table or the ranges are still to be fitted."""
        return self.needs_fisher or (self.has_own_ranges and self.center is None)

    @property
    def needs_fisher(self) -> bool:
        """Whether the table is still to be fitted."""
        return self.levels == "fitted" and self.table is None

    @property
    def tokens_per_group(self) -> int:
        """Tokens of a stored range of a channel, else 1."""
        return self.group or 1

    def check(self, head_dim: int) -> None:
        """Raise PassError KVX203 if codes cannot be packed, or constants are of another size."""
        multiple = channel_multiple(self.bits)
        if head_dim % multiple:
            rule = f"{self.bits}-bit codes need a head_dim that is a multiple of {multiple}"
            raise PassError("KVX203", rule, got=head_dim, hint="use 8 bits")
        if self.center is not None and len(self.center[0]) != head_dim:
            rule = f"codec nuq must be fitted on a head_dim of {head_dim}"
            raise PassError("KVX203", rule, got=len(self.center[0]), hint="leave center out")

    def planes(self, head_dim: int) -> tuple[PlaneSpec, ...]:
        """Return `codes`, and half width and centre (`scale`, `zero`) where they are stored."""
        codes = PlaneSpec("codes", "uint8", packed_bytes(head_dim, self.bits))
        if self.has_own_ranges:
            return (codes,)
        width = head_dim if self.axis == "channel" else 1
        rows, shared = self.tokens_per_group, self.across_heads
        return (
            codes,
            PlaneSpec("scale", "float16", width, rows, shared=shared),
            PlaneSpec("zero", "float16", width, rows, shared=shared),
        )

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Encode `x`, `[..., Hk, T, D]`, in float32."""
        x = x.float()
        center, width = self._ranges(x)
        levels = self.compared_levels.to(x)
        bounds = (levels[1:] + levels[:-1]) / 2
        scaled = self._split(x).sub(center).div(width).contiguous()
        codes = torch.bucketize(scaled, bounds)
        planes = {"codes": pack(self._join(codes).to(torch.uint8), self.bits)}
        if self.has_own_ranges:
            return planes
        if self.axis == "channel":  # [..., T / group, 1, D] -> [..., T / group, D]
            center, width = center.squeeze(-2), width.squeeze(-2)
        return {**planes, "scale": width.half(), "zero": center.half()}

    def decode(self, planes: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Decode to `dtype`; 16-bit dtypes are computed in float32."""
        wide = dtype if dtype.itemsize >= 4 else torch.float32
        codes = unpack(planes["codes"], self.bits)
        levels = self._split(self.decoded_levels.to(codes.device, wide)[codes.long()])
        if self.has_own_ranges:
            center, width = self._static(codes.device, wide)
        else:
            center, width = (planes[name].to(wide) for name in ("zero", "scale"))
            if self.axis == "channel":
                center, width = center.unsqueeze(-2), width.unsqueeze(-2)
        return self._join(levels * width + center).to(dtype)

    def deviation(self, x: Tensor) -> Tensor:
        """Return how far out each element of `x` `[..., Hk, T, D]` lies; 1 at static ends."""
        center, width = self._static(x.device, x.dtype)
        return (x - center).abs() / width

    def fit(self, samples: CodecSamples) -> NuqCodec:
        """Return the codec with ranges and levels fitted on `samples`.

        Tokens stand for neighbours where ranges are stored for runs of them.
        """
        if not self.needs_calibration:
            return self
        tokens = samples.x.shape[-2] // self.tokens_per_group * self.tokens_per_group
        x = samples.x[..., :tokens, :].float()
        codec = self._fit_ranges(samples) if self.has_own_ranges else self
        weights = (
            torch.ones_like(x) if samples.weights is None else samples.weights[..., :tokens, :]
        )
        return codec._fit_table(x, weights.to(x))

    def _fit_ranges(self, samples: CodecSamples) -> NuqCodec:
        """Return the codec with static ranges: percentiles of each channel."""
        ends = torch.tensor([(1 - self.keep) / 2, (1 + self.keep) / 2], dtype=torch.float64)
        low, high = torch.quantile(samples.x.double(), ends, dim=-2)  # each [Hk, D]
        if self.any_position and samples.envelope is not None:
            largest = samples.x.double().abs().amax(-2).clamp_min(SMALLEST_SCALE)
            inside = torch.maximum(low.abs(), high.abs()) / largest
            high = torch.maximum(high, samples.envelope.double() * inside)
            low = torch.minimum(low, -samples.envelope.double() * inside)
        center, width = (high + low) / 2, ((high - low) / 2).clamp_min(SMALLEST_SCALE)
        return dataclasses.replace(self, center=_to_tuples(center), width=_to_tuples(width))

    def _fit_table(self, x: Tensor, weights: Tensor) -> NuqCodec:
        """Return the codec with levels for samples `x` `[Hk, N, D]` of these squared gradients."""
        center, width = self._ranges(x)
        scaled = self._split(x).sub(center).div(width)
        inside = scaled.abs() <= 1
        u = scaled[inside].double()
        stride = -(-len(u) // MOST_VALUES)
        u = u[::stride]
        if self.levels == "normal":
            levels = normal_levels(self.bits)
        else:
            error = (self._split(weights) * width.square())[inside]  # that of x, not of u
            levels = weighted_kmeans(u, error[::stride], 2**self.bits)
        values = levels
        if self.q_norm:
            chosen = levels[torch.bucketize(u, (levels[1:] + levels[:-1]) / 2)]
            gain = u.std() / chosen.std().clamp_min(SMALLEST_SCALE)
            values = (levels - chosen.mean()) * gain + u.mean()
        table, decoded = (tuple(numbers.float().tolist()) for numbers in (levels, values))
        return dataclasses.replace(self, table=table, values=decoded)

    def _ranges(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return centres and half widths of split values, rounded as they are stored."""
        if self.has_own_ranges:
            return self._static(x.device, x.dtype)
        axes = (-2,) if self.axis == "channel" else (-3, -1) if self.across_heads else (-1,)
        groups = self._split(x)
        low, high = groups.amin(axes, keepdim=True), groups.amax(axes, keepdim=True)
        center = ((high + low) / 2).clamp(-LARGEST_FLOAT16, LARGEST_FLOAT16).half().float()
        width = torch.maximum(high - center, center - low).clamp(SMALLEST_SCALE, LARGEST_FLOAT16)
        return center, width.half().float()

    def _static(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return static centres and half widths, each `[Hk, 1, D]`."""
        center, width = self.static_ranges
        return center.to(device, dtype), width.to(device, dtype)

    @functools.cached_property
    def static_ranges(self) -> tuple[Tensor, Tensor]:
        """Static centres and half widths, each float32 `[Hk, 1, D]`."""
        assert self.center is not None, "static ranges have been fitted"
        assert self.width is not None, "they are fitted together"
        return torch.tensor(self.center)[:, None], torch.tensor(self.width)[:, None]

    @functools.cached_property
    def compared_levels(self) -> Tensor:
        """The levels that values are compared with, ascending, float32."""
        if self.table is None:
            assert self.levels == "normal", "levels have been fitted"
            return normal_levels(self.bits).float()
        return torch.tensor(self.table)

    @functools.cached_property
    def decoded_levels(self) -> Tensor:
        """The levels that codes decode to, float32."""
        return self.compared_levels if self.values is None else torch.tensor(self.values)

    def _split(self, x: Tensor) -> Tensor:
        """Return `[..., T / group, group, D]` where channels have stored ranges."""
        if self.group is None:
            return x
        runs: Tensor = x.unflatten(-2, (-1, self.group))
        return runs

    def _join(self, groups: Tensor) -> Tensor:
        return groups if self.group is None else groups.flatten(-3, -2)

    def _require(self, condition: bool, rule: str, got: object) -> None:
        require_option(condition, self.name, rule, got)


@functools.cache
def normal_levels(bits: int) -> Tensor:
    """Return quantiles of the normal distribution in [-1, 1], float64 `[2**bits]`, zero included.

    Source: QLoRA, arXiv 2305.14314, section 3 (NormalFloat); 4 bits give NF4.
    """
    count = 2**bits
    outermost = 1 - (1 / (count - 1) + 1 / count) / 4
    sides = [
        torch.special.ndtri(torch.linspace(outermost, 0.5, n + 1, dtype=torch.float64))[:-1]
        for n in (count // 2 - 1, count // 2)
    ]
    levels = torch.cat([-sides[0], torch.zeros(1, dtype=torch.float64), sides[1].flip(0)])
    return levels / levels[-1]


def _to_tuples(table: Tensor) -> tuple[Numbers, ...]:
    return tuple(tuple(row) for row in table.float().tolist())
