"""Codec `klt`: components of known spread, each with its own number of bits; no data per token.

It stores a stream in a calibrated basis in which components are not correlated (pass `klt`). Each
component of each head has a fixed number of bits b, from 0 to 8, given where they lower the error
most (reverse water-filling), and a fixed mean m and deviation s:

    q = the nearest level to (x - m) / s in the table of 2**b levels,      x' = m + s table[q]

A component of 0 bits is its mean. The codes of a token of all heads are one string of bits: first
the lowest bit of every component that has one, head by head, then the second bits, and so on. It
ends on a whole byte.

Source: transform coding with reverse water-filling, Cover and Thomas, Elements of Information
Theory, section 10.3.3; its use here is our own.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvxform.codecs.base import Codec, PlaneSpec, register_codec, require_option
from kvxform.codecs.lloyd_tables import bounds_of, normal_table
from kvxform.errors import PassError

MOST_BITS = 8
Numbers = tuple[float, ...]


@register_codec
@dataclass(frozen=True)
class KltCodec(Codec):
    """Codes of unequal size in a calibrated basis; made by pass `klt`.

    Attributes:
        bits: Bits of each component, by KV head and component.
        mean: Mean of each component, likewise.
        scale: Deviation of each component, likewise; its table is multiplied by it.
    """

    name: ClassVar[str] = "klt"
    bits: tuple[tuple[int, ...], ...] = ()
    mean: tuple[Numbers, ...] = ()
    scale: tuple[Numbers, ...] = ()

    def __post_init__(self) -> None:
        """Check that there is one number of each kind for each component."""
        sizes = {tuple(len(head) for head in part) for part in (self.bits, self.mean, self.scale)}
        fits = len(sizes) == 1 and len(set(next(iter(sizes)))) == 1
        require_option(fits, self.name, "bits, mean and scale must fit each other", sizes)
        found = [b for head in self.bits for b in head]
        is_known = all(isinstance(b, int) and 0 <= b <= MOST_BITS for b in found)
        require_option(is_known, self.name, f"bits must be 0 to {MOST_BITS}", found)

    @property
    def is_headwise(self) -> bool:
        """Heads have constants of their own, and share a row of codes."""
        return False

    def check(self, head_dim: int) -> None:
        """Raise PassError KVX203 if the constants are those of another head_dim."""
        if len(self.bits[0]) != head_dim:
            rule = f"codec klt must be fitted on a head_dim of {head_dim}"
            raise PassError("KVX203", rule, got=len(self.bits[0]), hint="let pass klt make it")

    def planes(self, head_dim: int) -> tuple[PlaneSpec, ...]:
        """Return `codes`, one row a token for all heads."""
        return (PlaneSpec("codes", "uint8", -(-sum(map(sum, self.bits)) // 8), shared=True),)

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Encode `x`, shape `[..., Hk, T, D]`."""
        layout = _layout(self.bits)
        unit = (_joined(x.float()) - self._constants(self.mean, x)) / self._constants(self.scale, x)
        codes = torch.zeros(unit.shape, dtype=torch.int64, device=x.device)
        for bits, components in layout.by_bits.items():
            own = components.to(x.device)
            bounds = bounds_of(normal_table(1 << bits)).to(x.device)
            codes[..., own] = torch.bucketize(unit[..., own].contiguous(), bounds)
        places = layout.components.to(x.device)
        string = (codes[..., places] >> layout.digits.to(x.device)) & 1
        padded = torch.nn.functional.pad(string, (0, -string.shape[-1] % 8))
        powers = 1 << torch.arange(8, device=x.device)
        packed = (padded.unflatten(-1, (-1, 8)) * powers).sum(-1).to(torch.uint8)
        return {"codes": packed.unsqueeze(-3)}

    def decode(self, planes: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Decode to `dtype`, shape `[..., Hk, T, D]`; 16-bit dtypes are computed in float32."""
        layout, packed = _layout(self.bits), planes["codes"].squeeze(-3)
        wide = dtype if dtype.itemsize >= 4 else torch.float32
        string = (packed[..., None] >> torch.arange(8, device=packed.device)) & 1
        string = string.flatten(-2)[..., : len(layout.digits)].long()
        codes = string.new_zeros(*string.shape[:-1], sum(map(len, self.bits)))
        places = layout.components.to(packed.device)
        codes.index_add_(-1, places, string << layout.digits.to(packed.device))
        unit = torch.zeros(codes.shape, dtype=wide, device=packed.device)
        for bits, components in layout.by_bits.items():
            own = components.to(packed.device)
            unit[..., own] = normal_table(1 << bits).to(packed.device, wide)[codes[..., own]]
        x = unit * self._constants(self.scale, unit) + self._constants(self.mean, unit)
        return x.unflatten(-1, (len(self.bits), -1)).transpose(-3, -2).to(dtype)

    def _constants(self, numbers: tuple[Numbers, ...], like: Tensor) -> Tensor:
        """Return one number for each component of all heads, `[Hk * D]`."""
        wide = torch.promote_types(like.dtype, torch.float32)
        return torch.tensor(numbers, dtype=wide, device=like.device).flatten()


@dataclass(frozen=True)
class _Layout:
    """Where bits go.

    Attributes:
        by_bits: Components of all heads, `h * D + d`, by their number of bits, none left out but
            those of 0 bits.
        components: Component of each bit of a string.
        digits: Which of its bits that is, the lowest being 0.
    """

    by_bits: Mapping[int, Tensor]
    components: Tensor
    digits: Tensor


@functools.lru_cache(maxsize=256)
def _layout(bits: tuple[tuple[int, ...], ...]) -> _Layout:
    flat = torch.tensor(bits).flatten()
    planes = [torch.nonzero(flat > digit)[:, 0] for digit in range(int(flat.max()))]
    empty = torch.zeros(0, dtype=torch.int64)
    return _Layout(
        {int(b): torch.nonzero(flat == b)[:, 0] for b in flat.unique() if b},
        torch.cat([empty, *planes]),
        torch.cat([empty, *(torch.full_like(p, i) for i, p in enumerate(planes))]),
    )


def _joined(x: Tensor) -> Tensor:
    """Return `[..., T, Hk * D]` of `[..., Hk, T, D]`."""
    return x.transpose(-3, -2).flatten(-2)
