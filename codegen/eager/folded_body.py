"""Encoded tokens that are read without decoding them; scales go where they are cheapest.

`AffineBody` takes any affine codec. `PackedBody` is for codes of 2, 4 and 8 bits along the token
axis: it multiplies with the channels of one bit position at a time, so packed codes become floats
without being put back in order first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from kvxform.codecs.base import AffineCodes, Codec
from kvxform.codecs.folded import folded_scores, folded_values
from kvxform.codecs.integer import IntCodec


class FoldedBody(ABC):
    """The body of a stream, still encoded.

    Attributes:
        num_kv_heads: Heads, Hk.
        num_tokens: Tokens, n.
    """

    num_kv_heads: int
    num_tokens: int

    @abstractmethod
    def scores(self, q: Tensor) -> Tensor:
        """Return `q @ x.T` for q `[B, Hk, R, D]`, shape `[B, Hk, R, n]`."""

    @abstractmethod
    def mix(self, weights: Tensor) -> Tensor:
        """Return `weights @ x` for weights `[B, Hk, R, n]`, shape `[B, Hk, R, D]`."""


class AffineBody(FoldedBody):
    """Codes of any affine codec, unpacked."""

    def __init__(self, codes: AffineCodes) -> None:
        self._codes = codes
        self.num_kv_heads, self.num_tokens = codes.codes.shape[1:3]

    def scores(self, q: Tensor) -> Tensor:
        """See `FoldedBody`."""
        return folded_scores(q, self._codes)

    def mix(self, weights: Tensor) -> Tensor:
        """See `FoldedBody`."""
        return folded_values(weights, self._codes)


class PackedBody(FoldedBody):
    """Codes of codec `int` along the token axis, split by their position in the byte.

    Args:
        codec: The codec; 2, 4 or 8 bits, with groups of whole bit positions.
        planes: Stored planes `[B, Hk, n, width]`.
        dtype: Dtype of the arithmetic.
    """

    def __init__(self, codec: IntCodec, planes: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        packed, bits = planes["codes"], codec.bits
        self.num_kv_heads, self.num_tokens = packed.shape[1:3]
        shifts = range(0, 8, bits)
        self._parts = [_code_bits(packed, shift, bits).to(dtype) for shift in shifts]
        no_codes = {**planes, "codes": packed[..., :0]}  # scales and offsets are all we want here
        affine = codec.affine(no_codes, dtype)
        self._scale, self._offset = affine.scale.mT, affine.offset  # [B, Hk, J, n], [B, Hk, n, J]
        self._parts_per_group = len(self._parts) // affine.scale.shape[-1]

    def scores(self, q: Tensor) -> Tensor:
        """See `FoldedBody`."""
        groups = self._offset.shape[-1]
        total: Tensor = q.unflatten(-1, (groups, -1)).sum(-1) @ self._offset.mT
        for i, (part, channels) in enumerate(
            zip(self._parts, q.chunk(len(self._parts), -1), strict=True)
        ):
            total.addcmul_(channels @ part.mT, self._scale_of(i))
        return total

    def mix(self, weights: Tensor) -> Tensor:
        """See `FoldedBody`."""
        offsets = (weights @ self._offset).unsqueeze(-1)  # [B, Hk, R, J, 1]
        parts = []
        for i, part in enumerate(self._parts):
            if i % self._parts_per_group == 0:
                scaled = weights * self._scale_of(i)
            parts.append(scaled @ part)
        values: Tensor = torch.cat(parts, -1).unflatten(-1, (offsets.shape[-2], -1)) + offsets
        return values.flatten(-2)

    def _scale_of(self, part: int) -> Tensor:
        """Return the scales of the group of a part, `[B, Hk, 1, n]`."""
        return self._scale[..., part // self._parts_per_group, None, :]


def _code_bits(packed: Tensor, shift: int, bits: int) -> Tensor:
    if bits == 8:
        return packed
    shifted = packed >> shift if shift else packed
    return shifted if shift + bits == 8 else shifted & (2**bits - 1)


def fold_body(codec: Codec, planes: Mapping[str, Tensor], dtype: torch.dtype) -> FoldedBody:
    """Return the folded form of planes `[B, Hk, rows, width]` of an affine codec."""
    if isinstance(codec, IntCodec) and codec.axis == "token" and codec.bits != 3:
        parts, groups = 8 // codec.bits, planes["scale"].shape[-1]
        if parts % groups == 0:
            return PackedBody(codec, planes, dtype)
    affine = codec.affine(planes, dtype)
    assert affine is not None, "check_plan lets only affine codecs through"
    return AffineBody(affine)
