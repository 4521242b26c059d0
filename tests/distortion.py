"""What tests of codecs share: error and bits on data of a known distribution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvxform.codecs.base import Codec, make_codec

TOLERANCE = 0.02  # of published distortions, relative


def normal_vectors(count: int, dim: int = 128, seed: int = 0) -> Tensor:
    """Return `count` vectors of independent normal numbers, `[count, dim]`."""
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def relative_error(codec: Codec, x: Tensor) -> float:
    """Return the squared error of a round trip, as a share of the squared values."""
    decoded = codec.decode(codec.encode(x), torch.float64)
    return float((decoded - x).square().sum() / x.double().square().sum())


def distortion(count: int = 8192, dim: int = 128, **spec: Any) -> float:
    """Return the relative error of the codec `spec` on normal vectors."""
    return relative_error(make_codec(spec), normal_vectors(count, dim))


def check_planes(codec: Codec, x: Tensor) -> None:
    """Assert that the planes of `x` `[B, Hk, T, D]` are those that the codec declares."""
    planes = codec.encode(x)
    heads, tokens, head_dim = x.shape[-3:]
    specs = codec.planes(head_dim)
    assert set(planes) == {spec.name for spec in specs}
    for spec in specs:
        plane = planes[spec.name]
        assert plane.dtype == spec.torch_dtype
        shape = (*x.shape[:-3], spec.heads(heads), tokens // spec.tokens_per_row, spec.width)
        assert plane.shape == shape
    stored = sum(plane.nbytes for plane in planes.values())
    bits = codec.bits_per_value(head_dim, heads)
    assert stored * 8 == round(bits * x.numel(), 6)
