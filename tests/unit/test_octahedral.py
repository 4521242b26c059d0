"""Codec octahedral: published distortions with and without joint rounding, the map, refusals."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from distortion import TOLERANCE, check_planes, distortion, normal_vectors
from hypothesis import given, settings
from hypothesis import strategies as st

from kvxform.codecs.base import make_codec
from kvxform.codecs.octahedral import OctahedralCodec, octahedral_decode, octahedral_encode
from kvxform.errors import PassError, RecipeError


@pytest.mark.parametrize(
    ("direction", "radius", "independent", "joint"),
    [
        (3, 1, 0.0894, 0.0831),
        (4, 2, 0.0260, 0.0243),
        (5, 3, 0.00710, 0.00667),
        pytest.param(2, 2, 0.1655, 0.1411, marks=pytest.mark.slow),
        pytest.param(3, 3, 0.0441, 0.0373, marks=pytest.mark.slow),
        pytest.param(4, 4, 0.0113, 0.0096, marks=pytest.mark.slow),
    ],
)
def test_distortions_are_the_published_ones(direction, radius, independent, joint):
    options = {"codec": "octahedral", "direction_bits": direction, "radius_bits": radius}
    alone = distortion(2048, joint=False, **options)
    together = distortion(2048, joint=True, **options)
    assert alone == pytest.approx(independent, rel=TOLERANCE)
    assert together == pytest.approx(joint, rel=TOLERANCE)
    assert together < alone


def test_the_map_is_inverted_in_every_octant_on_axes_and_at_the_poles():
    signs = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=3))).double()
    vectors = torch.cat([signs[signs.any(-1)], normal_vectors(4096, 3).double()])
    points = octahedral_encode(vectors)
    assert float(points.abs().max()) <= 1
    back = octahedral_decode(points)
    assert torch.allclose(back, F.normalize(vectors, dim=-1), atol=1e-6)


def test_the_south_pole_is_a_corner_and_zero_is_finite():
    south = octahedral_encode(torch.tensor([0.0, 0.0, -2.0]))
    assert south.abs().tolist() == [1, 1]
    assert octahedral_encode(torch.zeros(3)).isfinite().all()
    assert octahedral_decode(torch.zeros(2)).tolist() == [0, 0, 1]


def test_joint_rounding_changes_codes_not_the_decoder():
    x = normal_vectors(64, 24)  # a head_dim whose tables another test needs too
    joint, alone = OctahedralCodec(joint=True), OctahedralCodec(joint=False)
    planes = joint.encode(x)
    assert not torch.equal(planes["codes"], alone.encode(x)["codes"])
    assert torch.equal(joint.decode(planes, torch.float32), alone.decode(planes, torch.float32))


@settings(deadline=None, max_examples=12)
@given(heads=st.integers(1, 2), tokens=st.integers(0, 3), dim=st.sampled_from([8, 24]))
def test_planes_are_as_declared_also_with_padding(heads, tokens, dim):
    codec = OctahedralCodec()
    x = normal_vectors(heads * tokens, dim).reshape(1, heads, tokens, dim)
    check_planes(codec, x)
    assert codec.decode(codec.encode(x), torch.float32).shape == x.shape


def test_zero_decodes_to_zero():
    codec = OctahedralCodec()
    assert not codec.decode(codec.encode(torch.zeros(3, 24)), torch.float32).any()


def test_at_equal_bits_a_scalar_table_of_five_levels_is_better():
    """OCTOPUS compares 3 b + 1 with 3 b bits; at equal bits the comparison turns round."""
    octopus = make_codec({"codec": "octahedral", "direction_bits": 3, "radius_bits": 1})
    scalar = make_codec({"codec": "lloyd-max", "levels": 5})
    assert scalar.bits_per_value(128) < octopus.bits_per_value(128)
    assert distortion(2048, codec="lloyd-max", levels=5) < distortion(2048, codec="octahedral")


def test_options_and_sizes_that_cannot_be_are_refused():
    for spec in ({"direction_bits": 0}, {"radius_bits": 9}):
        with pytest.raises(RecipeError, match=r"KVX107.*codec octahedral"):
            make_codec({"codec": "octahedral", **spec})
    with pytest.raises(PassError, match=r"KVX203.*multiple of 8"):
        OctahedralCodec().check(12)
