"""Operations that move, cut and join values, against torch, at two sizes of batch."""

from __future__ import annotations

import pytest
import torch
from onnx_tools import Call, type_of_value
from programs import BATCH, TOKENS
from torch import fx

from kvxform.codegen.onnx.emission import find_emitter

aten = torch.ops.aten
SIZES = [(2, 5), (1, 1)]
END = 2**63 - 1


def floats(b, s):
    return torch.randn(b, s, 8)


CALLS = {
    "view": (aten.view.default, lambda b, s: (floats(b, s), [b, s, 2, 4]), {}),
    "view to a matrix": (aten.view.default, lambda b, s: (floats(b, s), [-1, 8]), {}),
    "view that swaps sizes": (aten.view.default, lambda b, s: (floats(b, s), [s, b, 8]), {}),
    "reshape": (
        aten.reshape.default,
        lambda b, s: (torch.randn(b, s, 2, 4), [b, s, 8]),
        {},
    ),
    "expand": (aten.expand.default, lambda b, s: (torch.randn(b, 1, 8), [-1, s, 8]), {}),
    "zeros alike": (
        aten.zeros_like.default,
        lambda b, s: (floats(b, s),),
        {"dtype": torch.bool, "pin_memory": False},
    ),
    "ones alike": (aten.ones_like.default, lambda b, s: (torch.ones(b, s, dtype=int),), {}),
    "transpose": (aten.transpose.int, lambda b, s: (floats(b, s), 1, -1), {}),
    "t": (aten.t.default, lambda b, s: (torch.randn(b, 8),), {}),
    "permute": (aten.permute.default, lambda b, s: (floats(b, s), [0, -1, 1]), {}),
    "unsqueeze": (aten.unsqueeze.default, lambda b, s: (floats(b, s), -2), {}),
    "squeeze": (aten.squeeze.dim, lambda b, s: (torch.randn(b, 1, 8), 1), {}),
    "squeeze of a longer axis": (aten.squeeze.dim, lambda b, s: (floats(b, s), 2), {}),
    "slice": (aten.slice.Tensor, lambda b, s: (floats(b, s), 2, 1, 7, 2), {}),
    "slice from the end": (aten.slice.Tensor, lambda b, s: (floats(b, s), -1, -3, END), {}),
    "select": (aten.select.int, lambda b, s: (floats(b, s), 1, -1), {}),
    "split": (aten.split.Tensor, lambda b, s: (floats(b, s), 3, 2), {}),
    "split by sizes": (
        aten.split_with_sizes.default,
        lambda b, s: (floats(b, s), [2, 6], -1),
        {},
    ),
    "split of a run-time axis": (
        aten.split_with_sizes.default,
        lambda b, s: (torch.randn(2, b + s), [b, s], -1),
        {},
    ),
    "chunk": (aten.chunk.default, lambda b, s: (floats(b, s), 2, -1), {}),
    "cat of two dtypes": (
        aten.cat.default,
        lambda b, s: ([floats(b, s), floats(b, s).half()], -1),
        {},
    ),
    "conversion": (aten.to.dtype, lambda b, s: (floats(b, s), torch.float16), {}),
    "copy": (aten.clone.default, lambda b, s: (floats(b, s),), {}),
    "arange": (aten.arange.default, lambda b, s: (s,), {}),
    "size": (aten.sym_size.int, lambda b, s: (torch.randn(2, b * s), 1), {}),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_operation_equals_torch(name):
    target, make_args, kwargs = CALLS[name]
    call = Call(target, make_args, **kwargs)
    for batch, tokens in SIZES:
        torch.manual_seed(1)
        call.check(batch, tokens)


def test_a_view_with_known_axes_needs_no_sizes():
    call = Call(aten.view.default, lambda b, s: (floats(b, s), [b, s, 2, 4]))
    assert call.op_types == ["Reshape", "Identity"]


def test_an_axis_without_known_parts_is_left_to_torch():
    x = torch.randn(2, BATCH * TOKENS)
    for dim, has_emitter in ((0, True), (1, False)):
        graph = fx.Graph()
        source = graph.placeholder("x")
        source.meta = {"type": type_of_value(x)}
        node = graph.call_function(aten.split.Tensor, (source, 1 if dim == 0 else TOKENS, dim))
        kinds = (x[:1], x[:1]) if dim == 0 else (x[:, :TOKENS],) * BATCH
        node.meta = {"type": type_of_value(kinds)}
        assert (find_emitter(node) is not None) is has_emitter
