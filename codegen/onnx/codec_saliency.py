"""Codec `saliency` as nodes: tokens of a chunk sorted into two classes by TopK."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from kvxform.codecs.base import Codec
from kvxform.codecs.integer import LARGEST_FLOAT16, SMALLEST_SCALE
from kvxform.codecs.saliency import SaliencyCodec
from kvxform.codegen.onnx.builder import INT64, Builder
from kvxform.codegen.onnx.codec_base import FLOAT, FLOAT16, emits_codec, emitter_of
from kvxform.codegen.onnx.codec_bytes import bits_of, bytes_of
from kvxform.codegen.onnx.codec_scales import clip

DOUBLE = ir.DataType.DOUBLE
PLACES, INSIDE = 3, 4  # axes of the tokens of a chunk and of channels, `[B, Hk, C, chunk, D]`


@emits_codec(SaliencyCodec)
@dataclass(frozen=True)
class SaliencyEmitter:
    """Codec `saliency`; see `kvxform.codecs.saliency`."""

    codec: SaliencyCodec
    head_dim: int

    def encode(self, b: Builder, x: ir.Value) -> dict[str, ir.Value]:
        """Emit the planes of tokens that are ranked by how far out they lie."""
        assert not self.codec.needs_queries, "such streams are appended with scores"
        chunks = self._cut(b, b.cast(x, FLOAT), self.codec.chunk)
        return self._encode(b, chunks, self._spread(b, b.cast(chunks, DOUBLE)))

    def encode_ranked(self, b: Builder, x: ir.Value, scores: ir.Value) -> dict[str, ir.Value]:
        """Emit the planes of tokens with their scores, float32 `[B, Hk, T]`."""
        chunks = self._cut(b, b.cast(x, FLOAT), self.codec.chunk)
        apart = b.op("Reshape", scores, b.const([0, 0, -1, self.codec.chunk]))
        wide = b.cast(apart, DOUBLE)
        if self.codec.score == "mean":
            wide = b.op("Div", wide, b.table(self.codec.seen_by.double()))
        return self._encode(b, chunks, wide)

    def decode(self, b: Builder, planes: Mapping[str, ir.Value], dtype: ir.DataType) -> ir.Value:
        """Emit values; everything is computed in float32."""
        parts = [
            self._decode_class(b, option, codec, count, planes)
            for option, codec, count in self._classes
        ]
        sorted_values = b.op("Concat", *parts, axis=PLACES)
        order = self._order(b, bits_of(b, planes["class"], self.codec.chunk))
        places = self._per_channel(b, order, sorted_values)
        values = b.op("ScatterElements", sorted_values, places, sorted_values, axis=PLACES)
        if self.codec.separable:
            channel = b.op("Unsqueeze", b.cast(planes["channel"], FLOAT), b.const([PLACES]))
            values = b.op("Mul", values, channel)
        return b.cast(b.op("Reshape", values, b.const([0, 0, -1, self.head_dim])), dtype)

    @property
    def _classes(self) -> list[tuple[str, Codec, int]]:
        """Name, codec and tokens of a chunk of each class."""
        counts = self.codec.counts
        return [(option, getattr(self.codec, option), n) for option, n in counts.items()]

    def _encode(self, b: Builder, chunks: ir.Value, scores: ir.Value) -> dict[str, ir.Value]:
        planes = {}
        if self.codec.separable:
            largest = b.op("ReduceMax", b.op("Abs", chunks), b.const([PLACES]), keepdims=1)
            root = clip(b, b.op("Sqrt", largest), SMALLEST_SCALE**0.5, LARGEST_FLOAT16)
            channel = b.cast(root, FLOAT16)
            planes["channel"] = b.op("Squeeze", channel, b.const([PLACES]))
            chunks = b.op("Div", chunks, b.cast(channel, FLOAT))
        is_high = self._is_high(b, scores)
        counts = list(self.codec.counts.values())
        order = self._order(b, is_high)
        indices = b.ops("Split", order, b.const(counts), dtypes=[INT64] * 2, axis=PLACES)
        for (option, codec, count), index in zip(self._classes, indices, strict=True):
            places = self._per_channel(b, index, chunks)
            tokens = b.op("GatherElements", chunks, places, axis=PLACES)
            rows = b.op("Reshape", tokens, b.const([0, 0, -1, self.head_dim]))
            found = emitter_of(codec, self.head_dim).encode(b, rows)
            for spec in codec.planes(self.head_dim):
                width = count // spec.tokens_per_row * spec.width
                joined = b.op("Reshape", found[spec.name], b.const([0, 0, -1, width]))
                planes[f"{option}_{spec.name}"] = joined
        return {**planes, "class": bytes_of(b, is_high, self.codec.chunk)}

    def _decode_class(
        self, b: Builder, option: str, codec: Codec, count: int, planes: Mapping[str, ir.Value]
    ) -> ir.Value:
        """Return the tokens of one class, `[B, Hk, C, count, D]`."""
        own = {
            spec.name: b.op(
                "Reshape", planes[f"{option}_{spec.name}"], b.const([0, 0, -1, spec.width])
            )
            for spec in codec.planes(self.head_dim)
        }
        return self._cut(b, emitter_of(codec, self.head_dim).decode(b, own, FLOAT), count)

    def _is_high(self, b: Builder, scores: ir.Value) -> ir.Value:
        """Return 1.0 for the tokens with the highest scores, the first of equals, else 0.0."""
        count = b.const([self.codec.counts["high"]])
        _, best = b.ops("TopK", scores, count, dtypes=[DOUBLE, INT64], axis=PLACES)
        zeros = b.op("Expand", b.const(0.0, FLOAT), b.op("Shape", scores, dtype=INT64))
        ones = b.op("Expand", b.const(1.0, FLOAT), b.op("Shape", best, dtype=INT64))
        return b.op("ScatterElements", zeros, best, ones, axis=PLACES)

    def _order(self, b: Builder, is_high: ir.Value) -> ir.Value:
        """Return places with those of the high class first, each class ascending."""
        count = b.const([self.codec.chunk])
        return b.ops("TopK", is_high, count, dtypes=[FLOAT, INT64], axis=PLACES)[1]

    def _spread(self, b: Builder, chunks: ir.Value) -> ir.Value:
        """Return how far out each token lies in its chunk, float64 `[B, Hk, C, chunk]`."""
        middle = (self.codec.chunk - 1) // 2
        low, _ = b.ops(
            "TopK", chunks, b.const([middle + 1]), dtypes=[DOUBLE, INT64], axis=PLACES, largest=0
        )
        median = b.op("Gather", low, b.const([middle]), axis=PLACES)
        distance = b.op("Abs", b.op("Sub", chunks, median))
        usual = b.op("ReduceMean", distance, b.const([PLACES]), keepdims=1)
        held = b.op("Max", usual, b.const(SMALLEST_SCALE, DOUBLE))
        return b.op("ReduceMax", b.op("Div", distance, held), b.const([INSIDE]), keepdims=0)

    def _cut(self, b: Builder, x: ir.Value, count: int) -> ir.Value:
        """Return `[B, Hk, C, count, D]` of `[B, Hk, C * count, D]`."""
        return b.op("Reshape", x, b.const([0, 0, -1, count, self.head_dim]))

    def _per_channel(self, b: Builder, index: ir.Value, like: ir.Value) -> ir.Value:
        """Return an index of tokens `[B, Hk, C, n]` for every channel, `[B, Hk, C, n, D]`."""
        column = b.op("Unsqueeze", index, b.const([INSIDE]))
        ones = b.const([1, 1, 1, 1, self.head_dim])
        return b.op("Expand", column, ones)
