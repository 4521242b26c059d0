"""Codec static-int: equations, bytes, thresholds, constants, refusals."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvxform.codecs.base import CodecSamples, make_codec
from kvxform.codecs.static_int import StaticIntCodec
from kvxform.errors import PassError, RecipeError

HEADS, TOKENS, WIDTH = 2, 400, 8
FORMATS = [(bits, axis) for bits in (4, 8) for axis in ("tensor", "channel")]


def values(seed: int = 0) -> torch.Tensor:
    """Return channels of different spreads, `[Hk, N, D]`."""
    x = torch.randn(HEADS, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))
    return x * torch.linspace(0.2, 3, HEADS * WIDTH).view(HEADS, 1, WIDTH)


def round_trip(codec: StaticIntCodec, x: torch.Tensor) -> torch.Tensor:
    return codec.decode(codec.encode(x), x.dtype)


def by_hand(x: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Return what codes stand for, in Python numbers: half to even, clamped."""
    half = 2 ** (bits - 1)
    flat = [
        max(-half, min(half - 1, round(float(v) / float(s)))) * float(s)
        for v, s in zip(x.flatten(), scale.expand_as(x).flatten(), strict=True)
    ]
    return torch.tensor(flat).view(x.shape)


@settings(max_examples=12, deadline=None)
@given(
    form=st.sampled_from(FORMATS),
    shape=st.sampled_from([(), (1,), (3,)]),
    tokens=st.integers(0, 5),
    step=st.sampled_from([1.0, 0.25, 3.0]),
)
def test_values_are_the_nearest_of_the_codes(form, shape, tokens, step):
    bits, axis = form
    count = 1 if axis == "tensor" else HEADS * WIDTH
    codec = StaticIntCodec(bits, axis, scale=tuple(step * (1 + i / 8) for i in range(count)))
    x = torch.randn(*shape, HEADS, tokens, WIDTH) * 100 + 0.5
    torch.testing.assert_close(round_trip(codec, x), by_hand(x, codec.scales(WIDTH), bits))


def test_bytes_are_those_of_group_query_attention():
    x = torch.tensor([[-9.0, 0.5, 1.5, 7.0, 200.0, -200.0, 2.5, -1.0]])
    eight, four = (StaticIntCodec(bits, scale=(1.0,)).encode(x)["codes"] for bits in (8, 4))
    assert eight.dtype is torch.int8
    assert eight.tolist() == [[-9, 0, 2, 7, 127, -128, 2, -1]]
    assert four.dtype is torch.uint8
    low_and_high = [(0, 8), (10, 15), (15, 0), (10, 7)]  # code + 8 of two neighbours
    assert four.tolist() == [[low + 16 * high for low, high in low_and_high]]


@pytest.mark.parametrize(("bits", "axis"), FORMATS)
def test_minmax_leaves_half_a_step_at_most(bits, axis):
    x = values()
    codec = StaticIntCodec(bits, axis, "minmax").fit(CodecSamples(x))
    assert len(codec.scale) == (1 if axis == "tensor" else HEADS * WIDTH)
    assert not codec.needs_calibration
    steps = (round_trip(codec, x) - x).abs() / codec.scales(WIDTH)
    assert 0.49 < float(steps.max()) <= 0.5 + 1e-4


@pytest.mark.parametrize(("bits", "axis"), FORMATS)
def test_mse_has_the_least_error_of_all_thresholds(bits, axis):
    x = values()
    best = StaticIntCodec(bits, axis).fit(CodecSamples(x))
    found = round_trip(best, x).sub(x).square().sum(1)
    for factor in (0.5, 0.8, 0.9, 1.1, 1.25):
        other = dataclasses.replace(best, scale=tuple(s * factor for s in best.scale))
        error = round_trip(other, x).sub(x).square().sum(1)
        if axis == "channel":
            assert float((found <= error * 1.02).float().mean()) > 0.9  # the grid is coarse
        assert found.sum() <= error.sum() * 1.01


def test_percentile_is_that_of_magnitudes():
    x = values()
    codec = StaticIntCodec(8, "channel", "percentile", percentile=90).fit(CodecSamples(x))
    threshold = codec.scales(WIDTH)[:, 0] * 127.5
    inside = (x.abs() <= threshold[:, None] * (1 + 1e-6)).sum(1)
    assert torch.equal(inside, torch.full_like(inside, 360))
    whole = StaticIntCodec(8, "tensor", "percentile", percentile=100).fit(CodecSamples(x))
    assert whole.scale[0] * 127.5 == pytest.approx(float(x.abs().max()))


def test_keys_at_other_positions_and_their_reach_widen_the_scales():
    x = values()
    plain = CodecSamples(x)
    moved = CodecSamples(x, elsewhere=x * 3)
    reach = CodecSamples(x, envelope=x.abs().amax(1) * 5)
    for threshold in ("minmax", "percentile", "mse"):
        codec = StaticIntCodec(8, "channel", threshold, percentile=100.0)
        here, there = (torch.tensor(codec.fit(s).scale) for s in (plain, moved))
        factor = (there / here).median()
        assert 2 < float(factor) < 3.1, threshold
        stay = dataclasses.replace(codec, any_position=False)
        assert stay.fit(moved).scale == stay.fit(plain).scale == stay.fit(reach).scale
    widest = StaticIntCodec(8, "channel", "minmax")
    scales = [torch.tensor(widest.fit(s).scale) for s in (plain, reach)]
    torch.testing.assert_close(scales[1], scales[0] * 5)


def test_means_are_taken_away_first():
    x = values() + 30 * torch.randn(HEADS, 1, WIDTH, generator=torch.Generator().manual_seed(5))
    for bits, axis in FORMATS:
        plain = StaticIntCodec(bits, axis).fit(CodecSamples(x))
        centred = StaticIntCodec(bits, axis, center=True).fit(CodecSamples(x))
        torch.testing.assert_close(centred.offsets(WIDTH)[:, 0], x.mean(1), rtol=1e-3, atol=1e-3)
        assert not centred.is_headwise
        errors = [float(round_trip(c, x).sub(x).square().sum()) for c in (plain, centred)]
        assert errors[1] < errors[0] / 20
        still = dataclasses.replace(centred, center=False, offset=None)
        mean = centred.offsets(WIDTH)
        moved = still.decode(centred.encode(x), x.dtype) + mean
        torch.testing.assert_close(round_trip(centred, x), moved)
        assert make_codec(centred.to_dict()) == centred


@pytest.mark.parametrize(("bits", "axis"), FORMATS)
def test_first_tokens_fall_on_a_code(bits, axis):
    x = values() + 2.0
    first = x.mean(1) + 0.3 * torch.randn(HEADS, WIDTH, generator=torch.Generator().manual_seed(3))
    codec = StaticIntCodec(bits, axis, center=True)
    there = codec.fit(CodecSamples(x, first=first))
    nowhere = codec.fit(CodecSamples(x))
    assert there.scale == nowhere.scale
    errors = [
        float((round_trip(c, first[:, None])[:, 0] - first).abs().max()) for c in (there, nowhere)
    ]
    assert errors[0] < 2e-3 < errors[1]
    moved = (there.offsets(WIDTH) - nowhere.offsets(WIDTH)).abs() / there.scales(WIDTH)
    assert 0.1 < float(moved.max()) < 0.51 + 2e-3 / there.scale[0]
    beyond = codec.fit(CodecSamples(x, first=first + 100))
    error = float((round_trip(beyond, first[:, None] + 100)[:, 0] - first - 100).abs().max())
    if axis == "channel":
        assert error < 0.1  # float16 of a mean near 100
    else:
        assert beyond.offset == nowhere.offset
        assert error > 90


def test_reach_of_keys_holds_around_their_means():
    x = values() + 2.0
    codec = StaticIntCodec(8, "channel", "minmax", center=True)
    fitted = codec.fit(CodecSamples(x, envelope=x.abs().amax(1)))
    both_ends = x.abs().amax(1, keepdim=True) * torch.tensor([1.0, -1.0]).view(1, 2, 1)
    steps = round_trip(fitted, both_ends).sub(both_ends).abs() / fitted.scales(WIDTH)
    assert float(steps.max()) <= 0.5 + 1e-4


def test_zeros_stay_zeros_and_given_scales_stay():
    zeros = torch.zeros(HEADS, 4, WIDTH)
    codec = StaticIntCodec(4, "channel").fit(CodecSamples(zeros))
    assert torch.equal(round_trip(codec, zeros), zeros)
    given = StaticIntCodec(8, scale=(0.5,))
    assert given.fit(CodecSamples(values())) is given


@pytest.mark.parametrize(("bits", "axis"), FORMATS)
def test_plain_data_and_planes(bits, axis):
    codec = StaticIntCodec(bits, axis).fit(CodecSamples(values()))
    assert make_codec(codec.to_dict()) == codec
    planes = codec.encode(values())
    for spec in codec.planes(WIDTH):
        assert planes[spec.name].shape == (HEADS, TOKENS, spec.width)
        assert planes[spec.name].dtype == spec.torch_dtype
    assert codec.bits_per_value(WIDTH) == bits
    assert codec.is_headwise == (axis == "tensor")
    half = values().half()
    assert torch.equal(round_trip(codec, half), round_trip(codec, half.float()).half())


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"bits": 3}, "bits must be 4 or 8"),
        ({"axis": "token"}, "axis must be tensor or channel"),
        ({"threshold": "max"}, "threshold must be minmax, percentile or mse"),
        ({"percentile": 40.0}, r"percentile must lie in \(50, 100\]"),
        ({"scale": (0.0,)}, "scale must be positive numbers"),
        ({"scale": ()}, "scale must be positive numbers"),
        ({"scale": (1.0, 2.0)}, "scale must be one number on the tensor axis"),
        ({"offset": (1.0,)}, "offset must come with center and scale"),
        ({"center": True, "offset": (1.0,)}, "offset must come with center and scale"),
        ({"center": True, "scale": (1.0,)}, "center needs an offset"),
    ],
)
def test_options_are_checked(options, rule):
    with pytest.raises(RecipeError, match=f"KVX107.*{rule}"):
        StaticIntCodec(**options)


def test_heads_that_do_not_fit_are_refused():
    StaticIntCodec(8).check(7)
    with pytest.raises(PassError, match="KVX203 4-bit codes need"):
        StaticIntCodec(4).check(7)
    with pytest.raises(PassError, match="KVX203 scale of codec static-int must be of heads of 8"):
        StaticIntCodec(8, "channel", scale=(1.0,) * 12).check(WIDTH)
    right = StaticIntCodec(8, "channel", scale=(1.0,) * 16)
    right.check_heads(2, WIDTH)
    with pytest.raises(PassError, match="KVX203 scale of codec static-int must have 4 x 8"):
        right.check_heads(4, WIDTH)
