"""Codec `klt`: components of equal spread, each with its own number of bits.

It stores a stream in a calibrated basis where components are not correlated and have deviation 1
(pass `klt`). Each component of each head has a fixed number of bits b, from 0 to 8, and a mean m:

    q = the nearest level to (x - m) / r in the table of 2**b levels,      x' = m + r table[q]

A component of 0 bits is its mean. r is 1, or with `gain` the root mean square of all components of
the token that have bits, as a power of sqrt(2) from 2**-4 to 2**3.5: 4 bits for all heads together.

A token of all heads is one string of bits: the code of the gain, then the lowest bit of every
component that has one, head by head, then the second bits, and so on. It ends on a whole byte.

Components are sums of few heavy-tailed features rather than of many small ones. So the tables are
those of the Laplace distribution (`tails: laplace`), not of the normal one.

Source: transform coding, Cover and Thomas, Elements of Information Theory, section 10.3.3; its use
here is our own.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvxform.codecs.base import Codec, PlaneSpec, register_codec, require_option
from kvxform.codecs.lloyd_tables import bounds_of, laplace_table, normal_table
from kvxform.errors import PassError

MOST_BITS = 8
GAIN_BITS = 4
_UNIT_GAIN = 8  # code of the gain 1


@register_codec
@dataclass(frozen=True)
class KltCodec(Codec):
    """Codes of unequal size in a calibrated basis; made by pass `klt`.

    Attributes:
        bits: Bits of each component, by KV head and component.
        mean: Mean of each component, likewise.
        gain: Store the size of every token.
        tails: Distribution that the tables are for.
    """

    name: ClassVar[str] = "klt"
    bits: tuple[tuple[int, ...], ...]
    mean: tuple[tuple[float, ...], ...]
    gain: bool = False
    tails: Literal["laplace", "normal"] = "laplace"

    def __post_init__(self) -> None:
        """Check that there is one number of each kind for each component."""
        sizes = {len(head) for part in (self.bits, self.mean) for head in part}
        fits = len(sizes) == 1 and len(self.bits) == len(self.mean)
        require_option(fits, self.name, "bits and mean must have one number a component", sizes)
        found = {b for head in self.bits for b in head}
        is_known = all(isinstance(b, int) and 0 <= b <= MOST_BITS for b in found)
        require_option(is_known, self.name, f"bits must be 0 to {MOST_BITS}", sorted(found))
        is_known = self.tails in ("laplace", "normal")
        require_option(is_known, self.name, "tails must be laplace or normal", self.tails)

    @property
    def is_headwise(self) -> bool:
        """Heads have constants of their own, and share a row of codes."""
        return False

    def check(self, head_dim: int) -> None:
        """Raise PassError KVX203 if the constants are those of another head_dim."""
        if len(self.bits[0]) != head_dim:
            rule = f"codec klt must have constants for a head_dim of {head_dim}"
            raise PassError("KVX203", rule, got=len(self.bits[0]), hint="let pass klt make it")

    def planes(self, head_dim: int) -> tuple[PlaneSpec, ...]:
        """Return `codes`, one row a token for all heads."""
        total = sum(map(sum, self.bits)) + (GAIN_BITS if self.gain else 0)
        return (PlaneSpec("codes", "uint8", -(-total // 8), shared=True),)

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Encode `x`, shape `[..., Hk, T, D]`."""
        layout = _layout(self.bits, self.gain, x.device)
        unit = x.float().transpose(-3, -2).flatten(-2) - self._mean(x)  # [..., T, Hk * D]
        codes = torch.zeros(*unit.shape[:-1], layout.size, dtype=torch.int64, device=x.device)
        if self.gain:
            codes[..., -1] = _gain_code(unit[..., layout.coded])
            unit = unit / gain_of(codes[..., -1:].to(unit.dtype))
        codes[..., : unit.shape[-1]] = self._quantise(unit)
        string = (codes[..., layout.places] >> layout.digits) & 1
        padded = torch.nn.functional.pad(string, (0, -string.shape[-1] % 8))
        powers = 1 << torch.arange(8, device=x.device)
        packed = (padded.unflatten(-1, (-1, 8)) * powers).sum(-1).to(torch.uint8)
        return {"codes": packed.unsqueeze(-3)}

    def decode(self, planes: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Decode to `dtype`, shape `[..., Hk, T, D]`; 16-bit dtypes are computed in float32."""
        packed = planes["codes"].squeeze(-3)
        wide, device = torch.promote_types(dtype, torch.float32), packed.device
        layout = _layout(self.bits, self.gain, device)
        string = (packed[..., None] >> torch.arange(8, device=device)) & 1
        string = string.flatten(-2)[..., : len(layout.digits)].long()
        codes = string.new_zeros(*string.shape[:-1], layout.size)
        codes.index_add_(-1, layout.places, string << layout.digits)
        heads = len(self.bits)
        unit = self._dequantise(codes[..., : heads * len(self.bits[0])], wide)
        if self.gain:
            unit = unit * gain_of(codes[..., -1:].to(wide))
        x: Tensor = (unit + self._mean(unit)).unflatten(-1, (heads, -1))
        return x.transpose(-3, -2).to(dtype)

    def _quantise(self, unit: Tensor) -> Tensor:
        """Return codes of components in units of their deviations, `[..., Hk * D]`."""
        codes = torch.zeros(unit.shape, dtype=torch.int64, device=unit.device)
        for bits, own in _layout(self.bits, self.gain, unit.device).by_bits.items():
            bounds = bounds_of(unit_table(self.tails, bits)).to(unit.device)
            codes[..., own] = torch.bucketize(unit[..., own].contiguous(), bounds)
        return codes

    def _dequantise(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Return components of codes `[..., Hk * D]`, in units of their deviations."""
        unit = torch.zeros(codes.shape, dtype=dtype, device=codes.device)
        for bits, own in _layout(self.bits, self.gain, codes.device).by_bits.items():
            table = unit_table(self.tails, bits).to(codes.device, dtype)
            unit[..., own] = table[codes[..., own]]
        return unit

    def _mean(self, like: Tensor) -> Tensor:
        """Return the means of the components of all heads, `[Hk * D]`."""
        wide = torch.promote_types(like.dtype, torch.float32)
        return _means(self.mean, wide, like.device)


def unit_table(tails: str, bits: int) -> Tensor:
    """Return the levels of a component of `bits` bits, ascending, float32 `[2**bits]`."""
    return laplace_table(1 << bits) if tails == "laplace" else normal_table(1 << bits)


@functools.cache
def unit_errors(tails: str) -> Tensor:
    """Return the mean squared error of a component of 0 to 8 bits, float64 `[9]`."""
    grid = torch.linspace(-30, 30, 600_001, dtype=torch.float64)
    density = torch.exp(-(2**0.5) * grid.abs() if tails == "laplace" else -grid.square() / 2)
    density = density / density.sum()
    errors = [(density * grid.square()).sum()]
    for bits in range(1, MOST_BITS + 1):
        table = unit_table(tails, bits).double()
        nearest = table[torch.bucketize(grid, (table[1:] + table[:-1]) / 2)]
        errors.append((density * (grid - nearest).square()).sum())
    return torch.stack(errors)


def _gain_code(unit: Tensor) -> Tensor:
    """Return the code of the gain of tokens `[..., T, n]`, int64 `[..., T]`."""
    square = unit.square().mean(-1).clamp_min(2.0**-24)
    return (square.log2().round() + _UNIT_GAIN).clamp(0, (1 << GAIN_BITS) - 1).long()


def gain_of(codes: Tensor) -> Tensor:
    """Return the gain of codes, which are whole numbers in a floating-point dtype."""
    return torch.exp2((codes - _UNIT_GAIN) / 2)


@dataclass(frozen=True)
class _Layout:
    """Where bits go. A place is `h * D + d` for a component; the last place is that of the gain.

    Tensors are on one device: copied there once, for a copy waits for all that runs there.

    Attributes:
        size: Places.
        coded: Places of components that have bits.
        by_bits: The same by their number of bits.
        places: Place of each bit of a string.
        digits: Which of its bits that is, the lowest being 0.
    """

    size: int
    coded: Tensor
    by_bits: Mapping[int, Tensor]
    places: Tensor
    digits: Tensor


@functools.lru_cache(maxsize=256)
def _means(mean: tuple[tuple[float, ...], ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(mean, dtype=dtype, device=device).flatten()


@functools.lru_cache(maxsize=256)
def _layout(bits: tuple[tuple[int, ...], ...], gain: bool, device: torch.device) -> _Layout:
    flat = torch.tensor(bits).flatten()
    most = int(flat.max())
    planes = [torch.nonzero(flat > digit)[:, 0] for digit in range(most)]
    digits = [torch.full_like(plane, digit) for digit, plane in enumerate(planes)]
    own = GAIN_BITS if gain else 0
    found = sorted(set(flat.tolist()) - {0})
    return _Layout(
        len(flat) + 1,
        torch.nonzero(flat)[:, 0].to(device),
        {b: torch.nonzero(flat == b)[:, 0].to(device) for b in found},
        torch.cat([torch.full((own,), len(flat)), *planes]).to(device),
        torch.cat([torch.arange(own), *digits]).to(device),
    )
