"""Packing of codes: round trip, size, and the byte layout that other lowerings rely on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvxform.codecs.packing import BITS, channel_multiple, pack, packed_bytes, unpack


@settings(deadline=None, max_examples=40)
@given(
    bits=st.sampled_from(BITS),
    blocks=st.integers(1, 12),
    leading=st.lists(st.integers(0, 3), max_size=3),
    seed=st.integers(0, 999),
)
def test_unpack_inverts_pack_without_waste(bits, blocks, leading, seed):
    dim = blocks * channel_multiple(bits)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (*leading, dim), generator=generator, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*leading, packed_bytes(dim, bits))
    assert packed.shape[-1] * 8 == dim * bits
    assert torch.equal(unpack(packed, bits), codes)


@pytest.mark.parametrize("bits", [2, 4])
def test_byte_j_holds_channels_a_stride_apart_lowest_bits_first(bits):
    dim = 16
    codes = torch.randint(0, 2**bits, (dim,), dtype=torch.uint8)
    count = 8 // bits
    stride = dim // count
    expected = [
        sum(int(codes[j + i * stride]) << (bits * i) for i in range(count)) for j in range(stride)
    ]
    assert pack(codes, bits).tolist() == expected


def test_three_bits_are_a_two_bit_part_and_a_one_bit_part():
    codes = torch.randint(0, 8, (16,), dtype=torch.uint8)
    low, high = (
        pack(codes & 3, 2),
        [sum((int(codes[j + 2 * i]) >> 2) << i for i in range(8)) for j in range(2)],
    )
    assert pack(codes, 3).tolist() == low.tolist() + high


def test_packing_keeps_the_shape_on_the_meta_device():
    assert pack(torch.empty(2, 5, 64, dtype=torch.uint8, device="meta"), 3).shape == (2, 5, 24)
