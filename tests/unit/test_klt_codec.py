"""Codec klt: strings of bits, tables, gains, and the rate-distortion it promises."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvxform.codecs.base import make_codec
from kvxform.codecs.klt import GAIN_BITS, KltCodec, unit_errors, unit_table
from kvxform.errors import PassError, RecipeError
from kvxform.rotations.transform import fit_transform, share_bytes


def zeros(heads: int, dim: int) -> tuple[tuple[float, ...], ...]:
    return ((0.0,) * dim,) * heads


def codes_of(codec: KltCodec, row: list[int]) -> list[int]:
    """Read a row of bytes by the words of the module: bit strings, lowest bits first."""
    bits = [(byte >> i) & 1 for byte in row for i in range(8)]
    flat = [b for head in codec.bits for b in head]
    found = [0] * (len(flat) + 1)
    if codec.gain:
        found[-1] = sum(bits.pop(0) << i for i in range(GAIN_BITS))
    for digit in range(max(flat)):
        for component, own in enumerate(flat):
            if own > digit:
                found[component] |= bits.pop(0) << digit
    assert not any(bits)
    assert len(bits) < 8
    return found


@settings(deadline=None, max_examples=8)
@given(
    bits=st.lists(st.lists(st.integers(0, 8), min_size=5, max_size=5), min_size=1, max_size=3),
    gain=st.booleans(),
    tokens=st.integers(1, 4),
)
def test_rows_hold_the_nearest_levels(bits, gain, tokens):
    if not any(b for head in bits for b in head):
        bits[0][0] = 1
    heads = len(bits)
    mean = torch.randn(heads, 5)
    means = tuple(map(tuple, mean.tolist()))
    codec = KltCodec(tuple(map(tuple, bits)), means, gain, "normal")
    x = torch.randn(2, heads, tokens, 5) + mean[:, None]
    (plane,) = codec.planes(5)
    packed = codec.encode(x)["codes"]
    assert packed.shape == (2, 1, tokens, plane.width)
    assert plane.width == math.ceil((sum(map(sum, bits)) + (4 if gain else 0)) / 8)
    decoded = codec.decode({"codes": packed}, torch.float32)
    for token in range(tokens):
        found = codes_of(codec, packed[1, 0, token].tolist())
        size_code = found.pop()
        size = 2 ** ((size_code - 8) / 2) if gain else 1.0
        for place, code in enumerate(found):
            head, d = divmod(place, 5)
            levels = unit_table("normal", bits[head][d]) if bits[head][d] else torch.zeros(1)
            centred = float(x[1, head, token, d] - mean[head, d])
            nearest = (levels * size - centred).abs().min()
            assert abs(float(levels[code]) * size - centred) <= nearest + 1e-5
            value = float(mean[head, d]) + float(levels[code]) * size
            assert float(decoded[1, head, token, d]) == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize(
    ("tails", "errors"),
    [
        ("normal", [1.0, 0.3634, 0.1175, 0.03455, 0.00950]),
        ("laplace", [1.0, 0.5, 0.1762, 0.0545, 0.0154]),
    ],
)
def test_errors_of_tables_are_those_of_lloyd_and_max(tails, errors):
    """The values of Jayant and Noll, Digital Coding of Waveforms, tables 4.4 and 4.6."""
    assert unit_errors(tails)[:5].tolist() == pytest.approx(errors, rel=0.004)


def test_a_gain_keeps_the_size_of_a_large_token():
    bits, x = ((2,) * 16,), torch.randn(1, 64, 16)
    x[0, 7] *= 9
    plain, sized = (KltCodec(bits, zeros(1, 16), gain) for gain in (False, True))
    errors = [
        (c.decode(c.encode(x), torch.float32) - x)[0, 7].square().mean() for c in (plain, sized)
    ]
    assert errors[1] < 0.2 * errors[0]
    assert sized.bits_per_value(16) == pytest.approx(plain.bits_per_value(16) + 8 / 16)


def test_it_is_plain_data():
    codec = KltCodec(((1, 0), (3, 2)), ((0.5, 0.0), (-1.0, 2.0)), True, "normal")
    assert make_codec(codec.to_dict()) == codec
    assert not codec.is_headwise


@pytest.mark.parametrize(
    ("bits", "mean", "rule"),
    [
        ((), (), "one number a component"),
        (((1, 2),), ((0.0,),), "one number a component"),
        (((9, 2),), ((0.0, 0.0),), "0 to 8"),
    ],
)
def test_constants_that_do_not_fit_are_refused(bits, mean, rule):
    with pytest.raises(RecipeError, match=rule):
        KltCodec(bits, mean)


def test_another_head_dim_is_refused():
    with pytest.raises(PassError, match="head_dim of 4"):
        KltCodec(((1, 2),), zeros(1, 2)).check(4)


def correlated(tokens: int, size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator, dtype=torch.float64)
    mixing = mixing * torch.logspace(0, -2, size, dtype=torch.float64)[:, None]
    return torch.randn(tokens, size, generator=generator, dtype=torch.float64) @ mixing + 3.0


def test_components_are_not_correlated_and_have_deviation_one():
    x, g = correlated(500, 12), correlated(500, 12, seed=1) - 3
    for gradients in (None, g):
        found = fit_transform(x, gradients, 0.1)
        c = x @ found.forward
        torch.testing.assert_close(torch.cov(c.T), torch.eye(12).double(), rtol=0, atol=1e-8)
        torch.testing.assert_close(c.mean(0), found.mean, rtol=0, atol=1e-9)
        torch.testing.assert_close(c @ found.inverse, x, rtol=0, atol=1e-9)
        assert bool((found.cost[:-1] >= found.cost[1:]).all())


def test_costs_are_what_errors_cost():
    """E[(g e)^2] of independent errors, against the sum over components."""
    x, g = correlated(4000, 6), correlated(4000, 6, seed=1) - 3
    found = fit_transform(x, g, 1e-9)
    fisher = g.T @ g / len(g)
    error = torch.diag(torch.full((6,), 0.01).double())  # covariance of errors of components
    in_x = found.inverse.T @ error @ found.inverse
    assert float((fisher * in_x).sum()) == pytest.approx(0.01 * float(found.cost.sum()), rel=1e-6)


def best_error(costs: list[torch.Tensor], overhead: list[int], total: int) -> float:
    """Try all ways to give whole bytes to rows; inside of a row bits go one by one."""
    errors = unit_errors("laplace")

    def row(cost: torch.Tensor, bits: int) -> float:
        own = torch.zeros(len(cost), dtype=torch.int64)
        for _ in range(bits):
            gains = cost * (errors[own] - errors[(own + 1).clamp_max(8)])
            own[int(gains.argmax())] += 1
        return float((cost * errors[own]).sum())

    pairs = [(n, total - n) for n in range(1, total)]
    return min(
        row(costs[0], 8 * a - overhead[0]) + row(costs[1], 8 * b - overhead[1]) for a, b in pairs
    )


@pytest.mark.parametrize("overhead", [[0, 0], [4, 0]])
def test_bytes_go_where_they_help_most(overhead):
    costs = [
        torch.tensor([9.0, 3.0, 1.0, 0.1]).double(),
        torch.tensor([2.0, 0.5, 0.2, 0.1]).double(),
    ]
    shared = share_bytes(costs, overhead, 5, "laplace")
    assert sum(int(own.sum()) for own in shared) == 40 - sum(overhead)
    assert all((int(own.sum()) + bits) % 8 == 0 for own, bits in zip(shared, overhead, strict=True))
    errors = unit_errors("laplace")
    found = sum(float((c * errors[b]).sum()) for c, b in zip(costs, shared, strict=True))
    assert found == pytest.approx(best_error(costs, overhead, 5), rel=1e-9)


def test_every_row_has_a_byte():
    shared = share_bytes(
        [torch.ones(8).double(), torch.full((8,), 1e-9).double()], [0, 0], 3, "normal"
    )
    assert [int(own.sum()) for own in shared] == [16, 8]
