"""Codec `klt` as nodes: components of equal bits together, and one string of bits for all heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import onnx_ir as ir
import torch

from kvxform.codecs.klt import KltCodec
from kvxform.codecs.lloyd_tables import bounds_of, normal_table
from kvxform.codegen.onnx.builder import INT64, Builder
from kvxform.codegen.onnx.codec_base import FLOAT, HEADS, UINT8, emits_codec
from kvxform.codegen.onnx.codec_lookup import count_below, look_up

COMPONENTS = 2  # the axis of components of all heads, `[B, T, Hk * D]`, and of bits
BYTE_BITS = torch.arange(8)


@emits_codec(KltCodec)
@dataclass(frozen=True)
class KltEmitter:
    """Codec `klt`; see `kvxform.codecs.klt`."""

    codec: KltCodec
    head_dim: int

    def encode(self, b: Builder, x: ir.Value) -> dict[str, ir.Value]:
        """Emit the row of codes of all heads."""
        tokens = b.op("Transpose", b.cast(x, FLOAT), perm=[0, 2, 1, 3])
        joined = b.op("Reshape", tokens, b.const([0, 0, len(self._bits)]))
        mean, scale = (b.table(torch.tensor(n).flatten()) for n in self._constants)
        unit = b.op("Div", b.op("Sub", joined, mean), scale)
        codes = []
        for bits, components in self._by_bits.items():
            own = b.op("Gather", unit, b.table(torch.tensor(components)), axis=COMPONENTS)
            codes.append(count_below(b, own, bounds_of(normal_table(2**bits))))
        every = b.cast(b.op("Concat", *codes, axis=COMPONENTS), FLOAT)
        string = b.op(
            "Gather", every, b.table(torch.tensor([i for i, _ in self._string])), axis=COMPONENTS
        )
        digits = torch.tensor([digit for _, digit in self._string])
        return {"codes": self._pack(b, _bit(b, string, digits))}

    def decode(self, b: Builder, planes: Mapping[str, ir.Value], dtype: ir.DataType) -> ir.Value:
        """Emit values; everything is computed in float32."""
        string, parts = self._unpack(b, planes["codes"]), []
        places = {entry: i for i, entry in enumerate(self._string)}
        first = 0
        for bits, components in self._by_bits.items():
            own = range(first, first + len(components))
            where = torch.tensor([[places[i, digit] for digit in range(bits)] for i in own])
            digits = b.op("Gather", string, b.table(where), axis=COMPONENTS)  # [B, T, n, bits]
            powers = b.table(2.0 ** torch.arange(bits))
            codes = b.op("ReduceSum", b.op("Mul", digits, powers), b.const([3]), keepdims=0)
            parts.append(look_up(b, b.cast(codes, INT64), normal_table(2**bits)))
            first += len(components)
        mean, scale = (b.table(torch.tensor(n).flatten()) for n in self._constants)
        values = b.op("Add", b.op("Mul", self._in_order(b, parts), scale), mean)
        heads = len(self.codec.bits)
        apart = b.op("Reshape", values, b.const([0, 0, heads, self.head_dim]))
        return b.cast(b.op("Transpose", apart, perm=[0, 2, 1, 3]), dtype)

    @property
    def _constants(self) -> tuple[tuple[tuple[float, ...], ...], ...]:
        return self.codec.mean, self.codec.scale

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
    def _order(self) -> list[int]:
        """Components in the order of `_by_bits`."""
        return [i for components in self._by_bits.values() for i in components]

    @cached_property
    def _string(self) -> list[tuple[int, int]]:
        """For each bit of the string: the place of its component in `_order`, and which bit."""
        place = {component: i for i, component in enumerate(self._order)}
        digits = range(max(self._bits))
        return [(place[i], d) for d in digits for i, n in enumerate(self._bits) if n > d]

    def _pack(self, b: Builder, string: ir.Value) -> ir.Value:
        """Return bytes `[B, 1, T, n]` of bits `[B, T, bits]`."""
        missing = -len(self._string) % 8
        if missing:
            string = b.op("Pad", string, b.const([0, 0, 0, 0, 0, missing]))
        apart = b.op("Reshape", string, b.const([0, 0, (len(self._string) + missing) // 8, 8]))
        scaled = b.op("Mul", apart, b.table(2.0**BYTE_BITS))
        total = b.op("ReduceSum", scaled, b.const([3]), keepdims=0)
        return b.op("Unsqueeze", b.cast(total, UINT8), b.const([HEADS]))

    def _unpack(self, b: Builder, packed: ir.Value) -> ir.Value:
        """Return bits, those that fill up the last byte included, float32 `[B, T, 8 * n]`."""
        numbers = b.cast(b.op("Squeeze", packed, b.const([HEADS])), FLOAT)
        apart = _bit(b, b.op("Unsqueeze", numbers, b.const([3])), BYTE_BITS)
        return b.op("Reshape", apart, b.const([0, 0, -(-len(self._string) // 8) * 8]))

    def _in_order(self, b: Builder, parts: list[ir.Value]) -> ir.Value:
        """Return components in their own order; those without bits are 0."""
        every = parts[0] if len(parts) == 1 else b.op("Concat", *parts, axis=COMPONENTS)
        if 0 in self._bits:
            every = b.op("Pad", every, b.const([0, 0, 0, 0, 0, 1]))
        place = {component: i for i, component in enumerate(self._order)}
        order = [place.get(i, len(self._order)) for i in range(len(self._bits))]
        return b.op("Gather", every, b.table(torch.tensor(order)), axis=COMPONENTS)


def _bit(b: Builder, x: ir.Value, digits: torch.Tensor) -> ir.Value:
    """Return one binary digit of each number, as 0.0 or 1.0."""
    rest = b.op("Floor", b.op("Mul", x, b.table(0.5**digits)))
    halves = b.op("Floor", b.op("Mul", rest, b.const(0.5, FLOAT)))
    return b.op("Sub", rest, b.op("Add", halves, halves))
