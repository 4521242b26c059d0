"""Trellis codes: the best path by brute force, errors as stated, and codec klt-trellis."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvxform.codecs.base import make_codec
from kvxform.codecs.klt import KltCodec, unit_errors
from kvxform.codecs.klt_trellis import TrellisKltCodec, trellis_errors
from kvxform.codecs.trellis import SUBSETS, RowCode, make_trellis, trellis_levels
from kvxform.errors import RecipeError


def draw(tails, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if tails == "normal":
        return torch.randn(*shape, generator=generator)
    u = torch.rand(*shape, generator=generator) - 0.5
    return -u.sign() * torch.log1p(-2 * u.abs()) / 2**0.5


@settings(deadline=None, max_examples=12)
@given(
    bits=st.lists(st.integers(0, 3), min_size=1, max_size=6).filter(lambda b: sum(b) <= 9),
    memory=st.sampled_from((2, 3)),
    tails=st.sampled_from(("laplace", "normal")),
)
def test_no_row_of_codes_is_better(bits, memory, tails):
    code = RowCode(tuple(bits), tails, memory)
    unit, weights = draw(tails, 8, len(bits)), torch.rand(len(bits)) + 0.1
    every = torch.tensor(list(itertools.product(*(range(1 << b) for b in bits))))
    errors = ((unit[:, None] - code.decode(every, torch.float32)).square() * weights).sum(-1)
    codes = code.encode(unit, weights)
    assert (codes < 2 ** torch.tensor(bits)).all()
    found = ((unit - code.decode(codes, torch.float32)).square() * weights).sum(-1)
    torch.testing.assert_close(found, errors.amin(1), rtol=1e-5, atol=1e-6)


def test_a_component_reads_the_low_bits_before_it_and_nothing_else():
    """The decoder written out for four states: subset bits are u(t) + u(t-2) and u(t-1)."""
    code = RowCode((2, 0, 1, 3, 2), "laplace", 2)
    codes = torch.tensor([[3, 0, 1, 6, 1]])
    low = [0, 0, 1, 1, 0, 1]  # of the components with bits, two zeros before them
    expected = []
    for t, (bits, value) in enumerate(((2, 3), (1, 1), (3, 6), (2, 1))):
        subset = 2 * (low[t + 2] ^ low[t]) + low[t + 1]
        expected.append(trellis_levels("laplace", bits)[(value >> 1) * SUBSETS + subset])
    found = code.decode(codes, torch.float32)[0]
    assert found[1] == 0
    assert found[[0, 2, 3, 4]].tolist() == [float(level) for level in expected]


def test_rows_do_not_depend_on_each_other():
    code = RowCode((0, 1, 2, 3, 4, 5, 8) * 5, "laplace", 2)
    unit, weights = draw("laplace", 9, 35), torch.ones(35)
    whole = code.encode(unit, weights)
    assert torch.equal(torch.cat([code.encode(row[None], weights) for row in unit]), whole)
    assert torch.equal(code.encode(unit.view(3, 3, 35), weights).view(9, 35), whole)


@pytest.mark.parametrize("tails", ["laplace", "normal"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_errors_are_those_that_bits_are_shared_by(tails, bits):
    unit = draw(tails, 800, 96)
    code = RowCode((bits,) * 96, tails, 2)
    decoded = code.decode(code.encode(unit, torch.ones(96)), torch.float32)
    error = float((unit - decoded).square().mean())
    assert error == pytest.approx(float(trellis_errors(tails)[bits]), rel=0.05)
    assert error < 0.9 * float(unit_errors(tails)[bits])


def test_every_state_has_two_branches_to_subsets_two_apart():
    trellis = make_trellis(3)
    for state, closed in enumerate(trellis.closed):
        (first, second) = torch.nonzero(closed == 0)[:, 0].tolist()
        subsets = trellis.between[state]
        assert abs(int(subsets[first] - subsets[second])) == 2


def klt_pair():
    bits = tuple(tuple((3 * h + i) % 5 for i in range(16)) for h in range(3))
    mean = tuple(tuple(0.1 * i for i in range(16)) for _ in range(3))
    return KltCodec(bits, mean, gain=True), TrellisKltCodec(bits, mean, gain=True)


def test_codec_takes_the_bytes_of_klt_and_less_error():
    plain, trellis = klt_pair()
    assert trellis.planes(16) == plain.planes(16)
    x = draw("laplace", 3, 200, 16)
    bits = torch.tensor(plain.bits)[:, None]
    counts = (bits > 0) / unit_errors("laplace")[bits]  # where bits are shared as they should be
    errors = [
        float(((codec.decode(codec.encode(x), torch.float32) - x).square() * counts).mean())
        for codec in (plain, trellis)
    ]
    assert errors[1] < 0.8 * errors[0]
    assert trellis.encode(x)["codes"].shape == (1, 200, plain.planes(16)[0].width)
    assert make_codec(trellis.to_dict()) == trellis


def test_unknown_registers_are_refused():
    plain, _ = klt_pair()
    with pytest.raises(RecipeError, match="memory must be one of 2, 3"):
        TrellisKltCodec(plain.bits, plain.mean, memory=4)
