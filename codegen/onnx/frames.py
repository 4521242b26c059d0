"""What a graph takes and gives beside its cache: rows of a batch, or the tokens of a paged call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import onnx_ir as ir

from kvxform.codegen.onnx.builder import INT64, Builder
from kvxform.codegen.onnx.emission import Inputs
from kvxform.codegen.onnx.forms import Form
from kvxform.codegen.onnx.paged_ports import PagedInputs


class Frame(Protocol):
    """Inputs and logits of a graph.

    Attributes:
        inputs: What the nodes of the model read.
        paged: The inputs of a paged call, or None.
    """

    inputs: Inputs
    paged: PagedInputs | None

    def graph_inputs(self, nodes: Sequence[ir.Node]) -> list[ir.Value]:
        """Return the inputs of the graph that `nodes` make up, in their order."""

    def logits(self, b: Builder, x: ir.Value, vocab_size: int) -> ir.Value:
        """Emit the output of the graph from logits `[batch, tokens, vocab_size]`."""


class BatchFrame:
    """Rows of tokens, `[batch_size, sequence_length]`, and a mask; see `Frame`."""

    def __init__(self, form: Form) -> None:
        self._tokens = 1 if form.logits == "last" else "sequence_length"
        self.paged: PagedInputs | None = None
        self.inputs = Inputs(
            _rows("input_ids", "sequence_length"),
            _rows("attention_mask", "total_sequence_length"),
            _rows("position_ids", "sequence_length"),
        )

    def graph_inputs(self, nodes: Sequence[ir.Node]) -> list[ir.Value]:
        """Return all three inputs, whether they are read or not."""
        return [self.inputs.input_ids, self.inputs.attention_mask, self.inputs.position_ids]

    def logits(self, b: Builder, x: ir.Value, vocab_size: int) -> ir.Value:
        """Emit logits `[batch_size, sequence_length or 1, vocab_size]`."""
        y = b.op("Identity", x, role="logits")
        y.name, y.shape = "logits", ir.Shape(["batch_size", self._tokens, vocab_size])
        return y


class PagedFrame:
    """The tokens of all sequences one after the other; see `Frame` and `PagedInputs`."""

    def __init__(self, form: Form, b: Builder) -> None:
        self._rows = "batch_size" if form.logits == "last" else "num_tokens"
        self._call = PagedInputs.make()
        self.paged: PagedInputs | None = self._call
        ids, positions = self._call.rows(b)
        absent = _rows("attention_mask", "total_sequence_length")  # of no graph: nothing reads it
        self.inputs = Inputs(ids, absent, positions)

    def graph_inputs(self, nodes: Sequence[ir.Node]) -> list[ir.Value]:
        """Return the inputs of a paged call."""
        return self._call.used(nodes)

    def logits(self, b: Builder, x: ir.Value, vocab_size: int) -> ir.Value:
        """Emit logits `[num_tokens or batch_size, vocab_size]`, as GenAI takes them."""
        y = b.op("Squeeze", x, b.const([0]), role="logits")
        y.name, y.shape = "logits", ir.Shape([self._rows, vocab_size])
        return y


def make_frame(form: Form, b: Builder) -> Frame:
    """Return the frame of a graph."""
    return PagedFrame(form, b) if form.cache == "paged" else BatchFrame(form)


def _rows(name: str, length: str) -> ir.Value:
    shape = ir.Shape(["batch_size", length])
    return ir.Value(name=name, type=ir.TensorType(INT64), shape=shape)
