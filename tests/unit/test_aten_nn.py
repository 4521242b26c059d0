"""Linear layers, embeddings and norms against torch, and how their weights are stored."""

from __future__ import annotations

import pytest
import torch
from onnx_tools import Call

aten = torch.ops.aten


def floats(*shape):
    return torch.randn(*shape)


CALLS = {
    "matmul": (aten.matmul.default, lambda b, s: (floats(b, 2, s, 4), floats(b, 2, 4, 3))),
    "addmm": (aten.addmm.default, lambda b, s: (floats(3), floats(b * s, 4), floats(4, 3))),
    "linear": (aten.linear.default, lambda b, s: (floats(b, s, 4), floats(3, 4), floats(3))),
    "linear of a matrix": (aten.linear.default, lambda b, s: (floats(b, 4), floats(3, 4))),
    "embedding": (
        aten.embedding.default,
        lambda b, s: (floats(6, 4), torch.randint(0, 6, (b, s))),
    ),
    "layer norm": (
        aten.layer_norm.default,
        lambda b, s: (floats(b, s, 4), [4], floats(4), floats(4), 1e-5),
    ),
    "layer norm without gain": (aten.layer_norm.default, lambda b, s: (floats(b, s, 4), [4])),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_operation_equals_torch(name):
    target, make_args = CALLS[name]
    call = Call(target, make_args)
    for batch, tokens in ((2, 5), (1, 1)):
        torch.manual_seed(1)
        call.check(batch, tokens, tolerance=1e-5)
