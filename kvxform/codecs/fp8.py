"""Codec `fp8`: 8-bit floating point, with a scale for each vector or none.

    s = max |x| / M,   q = x / s rounded to the format,   x' = s q          M: its largest number

`e4m3` has M = 448 and three bits of fraction, `e5m2` M = 57344 and two. The scale is at least 2^-24
and is rounded to its stored float16 before it divides. Bytes are stored as uint8.

Source: FP8 formats for deep learning, arXiv 2209.05433.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvxform.codecs.base import Codec, PlaneSpec, register_codec, require_option

FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
SMALLEST_SCALE = 2.0**-24  # smallest positive float16
LARGEST_FLOAT16 = 65504.0


@register_codec
@dataclass(frozen=True)
class Fp8Codec(Codec):
    """Floating-point codes of one byte.

    Attributes:
        format: `e4m3` or `e5m2`.
        scaled: One scale for each vector; without it values are rounded as they are.
    """

    name: ClassVar[str] = "fp8"
    format: Literal["e4m3", "e5m2"] = "e4m3"
    scaled: bool = True

    def __post_init__(self) -> None:
        """Check the options on their own."""
        fits = self.format in FORMATS
        require_option(fits, self.name, "format must be e4m3 or e5m2", self.format)

    def check(self, head_dim: int) -> None:
        """Accept every head_dim."""

    def planes(self, head_dim: int) -> tuple[PlaneSpec, ...]:
        """Return `codes`, one byte a value, and `scale` if there is one."""
        codes = PlaneSpec("codes", "uint8", head_dim)
        return (codes, PlaneSpec("scale", "float16", 1)) if self.scaled else (codes,)

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Encode `x`, `[..., T, D]`, in float32; what is beyond the format saturates."""
        x, kind = x.float(), FORMATS[self.format]
        largest = torch.finfo(kind).max
        if not self.scaled:
            return {"codes": x.clamp(-largest, largest).to(kind).view(torch.uint8)}
        step = x.abs().amax(-1, keepdim=True) / largest
        scale = step.clamp(SMALLEST_SCALE, LARGEST_FLOAT16).half()
        codes = (x / scale.float()).clamp(-largest, largest).to(kind)
        return {"codes": codes.view(torch.uint8), "scale": scale}

    def decode(self, planes: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Decode to `dtype`; 16-bit dtypes are computed in float32."""
        wide = dtype if dtype.itemsize >= 4 else torch.float32
        values = planes["codes"].contiguous().view(FORMATS[self.format]).to(wide)
        return (values * planes["scale"].to(wide) if self.scaled else values).to(dtype)
