"""Element-wise, comparing and reducing operations against torch, at two sizes of batch."""

from __future__ import annotations

import operator

import pytest
import torch
from onnx_tools import Call

aten = torch.ops.aten

SIZES = [(2, 5), (1, 1)]


def floats(b, s):
    return torch.randn(b, s, 6)


CALLS = {
    "add": (aten.add.Tensor, lambda b, s: (floats(b, s), floats(b, s)), {}),
    "add scaled": (aten.add.Tensor, lambda b, s: (floats(b, s), floats(b, s)), {"alpha": 2}),
    "add number": (aten.add.Tensor, lambda b, s: (floats(b, s), 0.5), {}),
    "int plus float": (aten.add.Tensor, lambda b, s: (torch.ones(b, s, dtype=int), 0.5), {}),
    "sub": (aten.sub.Tensor, lambda b, s: (floats(b, s), torch.randn(6)), {}),
    "rsub": (aten.rsub.Scalar, lambda b, s: (floats(b, s), 1.0), {}),
    "mul of two dtypes": (
        aten.mul.Tensor,
        lambda b, s: (floats(b, s), torch.ones(b, s, 1, dtype=torch.int64)),
        {},
    ),
    "div of ints": (aten.div.Tensor, lambda b, s: (torch.ones(b, s, dtype=int), 4), {}),
    "square": (aten.pow.Tensor_Scalar, lambda b, s: (floats(b, s), 2), {}),
    "cube": (aten.pow.Tensor_Scalar, lambda b, s: (floats(b, s), 3.0), {}),
    "maximum": (aten.maximum.default, lambda b, s: (floats(b, s), floats(b, s)), {}),
    "larger": (aten.max.other, lambda b, s: (floats(b, s), torch.zeros(())), {}),
    "product with itself": (aten.square.default, lambda b, s: (floats(b, s),), {}),
    "expm1": (aten.expm1.default, lambda b, s: (floats(b, s),), {}),
    "clamp": (aten.clamp.default, lambda b, s: (floats(b, s), -0.5, 1), {}),
    "clamp of one side": (aten.clamp.default, lambda b, s: (floats(b, s), None, 0.5), {}),
    "and of bits": (aten.bitwise_and.Tensor, lambda b, s: (floats(b, s) > 0, floats(b, s) > 0), {}),
    "not of bits": (aten.bitwise_not.default, lambda b, s: (floats(b, s) > 0,), {}),
    "rsqrt": (aten.rsqrt.default, lambda b, s: (floats(b, s).abs() + 1,), {}),
    "silu": (aten.silu.default, lambda b, s: (floats(b, s),), {}),
    "gelu": (aten.gelu.default, lambda b, s: (floats(b, s),), {}),
    "gelu by tanh": (aten.gelu.default, lambda b, s: (floats(b, s),), {"approximate": "tanh"}),
    "tanh": (aten.tanh.default, lambda b, s: (floats(b, s),), {}),
    "round half even": (aten.round.default, lambda b, s: (torch.tensor([0.5, 1.5, -2.5]),), {}),
    "compare": (aten.le.Tensor, lambda b, s: (floats(b, s), floats(b, s)), {}),
    "compare number": (aten.ne.Scalar, lambda b, s: (torch.ones(b, s, dtype=int), 1), {}),
    "int below float": (aten.lt.Scalar, lambda b, s: (torch.ones(b, s, dtype=int), 1.5), {}),
    "and": (aten.logical_and.default, lambda b, s: (floats(b, s) > 0, floats(b, s) > 0), {}),
    "where": (
        aten.where.self,
        lambda b, s: (floats(b, s) > 0, floats(b, s), torch.zeros(())),
        {},
    ),
    "masked fill": (
        aten.masked_fill.Scalar,
        lambda b, s: (floats(b, s), floats(b, s) > 0, float("-inf")),
        {},
    ),
    "mean": (aten.mean.dim, lambda b, s: (floats(b, s), [-1], True), {}),
    "mean of all": (aten.mean.default, lambda b, s: (floats(b, s),), {}),
    "sum of bools": (aten.sum.dim_IntList, lambda b, s: (floats(b, s) > 0, [1]), {}),
    "amax": (aten.amax.default, lambda b, s: (floats(b, s), [0, 2]), {}),
    "cumsum": (aten.cumsum.default, lambda b, s: (floats(b, s) > 0, 1), {}),
    "softmax": (aten.softmax.int, lambda b, s: (floats(b, s), -1), {}),
    "softmax in float32": (
        aten._softmax.default,
        lambda b, s: (floats(b, s), 1, False),
        {},
    ),
    "size product": (operator.mul, lambda b, s: (b, s), {}),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_operation_equals_torch(name):
    target, make_args, kwargs = CALLS[name]
    call = Call(target, make_args, **kwargs)
    for batch, tokens in SIZES:
        torch.manual_seed(1)
        call.check(batch, tokens)


def test_a_square_is_a_product():
    call = Call(aten.pow.Tensor_Scalar, lambda b, s: (floats(b, s), 2))
    assert call.op_types == ["Mul", "Identity"]
