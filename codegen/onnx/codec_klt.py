"""Codec `klt` as nodes: all heads of a token as one row of codes, and one string of their bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import onnx_ir as ir
import torch
from torch import Tensor

from kvxform.codecs.klt import GAIN_BITS, KltCodec, gain_of, unit_table
from kvxform.codecs.lloyd_tables import bounds_of
from kvxform.codegen.onnx.builder import INT64, Builder
from kvxform.codegen.onnx.codec_base import CHANNELS, FLOAT, emits_codec
from kvxform.codegen.onnx.codec_bytes import bits_of, bytes_of, digit_of
from kvxform.codegen.onnx.codec_lookup import (
    count_below,
    count_below_each,
    look_up,
    look_up_each,
)

# Mean squares above which the code of the gain is one larger: log2 is rounded to whole numbers.
GAIN_BOUNDS = gain_of(torch.arange(2**GAIN_BITS, dtype=torch.float64) + 0.5).square()[:-1]


@emits_codec(KltCodec)
@dataclass(frozen=True)
class KltEmitter:
    """Codec `klt`; see `kvxform.codecs.klt`.

    Rows are `[B, 1, T, n]`: n components of all heads, or only those that have bits.
    """

    codec: KltCodec
    head_dim: int

    def encode(self, b: Builder, x: ir.Value) -> dict[str, ir.Value]:
        """Emit the row of codes of all heads."""
        tokens = b.op("Transpose", b.cast(x, FLOAT), perm=[0, 2, 1, 3])
        joined = b.op("Reshape", tokens, b.const([0, 1, -1, len(self.bits)]))
        centred = b.op("Sub", joined, self._mean(b))
        unit = b.op("Gather", centred, b.table(self.used), axis=CHANNELS)
        gain = self._gain_code(b, unit) if self.codec.gain else None
        if gain is not None:
            unit = b.op("Div", unit, look_up(b, gain, _gains()))
        codes = self.quantise(b, unit)
        if gain is not None:
            codes = b.op("Concat", codes, gain, axis=CHANNELS)
        places, digits = torch.tensor(self._string).unbind(-1)
        string = b.op("Gather", b.cast(codes, FLOAT), b.table(places), axis=CHANNELS)
        return {"codes": bytes_of(b, digit_of(b, string, digits), len(self._string))}

    def decode(self, b: Builder, planes: Mapping[str, ir.Value], dtype: ir.DataType) -> ir.Value:
        """Emit values; everything is computed in float32."""
        string = bits_of(b, planes["codes"], len(self._string))
        unit = self.dequantise(b, self._codes(b, string, range(len(self.used))))
        if self.codec.gain:
            gain = self._codes(b, string, range(len(self.used), len(self.used) + 1))
            unit = b.op("Mul", unit, look_up(b, gain, _gains()))
        values = b.op("Add", self._all_components(b, unit), self._mean(b))
        apart = b.op("Reshape", values, b.const([0, -1, len(self.codec.bits), self.head_dim]))
        return b.cast(b.op("Transpose", apart, perm=[0, 2, 1, 3]), dtype)

    def quantise(self, b: Builder, unit: ir.Value) -> ir.Value:
        """Emit the codes of components in units of their deviations, int64."""
        bounds = [bounds_of(unit_table(self.codec.tails, size)) for size in self.sizes]
        return count_below_each(b, unit, bounds, self.size_of)

    def dequantise(self, b: Builder, codes: ir.Value) -> ir.Value:
        """Emit the components of codes, in units of their deviations."""
        tables = [unit_table(self.codec.tails, size) for size in self.sizes]
        return look_up_each(b, codes, tables, self.size_of)

    @cached_property
    def bits(self) -> Tensor:
        """Bits of the components of all heads, int64 `[Hk * D]`."""
        return torch.tensor(self.codec.bits).flatten()

    @cached_property
    def used(self) -> Tensor:
        """Components that have bits, int64 `[n]`."""
        return torch.nonzero(self.bits)[:, 0]

    @cached_property
    def sizes(self) -> list[int]:
        """The numbers of bits that there are."""
        return [int(size) for size in self.bits[self.used].unique()]

    @cached_property
    def size_of(self) -> Tensor:
        """Place among `sizes` of the bits of each component that has some, int64 `[n]`."""
        return torch.tensor([self.sizes.index(int(bits)) for bits in self.bits[self.used]])

    @cached_property
    def _string(self) -> list[tuple[int, int]]:
        """Which code each bit of the string belongs to, and which of its bits that is."""
        own = range(GAIN_BITS if self.codec.gain else 0)  # the code of the gain comes last
        string = [(len(self.used), digit) for digit in own]
        counts = self.bits[self.used].tolist()
        for digit in range(max(counts)):
            string += [(place, digit) for place, bits in enumerate(counts) if bits > digit]
        return string

    def _codes(self, b: Builder, string: ir.Value, places: range) -> ir.Value:
        """Return codes at these places of the row, int64."""
        found = {entry: i for i, entry in enumerate(self._string)}
        most = max(digit for place, digit in self._string if place in places) + 1
        zero = -(-len(self._string) // 8) * 8  # a bit that is always 0
        where = [[found.get((place, digit), zero) for digit in range(most)] for place in places]
        padded = b.op("Pad", string, b.const([0] * 7 + [1]))
        digits = b.op("Gather", padded, b.table(torch.tensor(where)), axis=CHANNELS)
        scaled = b.op("Mul", digits, b.table(2.0 ** torch.arange(most)))
        return b.cast(b.op("ReduceSum", scaled, b.const([CHANNELS + 1]), keepdims=0), INT64)

    def _gain_code(self, b: Builder, unit: ir.Value) -> ir.Value:
        """Return the code of the gain of each token, int64 `[B, 1, T, 1]`."""
        square = b.op("ReduceMean", b.op("Mul", unit, unit), b.const([CHANNELS]), keepdims=1)
        return count_below(b, square, GAIN_BOUNDS.float())

    def _mean(self, b: Builder) -> ir.Value:
        return b.table(torch.tensor(self.codec.mean).flatten(), "mean")

    def _all_components(self, b: Builder, unit: ir.Value) -> ir.Value:
        """Return a row with zeros for components without bits."""
        if len(self.used) == len(self.bits):
            return unit
        order = torch.full_like(self.bits, len(self.used))
        order[self.used] = torch.arange(len(self.used))
        padded = b.op("Pad", unit, b.const([0] * 7 + [1]))
        return b.op("Gather", padded, b.table(order), axis=CHANNELS)


def _gains() -> Tensor:
    """Return the gain of every code, float32 `[16]`."""
    return gain_of(torch.arange(2**GAIN_BITS, dtype=torch.float32))
