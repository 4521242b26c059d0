"""Products of a few rows with a weight in the interpreter, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from kvxform.codegen.triton.emit import emit
from kvxform.codegen.triton.loading import load
from kvxform.codegen.triton.product import ProductSpec
from kvxform.codegen.triton.products import product, use_products
from kvxform.errors import CodegenError

pytestmark = pytest.mark.triton


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).half()


def exact(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    out = x.double() @ weight.double().T
    return out if bias is None else out + bias.double()


def assert_rounded(got: Tensor, expected: Tensor) -> None:
    """Sums are kept in float32, so the result has the rounding of float16 alone."""
    assert got.dtype == torch.float16
    bound = 2.0**-11 * expected.abs() + 1e-4 * expected.square().mean().sqrt()
    assert ((got.double() - expected).abs() <= bound).all()


@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(1, 16),
    features=st.integers(1, 5),
    runs=st.integers(1, 5),
    has_bias=st.booleans(),
)
def test_any_number_of_rows_and_sizes(rows: int, features: int, runs: int, has_bias: bool) -> None:
    x, weight = random(rows, 128 * runs), random(16 * features, 128 * runs, seed=1)
    bias = random(16 * features, seed=2) if has_bias else None
    assert_rounded(product(x, weight, bias), exact(x, weight, bias))


def test_every_launch_parameter() -> None:
    x, weight = random(5, 512), random(32, 512, seed=1)
    module = load(emit(ProductSpec(512, 32, "float16"), interpret=True))
    assert len(module.CONFIGS) == 3
    for config in module.CONFIGS:
        out = torch.full((5, 32), float("nan"), dtype=torch.float16)
        module.product(x, weight, out, config=config)
        assert_rounded(out, exact(x, weight))


def test_rows_that_lie_apart_and_a_sequence_axis() -> None:
    wide, weight = random(3, 1, 512), random(16, 256, seed=1)
    x = wide[..., 128:384]
    got = product(x, weight)
    assert got.shape == (3, 1, 16)
    assert_rounded(got, exact(x, weight))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (ProductSpec(512, 32, "float32"), "the dtype must be float16 or bfloat16"),
        (ProductSpec(192, 32, "float16"), "whole runs of 128"),
        (ProductSpec(512, 24, "float16"), "features of 16"),
    ],
)
def test_refusals(spec: ProductSpec, words: str) -> None:
    with pytest.raises(CodegenError, match=words) as raised:
        emit(spec)
    assert raised.value.code == "KVX401"


class Linears(nn.Module):
    """Two products that fit kernels; weights of the others are odd, turned or float32."""

    def __init__(self) -> None:
        super().__init__()
        self.first = random(48, 256)
        self.bias = random(48, seed=1)
        self.odd = random(128, 48, seed=2)
        self.turned = random(128, 128, seed=3).T
        self.last = random(16, 128, seed=4)
        self.wide = random(16, 16, seed=5).float()

    def forward(self, x: Tensor) -> Tensor:
        linear = torch.ops.aten.linear.default
        x = linear(linear(x, self.first, self.bias), self.odd)
        x = linear(linear(x, self.turned), self.last)
        return linear(x.float(), self.wide)


def test_products_that_fit_are_taken_over() -> None:
    module = fx.symbolic_trace(Linears())
    x = random(4, 1, 256) / 256
    expected = module(x)
    assert use_products(module, 4) == 2
    calls = [node for node in module.graph.nodes if "product" in str(node.target)]
    assert [str(node.args[1]) for node in calls] == ["first", "last"]
    assert torch.allclose(module(x), expected, rtol=1e-2, atol=1e-3)


def test_many_rows_are_left_to_the_library() -> None:
    module = fx.symbolic_trace(Linears())
    assert use_products(module, 17) == 0
