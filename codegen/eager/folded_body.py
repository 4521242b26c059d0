"""Encoded tokens that are read without decoding them; scales go where they are cheapest.

`AffineBody` takes any affine codec. `PackedBody` is for codes of 2, 4 and 8 bits along the token
axis: it multiplies with the channels of one bit position at a time, so packed codes become floats
without being put back in order first.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
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

    @abstractmethod
    def __getitem__(self, index: tuple[slice, slice]) -> FoldedBody:
        """Return some batch entries and heads, as a tensor would."""


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

    def __getitem__(self, index: tuple[slice, slice]) -> FoldedBody:
        """See `FoldedBody`."""
        parts = {n: getattr(self._codes, n)[index] for n in ("codes", "scale", "offset")}
        return AffineBody(dataclasses.replace(self._codes, **parts))


class PackedBody(FoldedBody):
    """Codes of codec `int` along the token axis, split by their position in the byte.

    Args:
        codec: The codec; 2, 4 or 8 bits, with groups of whole bit positions.
        planes: Stored planes `[B, Hk, n, width]`.
        dtype: Dtype of the arithmetic.
    """

    def __init__(self, codec: IntCodec, planes: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        packed = planes["codes"]
        self.num_kv_heads, self.num_tokens = packed.shape[1:3]
        shifts = range(0, 8, codec.bits)
        self._parts = [_code_bits(packed, shift, codec.bits).to(dtype) for shift in shifts]
        self._scale = _columns(planes["scale"], dtype)
        self._offset = _offset(codec, planes, self._scale)
        self._parts_per_group = len(self._parts) // self._scale.shape[2]

    def scores(self, q: Tensor) -> Tensor:
        """See `FoldedBody`; per group, scale * (q c) + offset * sum(q)."""
        channels, total = q.chunk(len(self._parts), -1), None
        for group in range(self._scale.shape[2]):
            parts = range(group * self._parts_per_group, (group + 1) * self._parts_per_group)
            bare = functools.reduce(torch.add, (channels[i] @ self._parts[i].mT for i in parts))
            own = sum(channels[i].sum(-1, keepdim=True) for i in parts)
            bare = torch.addcmul(own * self._offset[:, :, group, None], bare, self._scale_of(group))
            total = bare if total is None else total + bare
        assert total is not None, "a token has at least one group"
        return total

    def mix(self, weights: Tensor) -> Tensor:
        """See `FoldedBody`; per group, (weights * scale) c + weights offset."""
        parts = []
        for group in range(self._scale.shape[2]):
            scaled = weights * self._scale_of(group)
            shift = (weights * self._offset[:, :, group, None]).sum(-1, keepdim=True)
            first = group * self._parts_per_group
            own = self._parts[first : first + self._parts_per_group]
            parts += [scaled @ part + shift for part in own]
        return torch.cat(parts, -1)

    def __getitem__(self, index: tuple[slice, slice]) -> FoldedBody:
        """See `FoldedBody`."""
        part = copy.copy(self)
        part._parts = [codes[index] for codes in self._parts]
        part._scale, part._offset = self._scale[index], self._offset[index]
        part.num_kv_heads = part._scale.shape[1]
        return part

    def _scale_of(self, group: int) -> Tensor:
        """Return the scales of a group, `[B, Hk, 1, n]`."""
        return self._scale[:, :, group, None]


def _columns(plane: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a plane `[B, Hk, n, J]` as contiguous `[B, Hk, J, n]`, one column a token."""
    return plane.mT.to(dtype, memory_format=torch.contiguous_format)


def _offset(codec: IntCodec, planes: Mapping[str, Tensor], scale: Tensor) -> Tensor:
    """Return what is added to scale * code, `[B, Hk, J, n]`."""
    if codec.symmetric:
        return scale * -float(1 << (codec.bits - 1))
    zero = _columns(planes["zero"], scale.dtype)
    return zero if codec.zero == "float" else scale * -zero


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
