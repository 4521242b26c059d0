"""Codec `fib-vq` as nodes: the nearest word is the largest of products with all words."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
from torch import Tensor

from kvxform.codecs.fib_codebook import codebook
from kvxform.codecs.fib_vq import FibVqCodec
from kvxform.codecs.lloyd_tables import bounds_of
from kvxform.codegen.onnx.builder import Builder
from kvxform.codegen.onnx.codec_base import emits_codec
from kvxform.codegen.onnx.codec_directions import DirectionEmitter
from kvxform.codegen.onnx.codec_lookup import count_below, look_up, nearest_row
from kvxform.codegen.onnx.codec_radix import pack_levels, unpack_levels
from kvxform.codegen.onnx.codec_runs import cut_runs, join_runs


@emits_codec(FibVqCodec)
class FibVqEmitter(DirectionEmitter):
    """Codec `fib-vq`; see `kvxform.codecs.fib_vq`."""

    def encode_directions(self, b: Builder, u: ir.Value) -> dict[str, ir.Value]:
        """Emit the nearest word of each block."""
        count = self.codec.blocks(self.head_dim)
        if self.codec.k == 1:
            codes = count_below(b, u, bounds_of(self._book()[:, 0]))
        else:
            blocks = cut_runs(b, u, self.head_dim, self.codec.k)
            codes = nearest_row(b, blocks, self._book())
        return {"codes": pack_levels(b, codes, self.codec.words, count)}

    def decode_directions(self, b: Builder, planes: Mapping[str, ir.Value]) -> ir.Value:
        """Emit a look-up of every block."""
        count = self.codec.blocks(self.head_dim)
        codes = unpack_levels(b, planes["codes"], self.codec.words, count)
        return join_runs(b, look_up(b, codes, self._book()), self.head_dim, self.codec.k)

    def _book(self) -> Tensor:
        return codebook(self.codec.words, self.codec.k, self.head_dim)
