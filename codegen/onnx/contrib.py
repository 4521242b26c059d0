"""What GroupQueryAttention and PagedAttention of ONNX Runtime have in common.

Both append, encode what they append where the plan says so, and read every token back from the
cache, its own one too: the same step rule as in every lowering. Where RoPE is the last that is done
to queries and keys, they do it as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir
from torch import fx

from kvxform.codegen.onnx.block_formats import BlockFormat, block_format
from kvxform.codegen.onnx.emission import Emission
from kvxform.codegen.onnx.fused_rope import FusedRope, fuse_rope
from kvxform.codegen.onnx.head_rows import node_of
from kvxform.codegen.onnx.parts import Scoring
from kvxform.ir.plan import SitePlan

Attributes = dict[str, int | float | str]


@dataclass(frozen=True)
class NewNodes:
    """The graph nodes of new keys and values, which the attention of their layer appends."""

    k: fx.Node
    v: fx.Node

    @classmethod
    def of(cls, append: fx.Node) -> NewNodes:
        """Return what a cache_append node appends."""
        k, v = append.args[:2]
        return cls(node_of(k), node_of(v))


@dataclass(frozen=True)
class ContribAttention:
    """One layer that the operator takes whole.

    Attributes:
        site: The layer.
        operands: Graph nodes of queries, keys and values, before the RoPE that the operator does.
        formats: How streams are kept, by name.
        scoring: Options of the attention.
        rope: What the operator is told of RoPE, or None.
    """

    site: SitePlan
    operands: list[fx.Node]
    formats: dict[str, BlockFormat]
    scoring: Scoring
    rope: FusedRope | None

    @classmethod
    def of(
        cls, e: Emission, node: fx.Node, site: SitePlan, new: NewNodes, scoring: Scoring
    ) -> ContribAttention:
        """Return what an attention node and the append before it ask for."""
        operands = [node_of(node.args[0]), new.k, new.v]
        rope = fuse_rope(e, *operands[:2])
        if rope is not None:
            operands[:2] = [node_of(x.args[0]) for x in operands[:2]]
        formats = {}
        for name, stream in site.streams.items():
            found = block_format(stream, e.program.dtype)
            assert found is not None, "checked by the table of levels"
            formats[name] = found
        return cls(site, operands, formats, scoring, rope)

    @property
    def tables(self) -> Sequence[ir.Value | None]:
        """Cosines and sines of all positions, or nothing."""
        return (None, None) if self.rope is None else self.rope.tables

    @property
    def attributes(self) -> Attributes:
        """Attributes that both operators have."""
        found: Attributes = {
            "num_heads": self.site.num_q_heads,
            "kv_num_heads": self.site.num_kv_heads,
            "scale": self.scoring.scale,
        }
        if self.scoring.span.window is not None:
            found["local_window_size"] = self.scoring.span.window
        if self.scoring.softcap is not None:
            found["softcap"] = self.scoring.softcap
        if self.rope is not None:
            found |= self.rope.attributes
        for side, format_ in self.sides:
            if format_.element:
                found[f"{side}_quant_type"] = format_.granularity
        return found

    @property
    def sides(self) -> list[tuple[str, BlockFormat]]:
        """Formats by `k` and `v`."""
        return [(name[0], format_) for name, format_ in self.formats.items()]

    def scales(self, e: Emission, axes: int) -> list[ir.Value | None]:
        """Return scales of keys and values, float32 `[1]`, or of each channel.

        Args:
            e: The emission.
            axes: Of the scales of channels: 3 for `[Hk, 1, D]`, 4 for `[1, Hk, 1, D]`.
        """
        found: list[ir.Value | None] = []
        for side, format_ in self.sides:
            scale = format_.scale
            if scale is not None and format_.granularity == "PER_CHANNEL" and axes == 4:
                scale = scale[None]
            name = f"model.layers.{self.site.layer}.attn.{side}_scale"
            found.append(None if scale is None else e.builder.tensor(name, scale))
        return found
