"""Codes of any number of levels in bytes: round trip, size, and the byte layout of a word."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvxform.codecs.packing import pack
from kvxform.codecs.radix import pack_levels, packed_level_bytes, unpack_levels


@settings(deadline=None, max_examples=60)
@given(
    levels=st.one_of(st.integers(2, 300), st.sampled_from([512, 680, 1024, 65536])),
    count=st.integers(1, 130),
    leading=st.lists(st.integers(0, 3), max_size=2),
    seed=st.integers(0, 999),
)
def test_unpacking_inverts_packing(levels, count, leading, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, levels, (*leading, count), generator=generator)
    packed = pack_levels(codes, levels)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*leading, packed_level_bytes(count, levels))
    assert torch.equal(unpack_levels(packed, levels, count), codes)


@pytest.mark.parametrize(("levels", "bits"), [(5, 2.375), (11, 3.5), (20, 4.375), (3, 1.625)])
def test_levels_that_are_no_power_of_two_cost_little_more_than_their_logarithm(levels, bits):
    assert packed_level_bytes(128, levels) * 8 / 128 == bits
    assert math.log2(levels) < bits < math.log2(levels) + 0.06


def test_largest_codes_of_a_full_word_do_not_overflow():
    codes = torch.full((24,), 4)
    packed = pack_levels(codes, 5)
    assert len(packed) == 7
    assert int.from_bytes(bytes(packed.tolist()), "little") == 5**24 - 1
    assert torch.equal(unpack_levels(packed, 5, 24), codes)


def test_a_word_is_a_number_in_base_levels_lowest_byte_first():
    codes = torch.tensor([3, 0, 4, 1, 2, 2, 0, 1, 4, 3])  # fewer than a full word of 24
    value = sum(int(code) * 5**place for place, code in enumerate(codes))
    assert bytes(pack_levels(codes, 5).tolist()) == value.to_bytes(3, "little")


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
def test_powers_of_two_are_packed_as_integer_codes_are(bits):
    codes = torch.randint(0, 2**bits, (5, 64), dtype=torch.uint8)
    assert torch.equal(pack_levels(codes, 2**bits), pack(codes, bits))


def test_a_count_that_fills_no_byte_still_round_trips():
    codes = torch.randint(0, 8, (43,))
    packed = pack_levels(codes, 8)
    assert len(packed) == math.ceil(43 * 3 / 8)
    assert torch.equal(unpack_levels(packed, 8, 43), codes)
