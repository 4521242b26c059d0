"""Codec fp8: step sizes of both formats, saturation, degenerate vectors, bits, refusals."""

from __future__ import annotations

import pytest
import torch
from distortion import check_planes, normal_vectors
from hypothesis import given, settings
from hypothesis import strategies as st

from kvxform.codecs.base import make_codec
from kvxform.codecs.fp8 import FORMATS, Fp8Codec
from kvxform.errors import RecipeError


@settings(deadline=None, max_examples=40)
@given(
    kind=st.sampled_from(sorted(FORMATS)),
    scaled=st.booleans(),
    log_scale=st.integers(-2, 2),  # below, scales are subnormal in float16
    seed=st.integers(0, 99),
)
def test_error_is_half_a_step_of_the_format(kind, scaled, log_scale, seed):
    x = normal_vectors(8, 16, seed) * 10.0**log_scale
    codec = Fp8Codec(kind, scaled)
    planes = codec.encode(x)
    scale = planes["scale"].double() if scaled else torch.ones(8, 1, dtype=torch.float64)
    info = torch.finfo(FORMATS[kind])
    error = (codec.decode(planes, torch.float64) - x).abs()
    bound = x.abs() * info.eps / 2 + scale * info.tiny * info.eps  # relative, then subnormal
    assert bool((error <= bound * 1.001 + (scaled * x.abs() * 2**-11)).all())


@pytest.mark.parametrize(("kind", "largest"), [("e4m3", 448.0), ("e5m2", 57344.0)])
def test_without_a_scale_large_values_saturate(kind, largest):
    x = torch.tensor([[1e30, -1e30, 1.0, 0.0]])
    codec = Fp8Codec(kind, scaled=False)
    assert codec.decode(codec.encode(x), torch.float32).tolist() == [[largest, -largest, 1, 0]]
    scaled = Fp8Codec(kind)
    assert scaled.decode(scaled.encode(x), torch.float32).isfinite().all()


def test_the_largest_value_of_a_vector_comes_back_within_the_rounding_of_its_scale():
    x = normal_vectors(64, 32)
    decoded = Fp8Codec().decode(Fp8Codec().encode(x), torch.float32)
    assert torch.allclose(decoded.abs().amax(-1), x.abs().amax(-1), rtol=2**-10)


def test_zero_decodes_to_zero_and_planes_are_as_declared():
    assert not Fp8Codec().decode(Fp8Codec().encode(torch.zeros(2, 8)), torch.float32).any()
    for codec in (Fp8Codec(), Fp8Codec("e5m2", scaled=False)):
        check_planes(codec, normal_vectors(12, 8).reshape(1, 3, 4, 8))
    assert Fp8Codec().bits_per_value(128) == 8.125
    assert Fp8Codec(scaled=False).bits_per_value(128) == 8


def test_an_unknown_format_is_refused():
    with pytest.raises(RecipeError, match=r"KVX107.*codec fp8.*e4m3 or e5m2"):
        make_codec({"codec": "fp8", "format": "e3m4"})
