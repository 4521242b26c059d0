"""Codec `klt` as nodes: components of equal bits together, and one string of bits for all heads."""

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
from kvxform.codegen.onnx.codec_lookup import count_below, look_up

# Mean squares above which the code of the gain is one larger: log2 is rounded to whole numbers.
GAIN_BOUNDS = gain_of(torch.arange(2**GAIN_BITS, dtype=torch.float64) + 0.5).square()[:-1]


@emits_codec(KltCodec)
@dataclass(frozen=True)
class KltEmitter:
    """Codec `klt`; see `kvxform.codecs.klt`. Tokens of all heads are `[B, 1, T, Hk * D]`."""

    codec: KltCodec
    head_dim: int

    def encode(self, b: Builder, x: ir.Value) -> dict[str, ir.Value]:
        """Emit the row of codes of all heads."""
        tokens = b.op("Transpose", b.cast(x, FLOAT), perm=[0, 2, 1, 3])
        joined = b.op("Reshape", tokens, b.const([0, 1, -1, len(self._bits)]))
        unit, codes = b.op("Sub", joined, self._mean(b)), []
        gain = self._gain_code(b, unit) if self.codec.gain else None
        if gain is not None:
            unit = b.op("Div", unit, look_up(b, gain, _gains()))
        for bits, components in self._by_bits.items():
            own = b.op("Gather", unit, b.table(torch.tensor(components)), axis=CHANNELS)
            codes.append(count_below(b, own, bounds_of(unit_table(self.codec.tails, bits))))
        codes += [] if gain is None else [gain]
        every = b.cast(b.op("Concat", *codes, axis=CHANNELS), FLOAT)
        fields, digits = torch.tensor(self._string).unbind(-1)
        string = b.op("Gather", every, b.table(fields), axis=CHANNELS)
        return {"codes": bytes_of(b, digit_of(b, string, digits), len(self._string))}

    def decode(self, b: Builder, planes: Mapping[str, ir.Value], dtype: ir.DataType) -> ir.Value:
        """Emit values; everything is computed in float32."""
        string, parts = bits_of(b, planes["codes"], len(self._string)), []
        first = 0
        for bits, components in self._by_bits.items():
            codes = self._codes(b, string, range(first, first + len(components)), bits)
            parts.append(look_up(b, codes, unit_table(self.codec.tails, bits)))
            first += len(components)
        unit = self._in_order(b, parts)
        if self.codec.gain:
            gain = look_up(b, self._codes(b, string, range(first, first + 1), GAIN_BITS), _gains())
            unit = b.op("Mul", unit, gain)
        values = b.op("Add", unit, self._mean(b))
        apart = b.op("Reshape", values, b.const([0, -1, len(self.codec.bits), self.head_dim]))
        return b.cast(b.op("Transpose", apart, perm=[0, 2, 1, 3]), dtype)

    @cached_property
    def _bits(self) -> list[int]:
        """Bits of the components of all heads."""
        return [bits for head in self.codec.bits for bits in head]

    @cached_property
    def _by_bits(self) -> dict[int, list[int]]:
        """Components with each number of bits but 0."""
        counts = sorted(set(self._bits) - {0})
        return {n: [i for i, bits in enumerate(self._bits) if bits == n] for n in counts}

    @cached_property
    def _fields(self) -> dict[int, int]:
        """Place of each component that has bits among codes, which are sorted by their bits."""
        coded = [i for components in self._by_bits.values() for i in components]
        return {component: place for place, component in enumerate(coded)}

    @cached_property
    def _string(self) -> list[tuple[int, int]]:
        """Which code each bit of the string belongs to, and which of its bits that is."""
        own = range(GAIN_BITS if self.codec.gain else 0)  # the code of the gain comes last
        string = [(len(self._fields), digit) for digit in own]
        for digit in range(max(self._bits)):
            string += [(self._fields[i], digit) for i, n in enumerate(self._bits) if n > digit]
        return string

    def _codes(self, b: Builder, string: ir.Value, fields: range, bits: int) -> ir.Value:
        """Return codes of equal bits, int64 `[B, 1, T, n]`."""
        places = {entry: i for i, entry in enumerate(self._string)}
        where = torch.tensor([[places[i, digit] for digit in range(bits)] for i in fields])
        digits = b.op("Gather", string, b.table(where), axis=CHANNELS)  # [B, 1, T, n, bits]
        scaled = b.op("Mul", digits, b.table(2.0 ** torch.arange(bits)))
        return b.cast(b.op("ReduceSum", scaled, b.const([CHANNELS + 1]), keepdims=0), INT64)

    def _gain_code(self, b: Builder, unit: ir.Value) -> ir.Value:
        """Return the code of the gain of each token, int64 `[B, 1, T, 1]`."""
        coded = torch.tensor(sorted(self._fields))
        own = b.op("Gather", unit, b.table(coded), axis=CHANNELS)
        square = b.op("ReduceMean", b.op("Mul", own, own), b.const([CHANNELS]), keepdims=1)
        return count_below(b, square, GAIN_BOUNDS.float())

    def _mean(self, b: Builder) -> ir.Value:
        return b.table(torch.tensor(self.codec.mean).flatten())

    def _in_order(self, b: Builder, parts: list[ir.Value]) -> ir.Value:
        """Return components in their own order; those without bits are 0."""
        every = parts[0] if len(parts) == 1 else b.op("Concat", *parts, axis=CHANNELS)
        if 0 in self._bits:
            every = b.op("Pad", every, b.const([0] * 7 + [1]))
        order = [self._fields.get(i, len(self._fields)) for i in range(len(self._bits))]
        return b.op("Gather", every, b.table(torch.tensor(order)), axis=CHANNELS)


def _gains() -> Tensor:
    """Return the gain of every code, float32 `[16]`."""
    return gain_of(torch.arange(2**GAIN_BITS, dtype=torch.float32))
