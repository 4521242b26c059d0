"""Codec lloyd-max: published distortions and bounds, invariants of the tables, bits, refusals."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from distortion import TOLERANCE, check_planes, distortion, normal_vectors, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from kvxform.codecs import lloyd_max, lloyd_tables
from kvxform.codecs.base import make_codec
from kvxform.codecs.lloyd_max import LloydMaxCodec
from kvxform.codecs.lloyd_tables import (
    bounds_of,
    fit_density,
    fit_levels,
    normal_table,
    sphere_table,
)
from kvxform.errors import PassError, RecipeError


@pytest.mark.parametrize(
    ("levels", "published"),
    [(2, 0.361), (4, 0.1161), (8, 0.0340), (16, 0.00933), (32, 0.00250)],
)
def test_distortion_is_the_published_one_and_within_its_bounds(levels, published):
    error = distortion(codec="lloyd-max", levels=levels)
    assert error == pytest.approx(published, rel=TOLERANCE)
    assert levels**-2 < error < math.sqrt(3) * math.pi / 2 * levels**-2  # TurboQuant, theorem 1


@pytest.mark.parametrize(
    ("levels", "bits", "published"), [(5, 2.375, 0.0786), (11, 3.5, 0.0188), (20, 4.375, 0.00605)]
)
def test_levels_between_powers_of_two_cost_bits_between(levels, bits, published):
    codec = LloydMaxCodec(levels=levels)
    assert relative_error(codec, normal_vectors(8192)) == pytest.approx(published, rel=TOLERANCE)
    assert codec.bits_per_value(128) == bits + 16 / 128


@pytest.mark.parametrize("levels", [2, 3, 5, 16, 31])
@pytest.mark.parametrize("dim", [8, 64, 128])
def test_a_table_is_symmetric_ascending_and_where_lloyd_leaves_it(levels, dim):
    table = sphere_table(levels, dim)
    assert torch.equal(table, -table.flip(0))
    assert bool((table.diff() > 0).all())
    grid = np.linspace(-1, 1, 400_001)
    density = (1 - grid * grid) ** ((dim - 3) / 2)
    owner = np.searchsorted(bounds_of(table).double().numpy(), grid)
    for level in range(levels):
        mass = density[owner == level]
        mean = (mass * grid[owner == level]).sum() / mass.sum()
        assert mean == pytest.approx(float(table[level]), abs=2e-5)


def test_two_and_four_levels_approach_the_closed_forms_of_large_dimensions():
    assert sphere_table(2, 4096)[1] * 64 == pytest.approx(math.sqrt(2 / math.pi), rel=1e-3)
    assert (sphere_table(4, 4096)[2:] * 64).tolist() == pytest.approx([0.453, 1.51], rel=2e-3)
    assert normal_table(4)[2:].tolist() == pytest.approx([0.4528, 1.5104], rel=1e-4)


@pytest.mark.parametrize("levels", [2, 5, 16])
def test_samples_and_a_density_on_a_grid_give_the_table_of_the_closed_form(levels):
    samples = np.random.default_rng(0).standard_normal(400_000)
    exact = normal_table(levels).numpy()
    assert fit_levels(samples, levels) == pytest.approx(exact, abs=0.02)
    density = fit_density(lambda x: np.exp(-x * x / 2), -8.0, 8.0, levels)
    assert density == pytest.approx(exact, abs=3e-3)


def test_every_step_of_lloyd_lowers_the_error(monkeypatch):
    samples = np.sort(np.random.default_rng(1).standard_normal(20_000))
    errors = []
    for steps in (1, 2, 4, 8, 16, 32):
        monkeypatch.setattr(lloyd_tables, "STEPS", steps)
        table = fit_levels(samples, 12)
        bounds = (table[1:] + table[:-1]) / 2
        errors.append(np.square(table[np.searchsorted(bounds, samples)] - samples).mean())
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))


def test_encoding_takes_the_nearest_level():
    codec, x = LloydMaxCodec(levels=5), normal_vectors(64, 16)
    unit = x / x.norm(dim=-1, keepdim=True)
    table = sphere_table(5, 16)
    nearest = (unit[..., None] - table).abs().argmin(-1)
    expected = table[nearest] * x.norm(dim=-1, keepdim=True).half().float()
    assert torch.equal(codec.decode(codec.encode(x), torch.float32), expected)


@pytest.mark.parametrize("levels", [4, 5, 16])
def test_gains_keep_the_norm_or_give_the_smallest_error(levels):
    x, error, norm = normal_vectors(4096), {}, {}
    for gain in ("norm", "corrected", "projected"):
        codec = LloydMaxCodec(levels=levels, gain=gain)
        decoded = codec.decode(codec.encode(x), torch.float64)
        error[gain] = relative_error(codec, x)
        norm[gain] = (decoded.norm(dim=-1) / x.double().norm(dim=-1) - 1).abs().max()
    assert error["projected"] < min(error["norm"], error["corrected"])
    assert norm["corrected"] < 2e-3 < min(norm["norm"], norm["projected"])


@pytest.mark.parametrize(("levels", "published"), [(2, 0.565), (4, 0.182), (8, 0.0537)])
def test_qjl_has_the_published_variance_of_scores(monkeypatch, levels, published):
    """Times D, and in the mean over projections; over directions of q it is the squared error."""
    x = F.normalize(normal_vectors(4000).double(), dim=-1)

    def variance(codec: LloydMaxCodec) -> float:
        decoded = codec.decode(codec.encode(x), torch.float64)
        return float((decoded - x).square().sum(-1).mean())

    found = []
    for seed in range(4):
        monkeypatch.setattr(lloyd_max, "SEED", seed)
        lloyd_max.projection.cache_clear()
        found.append(variance(LloydMaxCodec(levels=levels, qjl=True)))
    lloyd_max.projection.cache_clear()
    mean = sum(found) / len(found)
    assert mean == pytest.approx(published, rel=TOLERANCE)
    assert mean < math.sqrt(3) * math.pi**2 / (2 * levels) ** 2  # TurboQuant, theorem 2
    # The same bits spent on twice the levels have a variance several times smaller.
    assert mean > 4.5 * variance(LloydMaxCodec(levels=2 * levels))


def test_qjl_removes_the_bias_that_one_bit_has():
    """One bit alone shrinks scores to 2 / pi; signs of the rest bring them back."""
    x = normal_vectors(20_000).double()
    slope = {}
    for qjl in (False, True):
        codec = LloydMaxCodec(levels=2, qjl=qjl)
        decoded = codec.decode(codec.encode(x), torch.float64)
        slope[qjl] = float((decoded * x).sum() / (x * x).sum())
    assert slope[False] == pytest.approx(2 / math.pi, rel=0.01)
    assert slope[True] == pytest.approx(1, abs=0.01)


@settings(deadline=None, max_examples=25)
@given(
    levels=st.sampled_from([2, 3, 4, 5, 11, 16]),
    qjl=st.booleans(),
    heads=st.integers(1, 3),
    tokens=st.integers(0, 5),
    dim=st.sampled_from([8, 24, 64]),
    log_scale=st.integers(-3, 3),
)
def test_planes_are_as_declared_and_scale_carries_over(levels, qjl, heads, tokens, dim, log_scale):
    codec = LloydMaxCodec(levels=levels, qjl=qjl)
    x = normal_vectors(2 * heads * tokens, dim).reshape(2, heads, tokens, dim)
    check_planes(codec, x)
    scaled = codec.decode(codec.encode(x * 2.0**log_scale), torch.float32)
    assert torch.equal(scaled, codec.decode(codec.encode(x), torch.float32) * 2.0**log_scale)


def test_zero_decodes_to_zero_and_huge_values_stay_finite():
    codec = LloydMaxCodec(levels=5, qjl=True)
    assert not codec.decode(codec.encode(torch.zeros(3, 64)), torch.float32).any()
    assert codec.decode(codec.encode(torch.full((3, 64), 3e38)), torch.float32).isfinite().all()


def test_encoding_does_not_depend_on_other_tokens():
    codec, x = LloydMaxCodec(), normal_vectors(32, 64)
    whole = codec.encode(x)
    for name, part in codec.encode(x[5:9]).items():
        assert torch.equal(part, whole[name][5:9])


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        ({"levels": 1}, "levels"),
        ({"levels": 257}, "levels"),
        ({"gain": "max"}, "gain"),
        ({"qjl": True, "gain": "corrected"}, "qjl"),
    ],
)
def test_options_that_cannot_be_are_refused(spec, word):
    with pytest.raises(RecipeError, match=rf"KVX107.*codec lloyd-max.*{word}"):
        make_codec({"codec": "lloyd-max", **spec})


def test_a_head_dim_that_fills_no_bytes_is_refused():
    LloydMaxCodec().check(24)
    with pytest.raises(PassError, match=r"KVX203.*multiple of 8"):
        LloydMaxCodec().check(20)
