"""Codec int: error bound, degenerate groups, known distortions, bits accounting."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvxform.codecs.base import CodecSamples, make_codec
from kvxform.codecs.basis import Basis
from kvxform.codecs.integer import CLIPS, IntCodec
from kvxform.errors import PassError, RecipeError


def per_element(codec: IntCodec, plane: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Repeat a plane over its groups, so that it lines up with the values."""
    dim = -1 if codec.axis == "token" else -2
    return plane.double().repeat_interleave(codec.group, dim)[..., : like.shape[-1]]


def round_trip(codec: IntCodec, x: torch.Tensor) -> torch.Tensor:
    return codec.decode(codec.encode(x), torch.float64)


def relative_mse(codec: IntCodec, dim: int) -> float:
    x = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).reshape(-1, dim)
    return float((round_trip(codec, x) - x).pow(2).mean() / x.pow(2).mean())


@settings(deadline=None, max_examples=150)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    axis=st.sampled_from(["token", "channel"]),
    kind=st.sampled_from(["int", "float", "symmetric"]),
    include_zero=st.booleans(),
    tokens=st.integers(0, 3),
    mean=st.floats(-50, 50),
    log_spread=st.integers(-4, 3),
    seed=st.integers(0, 99),
)
def test_error_is_at_most_half_a_step_plus_rounding(
    bits, axis, kind, include_zero, tokens, mean, log_spread, seed
):
    codec = IntCodec(
        bits=bits,
        axis=axis,
        group=8,
        symmetric=kind == "symmetric",
        zero="float" if kind == "float" else "int",
        include_zero=include_zero,
    )
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 8 * tokens, 16, generator=generator).double() * 10.0**log_spread + mean
    planes = codec.encode(x)
    scale = per_element(codec, planes["scale"], x)
    error = (codec.decode(planes, torch.float64) - x).abs()
    # The stored scale is off by half a float16 step, n times over at the end of the range; a
    # float zero point is off by half a float16 step of its own; float32 arithmetic adds a little.
    rounding = 2**bits * (scale * 2**-11 + 2**-25) + x.abs() * 2**-21
    if kind == "float":
        rounding = rounding + per_element(codec, planes["zero"], x).abs() * 2**-11
    assert bool((error <= scale / 2 + rounding).all())


@settings(deadline=None, max_examples=60)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    axis=st.sampled_from(["token", "channel"]),
    kind=st.sampled_from(["int", "float", "symmetric"]),
    value=st.sampled_from([0.0, 1e-9, 3e-5, -0.7, 1.0, 100.03, -3.0e4, 9.0e4]),
)
def test_constant_groups_decode_to_the_constant(bits, axis, kind, value):
    codec = IntCodec(bits, axis, 8, kind == "symmetric", "float" if kind == "float" else "int")
    x = torch.full((8, 16), value, dtype=torch.float64)
    y = round_trip(codec, x)
    assert bool(y.isfinite().all())
    if abs(value) < 65504 or kind == "int":  # float16 cannot hold more as one number
        torch.testing.assert_close(y, x, rtol=2**-10, atol=1e-5)


def test_zero_stays_exactly_zero():
    x = torch.zeros(32, 16)
    for axis, zero, symmetric in itertools.product(
        ("token", "channel"), ("int", "float"), (True, False)
    ):
        assert not round_trip(IntCodec(4, axis, None, symmetric, zero), x).any()


@pytest.mark.parametrize("magnitude", [1e-8, 1e-5, 1e4, 1e6])
@pytest.mark.parametrize("kind", ["int", "float", "symmetric"])
def test_scales_out_of_float16_range_saturate(magnitude, kind):
    codec = IntCodec(4, symmetric=kind == "symmetric", zero="float" if kind == "float" else "int")
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(1)) * magnitude
    planes = codec.encode(x)
    assert bool((planes["scale"] > 0).all())
    y = codec.decode(planes, torch.float32)
    assert bool(y.isfinite().all())
    if magnitude < 1e6:
        assert float((y - x).abs().max()) <= 0.5 * max(magnitude, 2e-6)


# spec: relative mean squared error on N(0, 1), asymmetric `zero: float`, group 32, 64, 128;
# symmetric, group 128
ASYMMETRIC = {2: (0.154, 0.202, 0.250), 3: (0.0280, 0.0370, 0.0457), 4: (0.00611, 0.00799, 0.00993)}
SYMMETRIC = {2: 0.586, 3: 0.0753, 4: 0.0137}


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("group", "column"), [(32, 0), (64, 1), (128, 2)])
def test_distortion_of_asymmetric_codes_on_gaussian_values(bits, group, column):
    measured = relative_mse(IntCodec(bits, group=group, zero="float"), 128)
    assert measured == pytest.approx(ASYMMETRIC[bits][column], rel=0.01)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_distortion_of_symmetric_codes_on_gaussian_values(bits):
    measured = relative_mse(IntCodec(bits, symmetric=True), 128)
    assert measured == pytest.approx(SYMMETRIC[bits], rel=0.01)


@pytest.mark.parametrize(
    ("bits", "clip", "expected"),
    [
        (2, 1.0, 0.253),
        (2, 0.8, 0.172),
        (2, 0.7, 0.148),
        (2, 0.6, 0.140),
        (3, 1.0, 0.0466),
        (3, 0.9, 0.0390),
        (4, 1.0, 0.0101),
        (4, 0.95, 0.0094),
    ],
)
def test_distortion_of_clipped_int_zero_codes(bits, clip, expected):
    assert relative_mse(IntCodec(bits, clip=clip), 128) == pytest.approx(expected, rel=0.015)


@pytest.mark.parametrize("axis", ["token", "channel"])
@pytest.mark.parametrize("zero", ["int", "float"])
def test_a_searched_clip_is_the_best_of_each_group(axis, zero):
    x = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(3)) * 3

    def group_errors(clip):
        codec = IntCodec(2, axis, 8, zero=zero, clip=clip)
        squared = (round_trip(codec, x) - x).square()
        split = squared.unflatten(-1 if axis == "token" else -2, (2, 8))
        return split.sum(-1 if axis == "token" else -2)

    fixed = torch.stack([group_errors(clip) for clip in CLIPS])
    torch.testing.assert_close(group_errors("search"), fixed.amin(0), rtol=1e-6, atol=1e-9)
    assert len(set(fixed.argmin(0).flatten().tolist())) > 2  # groups differ in their best clip


def test_a_fitted_clip_is_the_best_of_the_stream():
    x = torch.randn(2, 256, 64, generator=torch.Generator().manual_seed(3))
    codec = IntCodec(2, clip="fit")
    assert codec.needs_calibration
    assert not codec.needs_fisher
    fitted = codec.fit(CodecSamples(x))
    assert not fitted.needs_calibration
    errors = {clip: (round_trip(IntCodec(2, clip=clip), x) - x).square().mean() for clip in CLIPS}
    assert fitted.clip == min(errors, key=errors.get) < 1
    assert fitted.fit(CodecSamples(x * 9)) is fitted
    grouped = IntCodec(2, "channel", 48, clip="fit").fit(CodecSamples(x))  # 256 is not full groups
    assert grouped.clip in CLIPS


def test_searching_clips_keeps_two_fifths_of_the_error_out():
    assert relative_mse(IntCodec(2, clip="search"), 128) < 0.1385  # 0.253 without, 0.140 at best


@settings(deadline=None, max_examples=20)
@given(
    bits=st.sampled_from([2, 4, 8]),
    zero=st.sampled_from(["int", "float"]),
    clip=st.sampled_from([1.0, "search"]),
    heads=st.integers(1, 3),
)
def test_statistics_over_heads_are_those_of_one_wide_head(bits, zero, clip, heads):
    x = torch.randn(2, heads, 5, 16) * 10
    codec = IntCodec(bits, zero=zero, clip=clip, across_heads=True)
    wide = IntCodec(bits, zero=zero, clip=clip)
    planes, expected = codec.encode(x), wide.encode(x.transpose(1, 2).flatten(-2))
    assert planes["scale"].shape == (2, 1, 5, 1)
    assert torch.equal(planes["scale"][:, 0], expected["scale"])
    values = wide.decode(expected, torch.float64).unflatten(-1, (heads, 16)).transpose(1, 2)
    assert torch.equal(codec.decode(planes, torch.float64), values)
    form = codec.affine(planes, torch.float64)
    torch.testing.assert_close(form.codes * form.scale + form.offset, values, rtol=0, atol=1e-12)
    assert not codec.is_headwise
    assert codec.bits_per_value(16, heads) == bits + 32 / (16 * heads)


def test_three_bits_use_all_eight_levels():
    x = torch.arange(8.0).repeat(4, 1)  # 0..7: exact with 2**3 - 1 steps, not with 3**2 - 1
    assert torch.equal(round_trip(IntCodec(3), x), x.double())


def test_axes_are_transposes_of_each_other():
    x = torch.randn(2, 16, 16)
    by_token = IntCodec(4, "token", 8).decode(IntCodec(4, "token", 8).encode(x), torch.float32)
    channel = IntCodec(4, "channel", 8)
    by_channel = channel.decode(channel.encode(x.mT), torch.float32).mT
    assert torch.equal(by_token, by_channel)


@pytest.mark.parametrize("axis", ["token", "channel"])
def test_a_group_of_one_is_exact_to_float16(axis):
    x = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0)).half().double()
    codec = IntCodec(2, axis, 1, zero="float")
    assert torch.equal(round_trip(codec, x), x)


def test_include_zero_widens_a_one_sided_group():
    x = torch.linspace(1, 2, 16).repeat(4, 1)
    plain, widened = IntCodec(4).encode(x), IntCodec(4, include_zero=True).encode(x)
    assert float(plain["scale"][0]) == pytest.approx(1 / 15, rel=1e-3)
    assert float(widened["scale"][0]) == pytest.approx(2 / 15, rel=1e-3)
    assert float(widened["zero"][0]) == 0


@pytest.mark.parametrize("axis", ["token", "channel"])
@pytest.mark.parametrize("kind", ["int", "float", "symmetric"])
def test_affine_form_equals_decode(axis, kind):
    codec = IntCodec(4, axis, 8, kind == "symmetric", "float" if kind == "float" else "int")
    x = torch.randn(2, 3, 24, 16)
    planes = codec.encode(x)
    form = codec.affine(planes, torch.float64)
    scale, offset = (per_element(codec, t, x) for t in (form.scale, form.offset))
    assert (form.axis, form.group) == (axis, 8)
    torch.testing.assert_close(
        form.codes * scale + offset, codec.decode(planes, torch.float64), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(
    ("options", "head_dim", "bits"),
    [
        ({"bits": 4}, 64, 4.5),
        ({"bits": 4}, 128, 4.25),
        ({"bits": 8}, 64, 8.5),
        ({"bits": 3, "symmetric": True}, 64, 3.25),
        ({"bits": 4, "group": 32}, 64, 5.0),
        ({"bits": 2, "axis": "channel"}, 64, 3.0),
        ({"bits": 4, "axis": "channel", "group": 64}, 80, 4.5),
    ],
)
def test_bits_per_value_counts_metadata_and_matches_real_planes(options, head_dim, bits):
    codec = make_codec({"codec": "int", **options})
    assert codec.bits_per_value(head_dim) == bits
    planes = codec.encode(torch.randn(2, 64, head_dim))
    specs = codec.planes(head_dim)
    assert list(planes) == [s.name for s in specs]
    for spec in specs:
        plane = planes[spec.name]
        assert plane.dtype == spec.torch_dtype
        assert plane.shape == (2, 64 // spec.tokens_per_row, spec.width)
    stored = sum(p.numel() * p.element_size() for p in planes.values())
    assert stored * 8 / (2 * 64 * head_dim) == bits


def test_codes_do_not_depend_on_the_dtype_of_the_model():
    x = torch.randn(4, 32)
    single, double = IntCodec().encode(x), IntCodec().encode(x.double())
    assert all(torch.equal(single[name], double[name]) for name in ("codes", "scale", "zero"))


def test_rotation_removes_an_outlier_channel():
    x = torch.randn(512, 128, generator=torch.Generator().manual_seed(0))
    x[:, 5] *= 40
    errors = [
        float((basis.unrotate(round_trip(IntCodec(), basis.rotate(x))) - x).pow(2).mean())
        for basis in (Basis(), Basis("hadamard", 16), Basis("hadamard", 128))
    ]
    assert errors[2] < errors[1] < errors[0]


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 5},
        {"axis": "head"},
        {"zero": "half"},
        {"clip": 0.0},
        {"clip": 1.5},
        {"clip": "best"},
        {"across_heads": True, "axis": "channel"},
        {"across_heads": True, "group": 8},
        {"group": 0},
        {"group": 2.5},
    ],
)
def test_bad_options_are_refused_by_name(options):
    with pytest.raises(RecipeError, match=f"KVX107.*{next(iter(options))} must"):
        make_codec({"codec": "int", **options})


@pytest.mark.parametrize(
    ("options", "head_dim", "words"),
    [
        ({"bits": 3}, 60, "multiple of 8; got 60"),
        ({"bits": 2}, 66, "multiple of 4; got 66"),
        ({"group": 48}, 64, "must divide head_dim 64; got 48"),
    ],
)
def test_a_head_dim_that_does_not_fit_is_refused(options, head_dim, words):
    with pytest.raises(PassError, match=f"KVX203.*{words}"):
        make_codec({"codec": "int", **options}).check(head_dim)
