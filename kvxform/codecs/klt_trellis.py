"""Codec `klt-trellis`: `klt` with the components of a token coded as one path through a trellis.

Bits, gain, layout and basis are those of `klt`. Codes are found by a search over the whole row
(`kvxform.codecs.trellis`), which takes about a third off the error at no bit. Decoding looks at the
lowest bits of the components before, `memory` of them, and reads one table.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvxform.codecs.base import register_codec, require_option
from kvxform.codecs.klt import KltCodec, unit_errors
from kvxform.codecs.trellis import ERROR_SHARE, POLYNOMIALS, RowCode, of_bits


@register_codec
@dataclass(frozen=True)
class TrellisKltCodec(KltCodec):
    """Codes of a path through a trellis in a calibrated basis; made by pass `klt`.

    Attributes:
        memory: Bits of the shift register: 2 or 3.
    """

    name: ClassVar[str] = "klt-trellis"
    memory: int = 2

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        known = ", ".join(map(str, POLYNOMIALS))
        is_known = self.memory in POLYNOMIALS
        require_option(is_known, self.name, f"memory must be one of {known}", self.memory)

    def _quantise(self, unit: Tensor) -> Tensor:
        return self._row.encode(unit, _weights(self._row.bits, self.tails, unit.device))

    def _dequantise(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        return self._row.decode(codes, dtype)

    @property
    def error_weights(self) -> Tensor:
        """What a squared error of each component counts, `[Hk * D]`."""
        return _weights(self._row.bits, self.tails, torch.device("cpu"))

    @property
    def _row(self) -> RowCode:
        return RowCode(tuple(b for head in self.bits for b in head), self.tails, self.memory)


@functools.cache
def trellis_errors(tails: str) -> Tensor:
    """Return the mean squared error of a component of 0 to 8 bits, float64 `[9]`."""
    plain = unit_errors(tails)
    shares = [1.0, *(of_bits(ERROR_SHARE[tails], bits) for bits in range(1, len(plain)))]
    return plain * torch.tensor(shares, dtype=torch.float64)


@functools.lru_cache(maxsize=256)
def _weights(bits: tuple[int, ...], tails: str, device: torch.device) -> Tensor:
    """Return what errors count: bits are shared so that cost times error is alike everywhere."""
    return (1 / trellis_errors(tails)[torch.tensor(bits)]).to(device)
