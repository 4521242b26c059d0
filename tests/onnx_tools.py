"""Emit one call, or one program, as ONNX and run it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from programs import BATCH, TOKENS
from programs import SYMBOLS as PROGRAM_SYMBOLS
from torch import Tensor, fx

from kvxform.codegen.onnx import export_onnx
from kvxform.codegen.onnx.builder import Builder, onnx_dtype
from kvxform.codegen.onnx.emission import Emission, Inputs, Size
from kvxform.codegen.onnx.export import emit_call
from kvxform.codegen.onnx.fallback import Fallback
from kvxform.codegen.onnx.forms import Form, OnnxOptions
from kvxform.codegen.onnx.ports import CachePorts
from kvxform.codegen.onnx.weights import WeightStore
from kvxform.ir.plan import CachePlan
from kvxform.ir.program import ModelInfo, Program
from kvxform.ir.types import SymType, TensorType, TupleType
from kvxform.runtime.onnx_session import OnnxSession

SYMBOLS = PROGRAM_SYMBOLS | {BATCH + TOKENS: "B + S"}

FORM = Form("L1", 23, "cpu", "1.30", "grow", "all", "source")
MakeArgs = Callable[[int, int], tuple[Any, ...]]


def type_of_value(value: Any) -> Any:
    """Return the type of an example at the sizes BATCH and TOKENS, which become B and S."""
    if isinstance(value, Tensor):
        return TensorType(value.dtype, tuple(SYMBOLS.get(n, n) for n in value.shape))
    if isinstance(value, int):
        return SymType(SYMBOLS[value])
    return TupleType(tuple(type_of_value(item) for item in value))


class Call:
    """One call with tensors and sizes as inputs; `make_args(batch, tokens)` gives its arguments.

    Among the arguments, tensors are inputs of the graph; so are ints equal to BATCH or TOKENS.
    """

    def __init__(self, target: Callable[..., Any], make_args: MakeArgs, **kwargs: Any) -> None:
        self.target, self.make_args, self.kwargs = target, make_args, kwargs
        graph, sources = fx.Graph(), []

        def enter(x: Any) -> Any:
            if isinstance(x, list | tuple):
                return type(x)(enter(item) for item in x)
            if _is_input(x):
                node = graph.placeholder(f"x{len(sources)}")
                node.meta = {"type": type_of_value(x), "module": "", "origin": "", "via": ()}
                sources.append(node)
                return node
            return x

        example = make_args(BATCH, TOKENS)
        self._is_input = [_is_input(x) for x in _flat(example)]
        node = graph.call_function(target, enter(example), kwargs)
        result = type_of_value(target(*example, **kwargs))
        node.meta = {"type": result, "module": "m", "origin": "call (test.py:1)", "via": ()}
        self.model = emit(node, sources)

    def check(self, batch: int, tokens: int, tolerance: float = 1e-6) -> None:
        """Assert that ONNX Runtime gives what torch gives, in values, dtypes and shapes."""
        args = self.make_args(batch, tokens)
        flat = [x for x, entered in zip(_flat(args), self._is_input, strict=True) if entered]
        arrays = [x.numpy() if isinstance(x, Tensor) else np.array([x]) for x in flat]
        found = run_model(self.model, arrays)
        expected = self.target(*args, **self.kwargs)
        items = expected if isinstance(expected, list | tuple) else [expected]
        for have, want in zip(found, items, strict=True):
            want = want if isinstance(want, Tensor) else torch.tensor([want])
            torch.testing.assert_close(have, want, rtol=tolerance, atol=tolerance)

    @property
    def op_types(self) -> list[str]:
        return [node.op_type for node in self.model.graph]


def emit(node: fx.Node, sources: list[fx.Node]) -> ir.Model:
    """Return the ONNX model of one node."""
    e = make_emission()
    values: dict[fx.Node, Any] = {}
    inputs = []
    for source in sources:
        type_ = source.meta["type"]
        is_size = isinstance(type_, SymType)
        dtype = ir.DataType.INT64 if is_size else onnx_dtype(type_.dtype)
        shape = [1] if is_size else [_dim(source, i, n) for i, n in enumerate(type_.shape)]
        value = ir.Value(name=source.name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        inputs.append(value)
        values[source] = Size(value) if is_size else value
    with e.builder.scope("m"):
        result = emit_call(e, node, values, Fallback(FORM.opset))
    items = result if isinstance(result, tuple) else (result,)
    outputs = [e.builder.op("Identity", x.value if isinstance(x, Size) else x) for x in items]
    return make_model(e.builder, inputs, outputs)


def _dim(source: fx.Node, axis: int, size: int | str) -> int | str:
    return size if isinstance(size, int) else f"{source.name}_{axis}"


def _is_input(x: Any) -> bool:
    return isinstance(x, Tensor) or (type(x) is int and x in (BATCH, TOKENS))


def _flat(x: Any) -> list[Any]:
    return [y for item in x for y in _flat(item)] if isinstance(x, list | tuple) else [x]


def make_emission() -> Emission:
    """Return an emission without a program."""
    program = Program(fx.Graph(), {}, (), ModelInfo("toy", "toy", 48))
    ids = ir.Value(name="ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["b", "s"]))
    store, ports = WeightStore.of(program), CachePorts(CachePlan(()))
    return Emission(program, Builder(), Inputs(ids, ids, ids), store, ports, form=FORM)


def make_model(builder: Builder, inputs: list[ir.Value], outputs: list[ir.Value]) -> ir.Model:
    builder.prune(outputs)
    graph = ir.Graph(
        inputs,
        outputs,
        nodes=builder.nodes,
        initializers=list(builder.initializers.values()),
        opset_imports={"": FORM.opset},
        name="one",
    )
    return ir.Model(graph, ir_version=FORM.ir_version)


def run_model(model: ir.Model, arrays: list[np.ndarray]) -> list[Tensor]:
    """Run a model on positional inputs."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    content = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()]
    feeds = dict(zip(names, arrays, strict=True))
    return [torch.from_numpy(np.asarray(x)) for x in session.run(None, feeds)]


def open_export(program: Program, folder: Path, options: OnnxOptions | None = None) -> OnnxSession:
    """Export a program and open the package, on one thread."""
    return OnnxSession(export_onnx(program, folder, options), threads=1)
