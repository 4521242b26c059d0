"""Inputs and outputs of a graph over a paged cache, named as ONNX Runtime GenAI has them.

All new tokens of a batch stand one after the other, without padding: sequence i has the tokens
from `cumulative_sequence_lengths[i]` on. The cache is blocks of tokens, written in place, and a
table says which blocks are whose. Inside of the graph the tokens are one row, `[1, num_tokens]`,
for all but attention works on every token alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from kvxform.codegen.onnx.builder import INT64, Builder
from kvxform.codegen.onnx.ports import PAST, PRESENT, CachePorts, port_key
from kvxform.ir.plan import SitePlan

INT32 = ir.DataType.INT32
METADATA = "attention_metadata"  # the only input that lies on the host


@dataclass(frozen=True)
class PagedInputs:
    """The inputs of a graph over a paged cache, beside the cache.

    Attributes:
        input_ids: int64 `[num_tokens]`.
        position_ids: int64 `[num_tokens]`; an input of the graph only where something reads it.
        bounds: int32 `[batch_size + 1]`, where sequences begin and end among the new tokens.
        past: int32 `[batch_size]`, cached tokens before this call.
        table: int32 `[batch_size, max_blocks]`, blocks of each sequence.
        metadata: int32 `[3]` on the host: most new tokens of a sequence, most tokens of a sequence
            after this call, and a lower bound of the same, or 0.
    """

    input_ids: ir.Value
    position_ids: ir.Value
    bounds: ir.Value
    past: ir.Value
    table: ir.Value
    metadata: ir.Value

    @classmethod
    def make(cls) -> PagedInputs:
        """Return new inputs."""
        return cls(
            _input("input_ids", INT64, "num_tokens"),
            _input("position_ids", INT64, "num_tokens"),
            _input("cumulative_sequence_lengths", INT32, "batch_size + 1"),
            _input("past_sequence_lengths", INT32, "batch_size"),
            _input("block_table", INT32, "batch_size", "max_blocks"),
            _input(METADATA, INT32, 3),
        )

    def rows(self, b: Builder) -> tuple[ir.Value, ir.Value]:
        """Return token ids and positions as one row each, int64 `[1, num_tokens]`."""
        with b.scope("tokens"):
            first = b.const([0])
            ids = b.op("Unsqueeze", self.input_ids, first, role="input_ids")
            return ids, b.op("Unsqueeze", self.position_ids, first, role="position_ids")

    def used(self, nodes: Sequence[ir.Node]) -> list[ir.Value]:
        """Return what is an input of the graph that these nodes make up."""
        every = [self.input_ids, self.position_ids, self.bounds, self.past, self.table]
        read = {value for node in nodes for value in node.inputs}
        return [x for x in (*every, self.metadata) if x is not self.position_ids or x in read]


def enter_blocks(
    ports: CachePorts, site: SitePlan, stream: str, dtype: ir.DataType, width: int
) -> ir.Value:
    """Add the input of one stream, `[num_blocks, block_size, Hk, width]`."""
    key = _key(site, stream)
    value = ir.Value(
        name=f"{PAST}.{key}",
        type=ir.TensorType(dtype),
        shape=ir.Shape(["num_blocks", "block_size", site.num_kv_heads, width]),
    )
    ports.past[key] = value
    return value


def leave_blocks(ports: CachePorts, site: SitePlan, stream: str, value: ir.Value) -> None:
    """Make `value` the output of one stream: the same memory as its input."""
    key = _key(site, stream)
    value.name = f"{PRESENT}.{key}"
    value.shape = ports.past[key].shape
    ports.present[key] = value


def _key(site: SitePlan, stream: str) -> str:
    (plane,) = site.streams[stream].planes
    return port_key(site, stream, plane.name)


def _input(name: str, dtype: ir.DataType, *shape: str | int) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
