"""Build an ONNX graph: nodes with readable names, shared constants, weights without copies.

Everything is named from what it is and where it is, never from a counter over the whole graph, so
that equal programs give equal files and a change in one layer leaves other names alone.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import onnx_ir as ir
import torch
from torch import Tensor

Attribute = int | float | str | Sequence[int] | ir.Graph
Number = int | float | bool

INT64 = ir.DataType.INT64
BOOL = ir.DataType.BOOL
FUNCTIONS = "kvx"  # domain of functions that packages define
DOMAINS = {"com.microsoft": 1, FUNCTIONS: 1}  # versions of the domains besides the default one
TRANSPOSED = ".T"  # end of the name of a weight that is stored as `W.T`


def onnx_dtype(dtype: torch.dtype) -> ir.DataType:
    """Return the ONNX dtype of a torch dtype."""
    return ir.tensor_adapters.from_torch_dtype(dtype)


def scope_of(module: str) -> str:
    """Return the node scope of a module path: `model.layers.3.mlp` -> `/model/layers.3/mlp`."""
    return re.sub(r"(?:^|\.)(?=[A-Za-z_])", "/", module)


class Builder:
    """Collects nodes and initialisers of one graph.

    Attributes:
        nodes: Nodes in the order of execution.
        initializers: Constants and weights by name.
    """

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self._names: Counter[str] = Counter()
        self._scope = ""
        self._notes: Mapping[str, str] = {}

    @contextmanager
    def scope(self, module: str, notes: Mapping[str, str] | None = None) -> Iterator[None]:
        """Name nodes after `module` and put `notes` on them while the context is open."""
        before = self._scope, self._notes
        self._scope, self._notes = scope_of(module), notes or {}
        try:
            yield
        finally:
            self._scope, self._notes = before

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Name nodes after a part of the open scope, as `k/encode`, while the context is open."""
        before = self._scope
        self._scope = f"{before}/{name}"
        try:
            yield
        finally:
            self._scope = before

    @contextmanager
    def branch(self, name: str) -> Iterator[list[ir.Node]]:
        """Collect nodes in a list of their own, those of a graph in a node of this one."""
        outer, self.nodes = self.nodes, []
        try:
            with self.part(name):
                yield self.nodes
        finally:
            self.nodes = outer

    def ops(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        dtypes: Sequence[ir.DataType | None],
        role: str = "",
        domain: str = "",
        **attributes: Attribute,
    ) -> tuple[ir.Value, ...]:
        """Return the outputs of a node, `len(dtypes)` of them.

        Args:
            op_type: Operator of `domain`.
            inputs: Values; None for an optional input left out.
            dtypes: Dtype of every output; None leaves that output out.
            role: Last part of the node name; the operator if empty.
            domain: The default one, or one of `DOMAINS`.
            attributes: Attributes by name.
        """
        name = self.unique(f"{self._scope}/{role or op_type}")
        outputs = [
            ir.Value(name=f"{name}_output_{i}" if dtype else "", type=_tensor_type(dtype))
            for i, dtype in enumerate(dtypes)
        ]
        node = ir.node(
            op_type, list(inputs), attributes or None, domain=domain, outputs=outputs, name=name
        )
        self._append(node)
        return tuple(outputs)

    def op(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        dtype: ir.DataType | None = None,
        role: str = "",
        domain: str = "",
        **attributes: Attribute,
    ) -> ir.Value:
        """Add a node with one output, of the dtype of the first input unless told otherwise."""
        if dtype is None:
            assert inputs[0] is not None, "the dtype follows the first input"
            dtype = inputs[0].dtype
        return self.ops(op_type, *inputs, dtypes=[dtype], role=role, domain=domain, **attributes)[0]

    def cast(self, x: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Return `x` in `dtype`; no node if it already is."""
        return x if x.dtype == dtype else self.op("Cast", x, dtype=dtype, to=int(dtype))

    def const(self, value: Number | Sequence[Number], dtype: ir.DataType = INT64) -> ir.Value:
        """Return a constant, one initialiser for equal values."""
        plain = list(value) if isinstance(value, Sequence) else value
        name = f"const/{dtype.short_name()}/{plain}".replace(" ", "")
        if name not in self.initializers:
            self._add(name, ir.tensor(plain, dtype=dtype, name=name))
        return self.initializers[name]

    def tensor(self, name: str, value: Tensor, *, transposed: bool = False) -> ir.Value:
        """Return `value` as an initialiser; equal names mean equal tensors.

        Args:
            name: Name of the initialiser.
            value: The tensor; it is not copied until the file is written.
            transposed: Store `value.T` of a matrix instead.
        """
        name = f"{name}{TRANSPOSED}" if transposed else name
        if name not in self.initializers:
            tensor: ir.TensorProtocol = ir.tensor_adapters.TorchTensor(value, name=name)
            if transposed:
                tensor = _lazy_transpose(value, name)
            self._add(name, tensor)
        return self.initializers[name]

    def stored(self, tensor: ir.TensorProtocol) -> ir.Value:
        """Return a tensor that has a name as an initialiser; equal names mean equal tensors."""
        assert tensor.name, "it has a name"
        if tensor.name not in self.initializers:
            self._add(tensor.name, tensor)
        return self.initializers[tensor.name]

    def constant(self, tensor: ir.TensorProtocol, kind: str = "const") -> ir.Value:
        """Return a foreign constant, named after its content and `kind`, what it is."""
        digest = hashlib.sha256(tensor.tobytes()).hexdigest()[:12]
        sizes = "x".join(str(n) for n in tensor.shape)
        name = f"{kind}/{tensor.dtype.short_name()}/{sizes}/{digest}"
        if name not in self.initializers:
            self._add(name, ir.tensor(tensor.numpy(), dtype=tensor.dtype, name=name))
        return self.initializers[name]

    def table(self, values: Tensor, kind: str = "const") -> ir.Value:
        """Return a table of numbers, one initialiser for equal contents of a kind."""
        return self.constant(ir.tensor_adapters.TorchTensor(values.contiguous()), kind)

    def copy(
        self, node: ir.Node, inputs: Sequence[ir.Value | None], role: str
    ) -> tuple[ir.Value, ...]:
        """Add a node like `node` of another graph, on other inputs."""
        assert not any(attr.type == ir.AttributeType.GRAPH for attr in node.attributes.values())
        name = self.unique(f"{self._scope}/{role}")
        outputs = [
            ir.Value(name=f"{name}_output_{i}", type=x.type) for i, x in enumerate(node.outputs)
        ]
        attributes = list(node.attributes.values())
        self._append(ir.Node("", node.op_type, inputs, attributes, outputs=outputs, name=name))
        return tuple(outputs)

    def opset_imports(self, opset: int) -> dict[str, int]:
        """Return the version of every domain that the nodes use."""
        others = {node.domain for node in _with_inner(self.nodes)} - {""}
        return {"": opset} | {domain: DOMAINS[domain] for domain in sorted(others)}

    def prune(self, outputs: Sequence[ir.Value]) -> None:
        """Drop nodes and initialisers that no output needs."""
        needed, kept = set(outputs), []
        for node in reversed(self.nodes):
            if needed & set(node.outputs):
                needed.update(x for n in _with_inner([node]) for x in n.inputs if x is not None)
                kept.append(node)
        self.nodes = kept[::-1]
        self.initializers = {n: v for n, v in self.initializers.items() if v in needed}

    def unique(self, name: str) -> str:
        """Return `name`, numbered if it was given out before."""
        self._names[name] += 1
        count = self._names[name]
        return name if count == 1 else f"{name}_{count}"

    def _append(self, node: ir.Node) -> None:
        node.metadata_props.update(self._notes)
        self.nodes.append(node)

    def _add(self, name: str, tensor: ir.TensorProtocol) -> None:
        self.initializers[name] = ir.Value(
            name=name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(list(tensor.shape.numpy())),
            const_value=tensor,
        )


def _with_inner(nodes: Iterable[ir.Node]) -> Iterator[ir.Node]:
    """Yield nodes, and those of the graphs that they hold."""
    for node in nodes:
        yield node
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                yield from _with_inner(attribute.as_graph())


def _tensor_type(dtype: ir.DataType | None) -> ir.TensorType | None:
    return None if dtype is None else ir.TensorType(dtype)


def _lazy_transpose(value: Tensor, name: str) -> ir.LazyTensor:
    """Return `value.T`, copied only while its bytes are written."""

    def make() -> ir.TensorProtocol:
        return ir.tensor_adapters.TorchTensor(value.T.contiguous(), name=name)

    shape = ir.Shape([value.shape[1], value.shape[0]])
    return ir.LazyTensor(make, onnx_dtype(value.dtype), shape, name=name)
