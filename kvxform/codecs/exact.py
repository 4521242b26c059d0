"""Codec `none`: values are stored as they are, in one plane."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvxform.codecs.base import Codec, PlaneSpec, dtype_from_name, register_codec


@register_codec
@dataclass(frozen=True)
class ExactCodec(Codec):
    """Store values in `dtype`; exact when that is the dtype of the model."""

    name: ClassVar[str] = "none"
    dtype: str = "float32"

    def check(self, head_dim: int) -> None:
        """Accept every head_dim; only the dtype must exist."""
        dtype_from_name(self.dtype)

    def planes(self, head_dim: int) -> tuple[PlaneSpec, ...]:
        """Return the single plane `value`, one row a token."""
        return (PlaneSpec("value", self.dtype, head_dim),)

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Convert `x` `[..., T, D]` to the stored dtype."""
        return {"value": x.to(dtype_from_name(self.dtype))}

    def decode(self, planes: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Convert back to `dtype`."""
        return planes["value"].to(dtype)
