"""Codec polar: published distortions, an exact round trip, the law of angles, refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from distortion import TOLERANCE, check_planes, distortion, normal_vectors
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from kvxform.codecs.base import make_codec
from kvxform.codecs.polar import PolarCodec, angle_density, from_polar, to_polar
from kvxform.errors import PassError, RecipeError


@pytest.mark.parametrize(
    ("bits", "stored", "published"), [((4, 2, 2, 2), 3.875, 0.0321), ((3, 2, 2, 2), 3.375, 0.070)]
)
def test_distortion_is_the_published_one(bits, stored, published):
    assert distortion(codec="polar", bits=bits) == pytest.approx(published, rel=TOLERANCE)
    assert PolarCodec(bits).bits_per_value(128) == stored


def test_three_bits_of_a_scalar_table_cost_less_and_lose_as_little():
    scalar = make_codec({"codec": "lloyd-max", "levels": 8})
    assert scalar.bits_per_value(128) < 3.2
    assert distortion(codec="lloyd-max", levels=8) < 1.07 * distortion(codec="polar")


def test_without_rounding_the_round_trip_is_exact():
    x = normal_vectors(256, 64).double()
    angles, lengths = to_polar(x)
    assert [a.shape[-1] for a in angles] == [32, 16, 8, 4]
    assert torch.allclose(from_polar(angles, lengths), x, rtol=0, atol=1e-12)
    blocks = x.unflatten(-1, (4, 16)).norm(dim=-1)
    assert torch.allclose(lengths, blocks, rtol=0, atol=1e-12)


@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_angles_follow_the_density_of_their_level(level):
    angles = to_polar(normal_vectors(600, 64).double())[0][level - 1].flatten().numpy()
    if level == 1:
        law = stats.uniform(0, 2 * math.pi).cdf
    else:
        grid = np.linspace(0, math.pi / 2, 20_001)
        mass = np.cumsum(angle_density(level, grid))
        law = lambda a: np.interp(a, grid, mass / mass[-1])  # noqa: E731
    assert stats.kstest(angles, law).pvalue > 0.01


@settings(deadline=None, max_examples=12)
@given(
    bits=st.sampled_from([(4, 2, 2, 2), (3, 3, 3, 3), (5, 1, 1, 1)]),
    heads=st.integers(1, 2),
    tokens=st.integers(0, 3),
    dim=st.sampled_from([16, 48, 64]),
)
def test_planes_are_as_declared(bits, heads, tokens, dim):
    codec = PolarCodec(bits)
    x = normal_vectors(heads * tokens, dim).reshape(1, heads, tokens, dim)
    check_planes(codec, x)
    assert codec.decode(codec.encode(x), torch.float32).shape == x.shape


def test_lengths_of_blocks_are_kept_up_to_float16():
    x = normal_vectors(64, 64)
    decoded = PolarCodec().decode(PolarCodec().encode(x), torch.float32)
    before, after = (v.unflatten(-1, (4, 16)).norm(dim=-1) for v in (x, decoded))
    assert torch.allclose(after, before, rtol=1e-3)
    assert not PolarCodec().decode(PolarCodec().encode(x * 0), torch.float32).any()


def test_options_and_sizes_that_cannot_be_are_refused():
    for bits in ([4, 2, 2], [4, 2, 2, 9]):
        with pytest.raises(RecipeError, match=r"KVX107.*codec polar"):
            make_codec({"codec": "polar", "bits": bits})
    with pytest.raises(PassError, match=r"KVX203.*multiple of 16"):
        PolarCodec().check(40)
