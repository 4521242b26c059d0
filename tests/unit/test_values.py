"""What became of the values of a weight."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvxform.diffing import values
from kvxform.diffing.values import compare_values, theta_of

SHAPES = st.tuples(st.integers(2, 9), st.integers(2, 9))
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])


def numbers(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@given(SHAPES, DTYPES, st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_equal_weights_have_not_changed(shape, dtype, seed):
    x = numbers(shape, dtype, seed)
    assert compare_values(x, x.clone()) is None


@given(SHAPES, DTYPES, st.integers(0, 99), st.sampled_from([0, 1]), st.data())
@settings(max_examples=40, deadline=None)
def test_a_permutation_is_named_by_its_axis(shape, dtype, seed, axis, data):
    x = numbers(shape, dtype, seed)
    order = data.draw(st.permutations(range(shape[axis])))
    y = x.index_select(axis, torch.tensor(order))
    change = compare_values(x, y)
    if torch.equal(x, y):
        assert change is None
    else:
        assert change.cause == ("rows permuted", "columns permuted")[axis]
        expected = (y.double() - x.double()).norm() / x.double().norm()
        assert change.relative == pytest.approx(float(expected))


@pytest.mark.parametrize(
    ("order", "words"),
    [
        ((1, 0, 2, 3), "0 and 1 exchanged"),
        ((2, 3, 0, 1), "0-1 and 2-3 exchanged"),
        ((1, 2, 0, 3), "0-2 of 4"),
        ((1, 2, 3, 0), "all of 4"),
    ],
)
def test_rows_that_moved_are_named(order, words):
    x = numbers((4, 5))
    assert compare_values(x, x[list(order)]).detail == words


def test_large_weights_are_compared_in_pieces(monkeypatch):
    x = numbers((50, 7))
    changes = [x[torch.randperm(50, generator=torch.Generator().manual_seed(1))], 3.0 * x, x + 1.0]
    whole = [compare_values(x, y) for y in changes]
    monkeypatch.setattr(values, "PIECE", 20)
    parts = [compare_values(x, y) for y in changes]
    assert [c.cause for c in parts] == ["rows permuted", "scaled", "values"]
    for a, b in zip(whole, parts, strict=True):
        assert (a.cause, a.detail) == (b.cause, b.detail)
        assert a.relative == pytest.approx(b.relative)


def test_factors_and_signs():
    x = numbers((4, 5))
    assert compare_values(x, -x).cause == "negated"
    scaled = compare_values(x, 1.02 * x)
    assert (scaled.cause, scaled.detail) == ("scaled", "by 1.02")
    assert scaled.relative == pytest.approx(0.02, rel=1e-4)
    assert compare_values(x, torch.zeros_like(x)).cause == "values"
    assert compare_values(torch.zeros_like(x), x).relative == math.inf


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        (lambda x: x * torch.arange(2.0, 6.0)[:, None], "each row by its own factor"),
        (lambda x: x * torch.arange(2.0, 7.0), "each column by its own factor"),
        (lambda x: x @ torch.linalg.qr(numbers((5, 5), seed=1)).Q, "rows turned"),
        (lambda x: torch.linalg.qr(numbers((4, 4), seed=1)).Q @ x, "columns turned"),
        (lambda x: torch.cat([x[:1], x[1:2] + 1.0, x[2:]]), "row 1 of 4"),
        (lambda x: torch.cat([x[:1], x[1:3] + 1.0, x[3:]]), "rows 1-2 of 4"),
        (lambda x: x + 1.0, ""),
    ],
)
def test_other_values_are_described(change, detail):
    found = compare_values(numbers((4, 5)), change(numbers((4, 5))))
    assert found.cause == "values"
    assert found.detail.startswith(detail) if detail else not found.detail


def test_dtypes_and_shapes():
    x = numbers((4, 5))
    narrow = compare_values(x, x.half())
    assert (narrow.cause, narrow.detail) == ("dtype", "float32 -> float16")
    assert 0.0 < narrow.relative < 1e-3
    assert compare_values(x, x.double()).relative == 0.0
    assert compare_values(x, (2 * x).half()).cause == "values"
    rounded = compare_values(x, x.bfloat16().float())
    assert (rounded.cause, rounded.detail) == ("dtype", "values rounded to bfloat16")
    shape = compare_values(x, x[:3])
    assert (shape.cause, shape.relative, shape.detail) == ("shape", math.inf, "[4, 5] -> [3, 5]")


def test_a_value_that_is_no_number_is_another_value():
    x = numbers((4, 5))
    y = x.clone()
    y[1, 1] = math.nan
    assert compare_values(y, y.clone()) is None
    assert compare_values(x, y).relative == math.inf


def test_vectors_and_stacks():
    x = numbers((6,))
    assert compare_values(x, x.flip(0)).cause == "rows permuted"
    heads = numbers((2, 3, 4))
    assert compare_values(heads, heads.flip(0)).detail == "0-2 and 3-5 exchanged"


def test_the_base_of_rotary_frequencies():
    assert theta_of(500000.0 ** (-torch.arange(0, 64, 2) / 64)) == pytest.approx(5e5, rel=1e-4)
    assert theta_of(torch.tensor([1.0, 0.5, 0.3])) is None  # no power law
    assert theta_of(0.5 * 10000.0 ** (-torch.arange(0, 64, 2) / 64)) is None  # scaled
    assert theta_of(torch.ones(1)) is None
