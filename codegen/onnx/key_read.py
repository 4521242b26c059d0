"""Keys that are cached before RoPE: turned back and rotated by position when they are read.

The cached tokens are all read in every step, so that all of them are rotated in every step. Cosines
and sines of their positions are shared by all layers.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import onnx_ir as ir

from kvxform.codegen.onnx.dialect import rotary_tables
from kvxform.codegen.onnx.emission import Emission
from kvxform.codegen.onnx.masks import body_end, key_positions
from kvxform.codegen.onnx.rotations import rotate_heads
from kvxform.codegen.onnx.segments import ExactSegment
from kvxform.codegen.onnx.streams import StreamView
from kvxform.ir.plan import SitePlan


@dataclass(frozen=True)
class KeyRead:
    """`kvxform.ir.rotary.KeyRead` with ONNX values instead of tensors."""

    inv_freq: ir.Value
    rotary_dim: int
    attention_scaling: float = 1.0
    interleaved: bool = False
    basis: ir.Value | None = None

    def apply(self, e: Emission, site: SitePlan, view: StreamView) -> StreamView:
        """Return a view of keys, of the view of a stream that holds them before RoPE."""
        (stored,) = view.segments
        assert isinstance(stored, ExactSegment), "such streams are decoded"
        tables = self._tables(e, stored.values)
        segments = (ExactSegment(self._turn(e, site, stored.values, tables)),)
        if view.fresh is None:
            return dataclasses.replace(view, segments=segments)
        first, last = (body_end(e, view.plan, name) for name in ("past", "total"))
        own = tuple(e.slice(table, first, last, axis=1) for table in tables)
        fresh = ExactSegment(self._turn(e, site, view.fresh.values, own))
        return dataclasses.replace(view, segments=segments, fresh=fresh)

    def _tables(self, e: Emission, like: ir.Value) -> tuple[ir.Value, ...]:
        assert like.dtype is not None, "graph values have a dtype"
        positions = key_positions(e)
        return rotary_tables(e, positions, self.inv_freq, self.attention_scaling, like.dtype)

    def _turn(
        self, e: Emission, site: SitePlan, x: ir.Value, tables: tuple[ir.Value, ...]
    ) -> ir.Value:
        return e.builder.op(
            "RotaryEmbedding",
            self._unrotate(e, site, x),
            *tables,
            role="rope",
            rotary_embedding_dim=self.rotary_dim,
            interleaved=int(self.interleaved),
        )

    def _unrotate(self, e: Emission, site: SitePlan, x: ir.Value) -> ir.Value:
        if self.basis is None:
            return x
        assert self.basis.shape is not None, "weights have a shape"
        assert x.dtype is not None, "graph values have a dtype"
        count, size, _ = (int(n) for n in self.basis.shape.numpy())
        b = e.builder
        back = b.cast(self.basis, x.dtype)
        return rotate_heads(b, x, back, site.num_kv_heads, site.key.head_dim, count, size)
