"""Operations without an emitter of our own: exported singly by `torch.onnx`, then spliced in.

The exporter of torch knows several hundred aten operations and decomposes many more, so coverage
does not end with our tables. Each distinct call (operation, types, constants) is exported once.
Every run-time size stays dynamic; an operation that would fix one is refused, not emitted wrongly.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import onnx_ir as ir
import sympy
import torch
from onnx_ir.passes.common import InlinePass
from torch import Tensor, fx

from kvxform.codegen.onnx.emission import Emission, Emitted, Size, is_size
from kvxform.errors import CodegenError
from kvxform.ir.types import SymType, TensorType, ValueType

SAMPLE_SIZES = {"B": 7, "S": 11}  # sizes while exporting; no two symbols may have the same


class Fallback:
    """Exports single calls through torch and remembers them.

    Args:
        opset: Version of the default domain.
    """

    def __init__(self, opset: int) -> None:
        self._opset = opset
        self._models: dict[str, ir.Model] = {}

    def prepare(self, node: fx.Node) -> ir.Model:
        """Return a call as a model whose inputs are `node.all_input_nodes`.

        Raises:
            CodegenError: KVX401 naming the operation, its module and its source line.
        """
        key = _signature(node)
        if key not in self._models:
            try:
                with _quiet():
                    self._models[key] = _export(node, self._opset)
            except Exception as error:  # torch raises many kinds, none of them documented
                raise CodegenError(
                    "KVX401",
                    "every operation must be one that ONNX can express",
                    where="onnx",
                    got=str(node.target),
                    at=f"{node.meta['module'] or 'the model'}, {node.meta['origin'] or node.name}",
                    hint="use lowering: eager",
                ) from error
        return self._models[key]

    def emit(self, e: Emission, node: fx.Node, operands: Sequence[Emitted]) -> Emitted:
        """Splice the model of a call into the graph; operands are those of `all_input_nodes`."""
        model = self.prepare(node)
        name = str(node.target).removeprefix("aten.")
        values: dict[ir.Value, ir.Value] = {}
        for formal, actual in zip(model.graph.inputs, operands, strict=True):
            found = e.builder.op("Squeeze", actual.value) if isinstance(actual, Size) else actual
            assert isinstance(found, ir.Value), "operands are tensors or sizes"
            values[formal] = found
        outputs = _splice(e, model, values, name)
        if is_size(node):
            return Size(e.builder.op("Reshape", outputs[0], e.builder.const([1])))
        return outputs[0] if isinstance(node.meta["type"], TensorType) else outputs


def _splice(
    e: Emission, model: ir.Model, values: dict[ir.Value, ir.Value], name: str
) -> tuple[ir.Value, ...]:
    """Copy the nodes of `model` behind the values of its inputs; return its outputs."""
    for value in model.graph.initializers.values():
        assert value.const_value is not None, "initialisers have a value"
        values[value] = e.builder.constant(value.const_value)
    for node in model.graph:
        inputs = [None if x is None else values[x] for x in node.inputs]
        copies = e.builder.copy(node, inputs, f"{name}/{node.op_type}")
        values.update(zip(node.outputs, copies, strict=True))
    return tuple(values[x] for x in model.graph.outputs)


def _export(node: fx.Node, opset: int) -> ir.Model:
    types = [source.meta["type"] for source in node.all_input_nodes]
    samples = tuple(_sample(type_) for type_ in types)
    dynamic = tuple(_dynamic(type_) for type_ in types)
    exported = torch.export.export(_one_call(node), samples, dynamic_shapes=dynamic)
    program = torch.onnx.export(exported, dynamo=True, opset_version=opset, verbose=False)
    assert program is not None, "an exported program comes back"
    model = program.model
    InlinePass()(model)
    return model


def _one_call(node: fx.Node) -> fx.GraphModule:
    """Return a module that makes the call of `node` on its inputs."""
    graph = fx.Graph()
    formal = {source: graph.placeholder(source.name) for source in node.all_input_nodes}
    graph.output(graph.node_copy(node, formal.__getitem__))
    return fx.GraphModule({}, graph)


def _sample(type_: ValueType) -> Tensor | int:
    if isinstance(type_, SymType):
        return _size(type_.expression)
    assert isinstance(type_, TensorType), "an operand is a tensor or a size"
    return torch.zeros([_size(n) for n in type_.shape], dtype=type_.dtype)


def _dynamic(type_: ValueType) -> object:
    """Return what torch.export shall keep dynamic; it raises if that is not possible."""
    dynamic = torch.export.Dim.DYNAMIC
    if isinstance(type_, SymType):
        return dynamic
    assert isinstance(type_, TensorType), "an operand is a tensor or a size"
    return {i: dynamic for i, n in enumerate(type_.shape) if isinstance(n, str)}


def _size(size: int | str) -> int:
    """Return the sample size of a symbolic expression such as `B*S`."""
    if isinstance(size, int):
        return size

    return int(
        sympy.sympify(size, locals={n: sympy.Symbol(n) for n in SAMPLE_SIZES}).subs(SAMPLE_SIZES)
    )


def _signature(node: fx.Node) -> str:
    """Return a text that is equal for calls that export to the same model."""
    order = {source: i for i, source in enumerate(node.all_input_nodes)}
    args = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: f"%{order[n]}")
    types = [str(source.meta["type"]) for source in order]
    return f"{node.target}{args}{types}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter of torch from writing warnings about packages that are not installed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
