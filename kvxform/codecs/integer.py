"""Codec `int`: uniform integers of 2, 3, 4 or 8 bits, with a scale and a zero point per group.

A group is a run of channels of one token (`axis: token`) or a run of tokens of one channel
(`axis: channel`). With n = 2**bits - 1 and the smallest and largest value m, M of a group:

- `zero: int`    s = (M - m) / n,  z = round(-m / s),  q = round(x / s) + z,  x' = s (q - z)
- `zero: float`  s = (M - m) / n,  z = m,              q = round((x - z) / s),  x' = s q + z
- `symmetric`    s = max(-m, M) / h,  q = round(x / s) + z,  x' = s (q - z),
                 with the constants h = (n - 1) / 2 and z = h + 1

Scales and zero points are rounded to their stored float16 before they are used to encode. A scale
is at least 2**-24, and with `zero: int` so large that float16 holds z exactly, |z| <= 2048.

m and M are multiplied by `clip`, which cuts off extremes for a finer step. It is a number, or it is
chosen from `CLIPS` by squared error: for every group when it is encoded (`search`), or once for a
stream from a calibration (`fit`). Either way nothing more is stored.

Source: QuaRot, arXiv 2404.00456, section 4 (`zero: int`, token axis); KIVI, arXiv 2402.02750,
section 3 (`zero: float`, channel axis for keys).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvxform.codecs.base import (
    AffineCodes,
    Codec,
    CodecSamples,
    PlaneSpec,
    register_codec,
    require_option,
)
from kvxform.codecs.packing import BITS, channel_multiple, pack, packed_bytes, unpack
from kvxform.errors import PassError

DEFAULT_TOKENS = 32  # tokens of a group of the channel axis
SMALLEST_SCALE = 2.0**-24  # smallest positive float16; keeps scales of constant groups above zero
LARGEST_ZERO = 2048.0  # float16 holds every integer up to here
LARGEST_FLOAT16 = 65504.0
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45)


@register_codec
@dataclass(frozen=True)
class IntCodec(Codec):
    """Uniform integer codes.

    Attributes:
        bits: 2, 3, 4 or 8 bits a code.
        axis: `token`: a group is a run of channels of one token. `channel`: a run of tokens of
            one channel.
        group: Elements of a group; None means head_dim (token axis) or 32 tokens (channel axis).
        symmetric: Codes around zero, without a zero point.
        zero: Zero point as an integer (`int`) or as the smallest value (`float`).
        clip: Factor in (0, 1] of the extremes of a group; less than one trades outliers for step.
            `search`: the best one for each group; `fit`: the best one for the stream.
        include_zero: Widen the range of every group to contain zero, as QuaRot does per token.
        across_heads: A group of the token axis is a whole token, all KV heads together.
    """

    name: ClassVar[str] = "int"
    is_affine: ClassVar[bool] = True
    bits: int = 4
    axis: Literal["token", "channel"] = "token"
    group: int | None = None
    symmetric: bool = False
    zero: Literal["int", "float"] = "int"
    clip: float | Literal["search", "fit"] = 1.0
    include_zero: bool = False
    across_heads: bool = False

    def __post_init__(self) -> None:
        """Check the options on their own; `check` compares them with a head_dim."""
        _require(self.bits in BITS, "bits must be 2, 3, 4 or 8", self.bits)
        _require(self.axis in ("token", "channel"), "axis must be token or channel", self.axis)
        _require(self.zero in ("int", "float"), "zero must be int or float", self.zero)
        is_clip = self.clip in ("search", "fit")
        is_clip = is_clip or (isinstance(self.clip, float | int) and 0 < self.clip <= 1)
        _require(is_clip, "clip must lie in (0, 1], or be search or fit", self.clip)
        positive = self.group is None or (isinstance(self.group, int) and self.group > 0)
        _require(positive, "group must be a positive number of elements", self.group)
        is_whole = self.axis == "token" and self.group is None
        rule = "across_heads must come with the token axis and without group"
        _require(is_whole or not self.across_heads, rule, self.across_heads)

    @property
    def is_headwise(self) -> bool:
        """Whether a group lies within one head."""
        return not self.across_heads

    @property
    def needs_calibration(self) -> bool:
        """Whether the clip is still to be chosen."""
        return self.clip == "fit"

    @property
    def tokens_per_group(self) -> int:
        """Tokens that must be encoded together: the group of the channel axis, else 1."""
        return (self.group or DEFAULT_TOKENS) if self.axis == "channel" else 1

    def check(self, head_dim: int) -> None:
        """Raise PassError KVX203 if codes cannot be packed or groups do not fit `head_dim`."""
        multiple = channel_multiple(self.bits)
        if head_dim % multiple:
            raise PassError(
                "KVX203",
                f"{self.bits}-bit codes need a head_dim that is a multiple of {multiple}",
                got=head_dim,
                hint="use 8 bits, or codec none",
            )
        if self.axis == "token" and head_dim % self._channels_per_group(head_dim):
            raise PassError(
                "KVX203",
                f"the group of codec int on the token axis must divide head_dim {head_dim}",
                got=self.group,
                hint="leave group out for one group a token",
            )

    def planes(self, head_dim: int) -> tuple[PlaneSpec, ...]:
        """Return `codes` and `scale`, and `zero` unless symmetric."""
        rows = self.tokens_per_group
        width = head_dim // self._channels_per_group(head_dim) if self.axis == "token" else head_dim
        codes = PlaneSpec("codes", "uint8", packed_bytes(head_dim, self.bits))
        scale = PlaneSpec("scale", "float16", width, rows, shared=self.across_heads)
        zero = PlaneSpec("zero", "float16", width, rows, shared=self.across_heads)
        return (codes, scale) if self.symmetric else (codes, scale, zero)

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Encode `x`, shape `[..., Hk, T, D]`, T a multiple of `tokens_per_group`."""
        groups = self._split(x.float())
        scale, zero = self._search(groups) if self.clip == "search" else self._parameters(groups)
        codes = self._quantise(groups, scale.float(), zero.float())
        packed = pack(self._join(codes).to(torch.uint8), self.bits)
        planes = {"codes": packed, "scale": scale.squeeze(self._reduced)}
        return planes if self.symmetric else {**planes, "zero": zero.squeeze(self._reduced)}

    def decode(self, planes: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Decode to `dtype`, shape `[..., T, D]`; 16-bit dtypes are computed in float32."""
        wide = dtype if dtype.itemsize >= 4 else torch.float32
        codes = self._split(unpack(planes["codes"], self.bits).to(wide))
        scale = planes["scale"].to(wide).unsqueeze(self._reduced)
        zero = self._zero(planes, wide).unsqueeze(self._reduced)
        values = codes * scale + zero if self._adds_zero else (codes - zero) * scale
        return self._join(values).to(dtype)

    def affine(self, planes: Mapping[str, Tensor], dtype: torch.dtype) -> AffineCodes:
        """Return codes, scale and offset such that `x = scale * codes + offset`."""
        codes = unpack(planes["codes"], self.bits).to(dtype)
        scale = planes["scale"].to(dtype)
        zero = self._zero(planes, dtype)
        offset = zero if self._adds_zero else -scale * zero
        group = self.tokens_per_group
        if self.axis == "token":
            group = codes.shape[-1] // scale.shape[-1]
        return AffineCodes(codes, scale, offset, self.axis, group)

    def fit(self, samples: CodecSamples) -> IntCodec:
        """Return the codec with the clip of least squared error, where it is to be chosen.

        Tokens of `samples` stand for neighbours on the channel axis; what does not fill a group is
        left out.
        """
        if not self.needs_calibration:
            return self
        tokens = samples.x.shape[-2] // self.tokens_per_group * self.tokens_per_group
        x = samples.x[..., :tokens, :].double()
        choices = [dataclasses.replace(self, clip=clip) for clip in CLIPS]
        errors = [float((c.decode(c.encode(x), x.dtype) - x).square().sum()) for c in choices]
        return choices[errors.index(min(errors))]

    @property
    def _reduced(self) -> int:
        """The axis of one group in split values: channels, or tokens before channels."""
        return -1 if self.axis == "token" else -2

    @property
    def _adds_zero(self) -> bool:
        return self.zero == "float" and not self.symmetric

    def _channels_per_group(self, head_dim: int) -> int:
        return self.group or head_dim

    def _split(self, x: Tensor) -> Tensor:
        size = x.shape[-1] if self.axis == "token" else DEFAULT_TOKENS
        group = self.group or size
        axis = self._reduced  # [..., T, D] -> [..., T, D / g, g] or [..., T / g, g, D]
        split: Tensor = x.unflatten(axis, (x.shape[axis] // group, group))
        return split

    def _join(self, groups: Tensor) -> Tensor:
        return groups.flatten(-2) if self.axis == "token" else groups.flatten(-3, -2)

    @property
    def _group_axes(self) -> tuple[int, ...]:
        """All axes of one group: those of `_reduced`, and heads that are taken together."""
        return (-4, self._reduced) if self.across_heads else (self._reduced,)

    def _search(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Return the parameters of the clip with the least squared error of each group."""
        found = [dataclasses.replace(self, clip=clip)._parameters(groups) for clip in CLIPS]
        scale, zero = found[0]
        least = self._squared_error(groups, scale, zero)
        for other_scale, other_zero in found[1:]:
            error = self._squared_error(groups, other_scale, other_zero)
            is_better = error < least
            least = torch.where(is_better, error, least)
            scale = torch.where(is_better, other_scale, scale)
            zero = torch.where(is_better, other_zero, zero)
        return scale, zero

    def _squared_error(self, groups: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        scale, zero = scale.float(), zero.float()
        codes = self._quantise(groups, scale, zero)
        values = codes * scale + zero if self._adds_zero else (codes - zero) * scale
        return (values - groups).square().sum(self._group_axes, keepdim=True, dtype=torch.float64)

    def _parameters(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale and zero point of each group in float16, the reduced axis kept as 1."""
        assert not isinstance(self.clip, str), "a clip that is to be fitted has been"
        smallest = groups.amin(self._group_axes, keepdim=True) * self.clip
        largest = groups.amax(self._group_axes, keepdim=True) * self.clip
        if self.include_zero:
            smallest, largest = smallest.clamp(max=0), largest.clamp(min=0)
        magnitude = torch.maximum(-smallest, largest)
        if self.symmetric:
            scale = _to_scale(magnitude / (2 ** (self.bits - 1) - 1))
            return scale, torch.full_like(scale, 2 ** (self.bits - 1))
        step = (largest - smallest) / (2**self.bits - 1)
        if self.zero == "float":
            return _to_scale(step), smallest.clamp(-LARGEST_FLOAT16, LARGEST_FLOAT16).half()
        # A narrow group far from zero would need a zero point that float16 cannot hold exactly.
        scale = _to_scale(torch.maximum(step, magnitude / (LARGEST_ZERO - 1)))
        zero = (-smallest / scale.float()).round().clamp(-LARGEST_ZERO, LARGEST_ZERO)
        return scale, zero.half()

    def _quantise(self, groups: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        if self._adds_zero:
            codes = ((groups - zero) / scale).round()
        else:
            codes = (groups / scale).round() + zero
        return codes.clamp(1 if self.symmetric else 0, 2**self.bits - 1)

    def _zero(self, planes: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        if self.symmetric:
            return torch.full_like(planes["scale"], 2 ** (self.bits - 1), dtype=dtype)
        return planes["zero"].to(dtype)


def _to_scale(step: Tensor) -> Tensor:
    return step.clamp(SMALLEST_SCALE, LARGEST_FLOAT16).half()


def _require(condition: bool, rule: str, got: object) -> None:
    require_option(condition, "int", rule, got)
