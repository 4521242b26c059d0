"""Operations without an emitter of their own, through the exporter of torch."""

from __future__ import annotations

import pytest
import torch
from onnx_tools import Call
from torch import fx

from kvxform.codegen.onnx.emission import CONDITIONS, EMITTERS
from kvxform.codegen.onnx.fallback import Fallback
from kvxform.errors import CodegenError
from kvxform.ir.types import TensorType

aten = torch.ops.aten

CALLS = {
    "one result": (aten.softplus.default, lambda b, s: (torch.randn(b, s, 4),)),
    "a constant argument": (aten.triu.default, lambda b, s: (torch.randn(b, s), 1)),
    "sizes as arguments": (aten.full.default, lambda b, s: ([b, s], 1.5)),
    "several results": (aten.sort.default, lambda b, s: (torch.randn(b, s, 4),)),
    "indices": (
        aten.index.Tensor,
        lambda b, s: (torch.randn(b, s), [torch.zeros(b, 1, dtype=int), torch.zeros(s, dtype=int)]),
    ),
}
QUICK = ("several results", "sizes as arguments")


@pytest.mark.parametrize(
    "name",
    [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in CALLS if name not in QUICK)],
)
def test_it_equals_torch_at_other_sizes_than_those_of_the_export(name):
    target, make_args = CALLS[name]
    assert target not in EMITTERS or target in CONDITIONS
    call = Call(target, make_args)
    for batch, tokens in ((2, 5), (3, 1)):
        torch.manual_seed(1)
        call.check(batch, tokens)


def node_of(target, *types):
    graph = fx.Graph()
    sources = [graph.placeholder(f"x{i}") for i in range(len(types))]
    for source, type_ in zip(sources, types, strict=True):
        source.meta = {"type": type_}
    node = graph.call_function(target, tuple(sources))
    node.meta = {"type": types[0], "module": "layers.1.mlp", "origin": "svd (model.py:7)"}
    return node


def test_an_operation_that_onnx_lacks_is_refused_with_module_and_line():
    node = node_of(aten.linalg_eig.default, TensorType(torch.float32, ("B", 4, 4)))
    with pytest.raises(CodegenError) as caught:
        Fallback(23).prepare(node)
    text = str(caught.value)
    assert text.startswith("KVX401 [onnx]")
    assert "aten.linalg_eig.default" in text
    assert "layers.1.mlp, svd (model.py:7)" in text


def test_equal_calls_are_exported_once():
    fallback = Fallback(23)
    matrix = TensorType(torch.float32, ("B", 4))
    first, second = (fallback.prepare(node_of(aten.softplus.default, matrix)) for _ in range(2))
    other = fallback.prepare(node_of(aten.softplus.default, TensorType(torch.float32, ("B", 8))))
    assert first is second
    assert other is not first
