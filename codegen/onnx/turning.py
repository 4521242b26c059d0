"""What is turned when it is read: streams in another basis, and keys that are cached before RoPE.

All cached tokens are read in every step, so that all of them are turned in every step. Cosines and
sines of their positions are shared by all layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from kvxform.codegen.onnx.dialect import rotary_tables, turn_pairs
from kvxform.codegen.onnx.emission import Emission
from kvxform.codegen.onnx.masks import body_end, key_positions
from kvxform.codegen.onnx.rotations import rotate_heads
from kvxform.codegen.onnx.segments import ExactSegment
from kvxform.codegen.onnx.streams import StreamView
from kvxform.ir.plan import SitePlan

Bounds = tuple[ir.Value, ir.Value]  # first slot of a run of tokens and the one behind it
Turn = Callable[[ir.Value, Bounds | None], ir.Value]  # tokens [B, Hk, t, D]; all slots if None


@dataclass(frozen=True)
class KeyRead:
    """`kvxform.ir.rotary.KeyRead` with ONNX values instead of tensors."""

    inv_freq: ir.Value | None = None
    rotary_dim: int = 0
    attention_scaling: float = 1.0
    interleaved: bool = False
    basis: ir.Value | None = None

    def apply(self, e: Emission, site: SitePlan, view: StreamView) -> StreamView:
        """Return a view of keys, of the view of what is stored."""
        if self.inv_freq is None and self.basis is None:
            return view

        def turn(x: ir.Value, bounds: Bounds | None) -> ir.Value:
            return self._embed(e, in_own_basis(e, site, x, self.basis), bounds)

        with e.builder.part("k/turn"):
            return _turned(e, view, turn)

    def _embed(self, e: Emission, x: ir.Value, bounds: Bounds | None) -> ir.Value:
        """Return `x` after RoPE, where it is stored before it."""
        if self.inv_freq is None:
            return x
        assert x.dtype is not None, "graph values have a dtype"
        positions, scaling = key_positions(e), self.attention_scaling
        tables = rotary_tables(e, positions, self.inv_freq, scaling, x.dtype)
        if bounds is not None:
            tables = tuple(e.slice(table, *bounds, axis=1) for table in tables)
        return turn_pairs(e, x, tables, self.rotary_dim, interleaved=self.interleaved)


def values_as_read(
    e: Emission, site: SitePlan, view: StreamView, basis: ir.Value | None
) -> StreamView:
    """Return a view of values, of the view of what is stored."""
    if basis is None:
        return view
    with e.builder.part("v/turn"):
        return _turned(e, view, lambda x, _: in_own_basis(e, site, x, basis))


def in_own_basis(e: Emission, site: SitePlan, x: ir.Value, basis: ir.Value | None) -> ir.Value:
    """Return stored vectors `[B, Hk, t, D]` times `basis` `[Hk / g, g D, g D]`, or as they are."""
    if basis is None:
        return x
    assert basis.shape is not None, "weights have a shape"
    assert x.dtype is not None, "graph values have a dtype"
    count, size, _ = (int(n) for n in basis.shape.numpy())
    heads, matrices = site.num_kv_heads, e.builder.cast(basis, x.dtype)
    return rotate_heads(e.builder, x, matrices, heads, size * count // heads, count, size)


def _turned(e: Emission, view: StreamView, turn: Turn) -> StreamView:
    (stored,) = view.segments
    assert isinstance(stored, ExactSegment), "such streams are decoded"
    segments = (ExactSegment(turn(stored.values, None)),)
    if view.fresh is None:
        return dataclasses.replace(view, segments=segments)
    first, last = (body_end(e, view.plan, name) for name in ("past", "total"))
    fresh = ExactSegment(turn(view.fresh.values, (first, last)))
    return dataclasses.replace(view, segments=segments, fresh=fresh)
