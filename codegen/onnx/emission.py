"""State of one emission and the table of emitters.

An emitter turns one graph node into ONNX nodes: `emit(e, node, *args, **kwargs)`, where tensors
among the arguments are already ONNX values and run-time sizes are `Size`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from kvxform.codegen.onnx.builder import INT64, Builder, Number, onnx_dtype
from kvxform.codegen.onnx.forms import Form
from kvxform.codegen.onnx.paged_ports import PagedInputs
from kvxform.codegen.onnx.ports import CachePorts
from kvxform.codegen.onnx.weights import WeightStore
from kvxform.ir.program import Program
from kvxform.ir.types import SymType, TensorType


@dataclass(frozen=True)
class Size:
    """A run-time size: an int64 tensor of shape `[1]`, ready to be part of a shape."""

    value: ir.Value


@dataclass(frozen=True)
class Inputs:
    """The tokens of a call. Over a paged cache all of them are one row, and there is no mask.

    Attributes:
        input_ids: int64 `[batch_size, sequence_length]`.
        attention_mask: int64 `[batch_size, total_sequence_length]`.
        position_ids: int64 `[batch_size, sequence_length]`.
    """

    input_ids: ir.Value
    attention_mask: ir.Value
    position_ids: ir.Value


Operand = ir.Value | Size | Number
Emitted = ir.Value | Size | tuple[ir.Value, ...] | None
Emit = Callable[..., Emitted]

EMITTERS: dict[Callable[..., Any], Emit] = {}
COMPLEX_EMITTERS: dict[Callable[..., Any], Emit] = {}  # of calls that read or yield such numbers
CONDITIONS: dict[Callable[..., Any], Callable[[fx.Node], bool]] = {}


def emits(
    *targets: Callable[..., Any], when: Callable[[fx.Node], bool] | None = None
) -> Callable[[Emit], Emit]:
    """Enter the decorated emitter in the table for every one of `targets`.

    Args:
        targets: Operations.
        when: Which of their calls it can emit; all of them by default.
    """

    def enter(function: Emit) -> Emit:
        EMITTERS.update(dict.fromkeys(targets, function))
        if when is not None:
            CONDITIONS.update(dict.fromkeys(targets, when))
        return function

    return enter


def emits_complex(*targets: Callable[..., Any]) -> Callable[[Emit], Emit]:
    """Enter the decorated emitter for calls of `targets` on complex numbers."""

    def enter(function: Emit) -> Emit:
        COMPLEX_EMITTERS.update(dict.fromkeys(targets, function))
        return function

    return enter


def is_complex(x: object) -> bool:
    """Whether an argument of a call is a tensor of complex numbers."""
    found = x.meta.get("type") if isinstance(x, fx.Node) else None
    return isinstance(found, TensorType) and found.dtype.is_complex


def find_emitter(node: fx.Node) -> Emit | None:
    """Return the emitter of a call, or None if there is none for it."""
    assert callable(node.target), "a call has an operation"
    if is_complex(node) or any(is_complex(x) for x in node.all_input_nodes):
        return COMPLEX_EMITTERS.get(node.target)
    condition = CONDITIONS.get(node.target)
    if condition is not None and not condition(node):
        return None
    return EMITTERS.get(node.target)


@dataclass
class Emission:
    """One run of the emitter over a Program.

    Attributes:
        program: What is emitted.
        builder: Where nodes go.
        inputs: The tokens of a call.
        weights: How the weights are stored.
        ports: Cache inputs and outputs.
        form: What the package is to be.
        caches: What each cache_append leaves for the attention that reads it, by owner layer.
        memo: Values that layers share, for instance masks, by a key that says what they are.
        paged: Inputs of a graph over a paged cache, or None.
        values: What each node of the graph was emitted as, so far.
        ready: What nodes further on are, where an emitter has done their work already.
        rows: Heads side by side, `[B, S, H * D]`, of nodes that are heads `[B, H, S, D]`.
    """

    program: Program
    builder: Builder
    inputs: Inputs
    weights: WeightStore
    ports: CachePorts
    form: Form
    caches: dict[int, Any] = field(default_factory=dict)
    memo: dict[tuple[Any, ...], ir.Value] = field(default_factory=dict)
    paged: PagedInputs | None = None
    values: dict[fx.Node, Emitted] = field(default_factory=dict)
    ready: dict[fx.Node, Emitted] = field(default_factory=dict)
    rows: dict[fx.Node, ir.Value] = field(default_factory=dict)

    def shared(self, key: tuple[Any, ...], make: Callable[[], ir.Value]) -> ir.Value:
        """Return the value for `key`; it is made once, outside of any layer."""
        if key not in self.memo:
            with self.builder.scope("shared." + str(key[0]).replace(" ", "_")):
                self.memo[key] = make()
        return self.memo[key]

    def weight(self, name: str) -> ir.Value:
        """Return the initialiser of a weight, as `weights` says how it is stored."""
        return self.builder.tensor(
            self.weights.name(name),
            self.program.weights[name],
            transposed=self.weights.is_transposed(name),
        )

    def dim(self, x: ir.Value, axis: int) -> ir.Value:
        """Return the size of one axis, int64 `[1]`."""
        return self.builder.op("Shape", x, dtype=INT64, start=axis, end=axis + 1)

    def symbol(self, name: str) -> ir.Value:
        """Return the batch size (`B`) or the number of new tokens (`S`), int64 `[1]`."""
        ids = self.inputs.input_ids
        return self.shared(("size", name), lambda: self.dim(ids, "BS".index(name)))

    def shape(self, sizes: Sequence[int | Size]) -> ir.Value:
        """Return a shape vector, int64 `[len(sizes)]`."""
        if all(isinstance(n, int) for n in sizes):
            return self.builder.const([n for n in sizes if isinstance(n, int)])
        parts = [n.value if isinstance(n, Size) else self.builder.const([n]) for n in sizes]
        return self.builder.op("Concat", *parts, axis=0)

    def operand(self, x: Operand, dtype: ir.DataType) -> ir.Value:
        """Return `x` as a value of `dtype`; numbers and sizes become tensors that broadcast."""
        if isinstance(x, Size):
            return self.builder.cast(x.value, dtype)
        if isinstance(x, ir.Value):
            return self.builder.cast(x, dtype)
        return self.builder.const(_python_number(x, dtype), dtype)

    def slice(
        self, x: ir.Value, start: ir.Value | int, stop: ir.Value | int, axis: int
    ) -> ir.Value:
        """Return `x[start:stop]` along `axis`; bounds are ints or int64 `[1]`."""
        bounds = [self.builder.const([n]) if isinstance(n, int) else n for n in (start, stop)]
        return self.builder.op("Slice", x, *bounds, self.builder.const([axis]))


def type_of(node: fx.Node) -> TensorType:
    """Return the type of a node that yields one tensor."""
    found = node.meta["type"]
    assert isinstance(found, TensorType), f"{node.name} yields one tensor"
    return found


def dtype_of(node: fx.Node) -> ir.DataType:
    """Return the ONNX dtype of a node that yields one tensor."""
    return onnx_dtype(type_of(node).dtype)


def rank_of(node: fx.Node) -> int:
    """Return the number of axes of a node that yields one tensor."""
    return len(type_of(node).shape)


def is_size(node: fx.Node) -> bool:
    """Whether a node yields a run-time size."""
    return isinstance(node.meta.get("type"), SymType)


def promoted(*operands: object) -> torch.dtype:
    """Return the dtype in which torch compares operands: fx nodes or numbers."""
    samples = [_sample(x) for x in operands]
    found = samples[0]
    for sample in samples[1:]:
        found = torch.empty((1,) * found.dim(), dtype=torch.result_type(found, sample))
    return found.dtype


def _sample(x: object) -> torch.Tensor:
    if isinstance(x, fx.Node) and isinstance(x.meta["type"], TensorType):
        return torch.empty((1,) * len(x.meta["type"].shape), dtype=x.meta["type"].dtype)
    return torch.tensor(x if isinstance(x, (int, float, bool)) else 0)


def _python_number(x: Number, dtype: ir.DataType) -> Number:
    if dtype == ir.DataType.BOOL:
        return bool(x)
    return float(x) if dtype.is_floating_point() else int(x)
