"""Hadamard matrices of sizes that are not powers of two, and rotations made of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvxform.rotations.orders import (
    DenseRotation,
    hadamard_factors,
    hadamard_of_order,
    random_orthogonal,
)

PALEY_ONE = (12, 20, 24, 44, 48, 60, 68, 72, 80, 84, 104)  # q + 1, q = 3 mod 4
PALEY_TWO = (28, 36, 76)  # 2 (q + 1), q = 1 mod 4: 13, 17, 37
WIDTHS = (
    576,
    768,
    896,
    960,
    1152,
    1536,
    2048,
    2304,
    2560,
    2880,
    3072,
    3584,
    4096,
    5120,
    5376,
    6656,
)


@pytest.mark.parametrize("order", [2, 4, 64, *PALEY_ONE, *PALEY_TWO])
def test_a_matrix_has_signs_alone_and_orthogonal_rows(order):
    h = hadamard_of_order(order) * order**0.5
    torch.testing.assert_close(h.abs(), torch.ones_like(h), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        h @ h.T, order * torch.eye(order, dtype=torch.float64), rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("width", WIDTHS)
def test_widths_of_models_are_products_of_known_orders(width):
    factors = hadamard_factors(width)
    assert torch.tensor(factors).prod() == width
    assert max(factors) <= 128, "a product with them stays cheap"


@pytest.mark.parametrize("size", [3, 18, 52, 1023])
def test_sizes_without_a_known_matrix_are_told(size):
    assert hadamard_factors(size) is None


@settings(deadline=None, max_examples=15)
@given(size=st.sampled_from([2, 8, 12, 36, 96, 144, 576]), seed=st.integers(0, 99))
def test_a_rotation_of_rows_is_one_orthogonal_matrix_that_mixes_all(size, seed):
    rotation = DenseRotation(size, "hadamard", seed)
    q = rotation.apply(torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(q.abs(), torch.full_like(q, size**-0.5), rtol=0, atol=1e-12)
    x = torch.randn(2, 3, size, dtype=torch.float64)
    torch.testing.assert_close(rotation.apply(x), x @ q, rtol=0, atol=1e-12)
    torch.testing.assert_close(rotation.apply(x).norm(dim=-1), x.norm(dim=-1))
    other = DenseRotation(size, "hadamard", seed + 1).apply(torch.eye(size, dtype=torch.float64))
    assert size == 2 or not torch.equal(q, other)


def test_a_random_rotation_is_orthogonal_and_repeatable():
    q = random_orthogonal(18, 5)
    torch.testing.assert_close(q @ q.T, torch.eye(18, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.equal(DenseRotation(18, "orthogonal", 5).apply(torch.eye(18).double()), q)
    assert not torch.equal(q, random_orthogonal(18, 6))
