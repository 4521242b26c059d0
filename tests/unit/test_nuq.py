"""Codec nuq and the k-means behind it: tables, ranges, weights, bits."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kvxform.codecs.base import CodecSamples, make_codec
from kvxform.codecs.kmeans import weighted_kmeans
from kvxform.codecs.nuq import NuqCodec, normal_levels
from kvxform.codecs.outliers import OutliersCodec
from kvxform.errors import PassError, RecipeError

HEADS, TOKENS, WIDTH = 2, 512, 16
# QLoRA, arXiv 2305.14314, appendix E, to four digits
NF4 = (
    *(-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0),
    *(0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0),
)


def samples(seed: int = 0, **more) -> CodecSamples:
    """Return channels of different means and spreads, with some values far out."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(HEADS, TOKENS, WIDTH, generator=generator)
    x = x * torch.linspace(0.2, 3, WIDTH) + torch.linspace(-4, 4, WIDTH)
    x[:, ::97] += 20
    return CodecSamples(x, **more)


def round_trip(codec, x):
    return codec.decode(codec.encode(x), torch.float64)


def squared_error(levels, x, weights):
    nearest = (x[:, None] - levels).square().amin(1)
    return float((weights * nearest).sum())


def test_kmeans_ends_where_no_level_can_move():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, generator=generator, dtype=torch.float64)
    weights = torch.rand(500, generator=generator, dtype=torch.float64)
    levels = weighted_kmeans(x, weights, 8)
    nearest = (x[:, None] - levels).abs().argmin(1)
    for i, level in enumerate(levels):
        own = nearest == i
        torch.testing.assert_close((weights * x)[own].sum() / weights[own].sum(), level)
    assert torch.equal(levels, levels.sort().values)
    uniform = torch.linspace(float(x.min()), float(x.max()), 8, dtype=torch.float64)
    assert squared_error(levels, x, weights) <= squared_error(uniform, x, weights)


def test_kmeans_of_a_normal_distribution_is_the_lloyd_max_quantiser():
    x = torch.randn(1 << 18, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    levels = weighted_kmeans(x, torch.ones_like(x), 4)
    torch.testing.assert_close(
        levels, torch.tensor([-1.510, -0.4528, 0.4528, 1.510]).double(), rtol=0, atol=0.02
    )
    assert squared_error(levels, x, 1 / len(x) * torch.ones_like(x)) == pytest.approx(
        0.1175, rel=0.02
    )


def test_kmeans_follows_the_weights_and_survives_few_values():
    x = torch.tensor([0.0, 1.0, 2.0, 10.0])
    assert weighted_kmeans(x, torch.tensor([1.0, 1.0, 1.0, 0.0]), 3).tolist()[:2] == [0.0, 1.0]
    assert weighted_kmeans(x, torch.zeros(4), 4).tolist() == [0.0, 1.0, 2.0, 10.0]
    assert weighted_kmeans(torch.ones(3), torch.ones(3), 4).unique().tolist() == [1.0]


def test_normal_levels_of_four_bits_are_nf4():
    torch.testing.assert_close(
        normal_levels(4), torch.tensor(NF4, dtype=torch.float64), rtol=0, atol=1e-4
    )
    for bits in (2, 3, 8):
        levels = normal_levels(bits)
        assert len(levels.unique()) == 2**bits
        assert (float(levels[0]), float(levels[-1])) == (-1.0, 1.0)
        assert 0.0 in levels.tolist()


def test_static_ranges_are_percentiles_of_each_channel():
    given = samples()
    fitted = NuqCodec(3, keep=0.9).fit(given)
    center, width = torch.tensor(fitted.center), torch.tensor(fitted.width)
    low, high = (given.x.quantile(share, 1) for share in (0.05, 0.95))
    torch.testing.assert_close(center - width, low, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(center + width, high, rtol=1e-5, atol=1e-5)
    assert [p.name for p in fitted.planes(WIDTH)] == ["codes"]
    assert fitted.bits_per_value(WIDTH) == 3
    assert not fitted.is_headwise


def test_the_table_lowers_the_weighted_error_below_that_of_equal_steps():
    given = samples()
    weights = torch.rand(given.x.shape, generator=torch.Generator().manual_seed(1)) ** 4
    for bits in (2, 3, 4):
        fitted = NuqCodec(bits).fit(dataclasses.replace(given, weights=weights))
        spread = tuple(torch.linspace(-1, 1, 2**bits).tolist())
        uniform = dataclasses.replace(fitted, table=spread, values=spread)
        inside = fitted.deviation(given.x) <= 1
        errors = [
            float((weights * (round_trip(codec, given.x) - given.x).square())[inside].sum())
            for codec in (fitted, uniform)
        ]
        assert errors[0] < errors[1]


def test_equal_gradients_and_widths_are_plain_kmeans():
    x = torch.randn(1, 2048, 1, generator=torch.Generator().manual_seed(0))
    fitted = NuqCodec(2, keep=1.0).fit(CodecSamples(x, torch.full_like(x, 3.0)))
    u = ((x.double() - fitted.center[0][0]) / fitted.width[0][0]).flatten()
    plain = weighted_kmeans(u, torch.ones_like(u), 4)
    torch.testing.assert_close(torch.tensor(fitted.table).double(), plain, rtol=0, atol=1e-5)
    assert fitted == NuqCodec(2, keep=1.0).fit(CodecSamples(x))


def test_gradients_move_the_table():
    given = samples()
    small = torch.where(given.x > given.x.median(1, keepdim=True).values, 100.0, 0.01)
    plain, weighted = (NuqCodec(2).fit(CodecSamples(given.x, w)) for w in (None, small))
    assert plain.center == weighted.center
    assert sum(weighted.table) > sum(plain.table) + 0.1  # levels crowd where errors count


def test_q_norm_restores_mean_and_deviation():
    x = torch.randn(1, 4096, 8, generator=torch.Generator().manual_seed(0)) * 2 + 1
    plain, normed = (NuqCodec(2, keep=1.0, q_norm=q).fit(CodecSamples(x)) for q in (False, True))
    assert plain.table == normed.table == plain.values
    y = round_trip(normed, x)
    assert float(round_trip(plain, x).std()) < 0.97 * float(x.std())
    assert float(y.std()) == pytest.approx(float(x.std()), rel=1e-2)
    assert float(y.mean()) == pytest.approx(float(x.mean()), abs=2e-2)


def test_outliers_beyond_static_ranges_are_exact():
    given = samples()
    x = given.x.half().float()
    codec = OutliersCodec(NuqCodec(4), 0.06, pick="deviation").fit(given)
    y = codec.decode(codec.encode(x), torch.float32)
    outer = codec.inner.deviation(x)
    worst = outer.argmax(-1, keepdim=True)
    assert torch.equal(y.gather(-1, worst), x.gather(-1, worst))
    plain = round_trip(codec.inner, x)
    assert float((plain - x)[:, ::97].abs().max()) > 3  # cut off
    assert codec.bits_per_value(WIDTH, HEADS) == 4 + 24 / 16


@pytest.mark.parametrize(
    "options",
    [
        {"axis": "token"},
        {"axis": "token", "across_heads": True},
        {"axis": "channel", "group": 32},
    ],
)
def test_stored_ranges_span_their_values(options):
    codec = NuqCodec(8, levels="normal", **options)
    assert not codec.needs_calibration
    x = samples().x
    planes = codec.encode(x)
    for spec in codec.planes(WIDTH):
        rows = TOKENS // spec.tokens_per_row
        assert planes[spec.name].shape == (spec.heads(HEADS), rows, spec.width)
    axes = {"token": -1, "channel": -2}[codec.axis]
    groups = x if codec.axis == "token" else x.unflatten(1, (-1, 32))
    spread = groups.amax(axes) - groups.amin(axes)
    widest = spread.amax(0, keepdim=True) if codec.across_heads else spread
    scale = planes["scale"].float() if codec.axis == "channel" else planes["scale"][..., 0].float()
    assert bool((2 * scale >= widest * (1 - 2**-9)).all())
    step = float(normal_levels(8).diff().max()) * scale
    step = step[..., None] if codec.axis == "token" else step.repeat_interleave(32, 1)
    assert bool(((round_trip(codec, x) - x).abs() <= 0.51 * step).all())


def test_a_constant_group_decodes_to_its_value():
    x = torch.full((HEADS, 64, WIDTH), -3.25)
    for codec in (NuqCodec(4, "token", levels="normal"), NuqCodec(2, group=32, levels="normal")):
        torch.testing.assert_close(round_trip(codec, x), x.double(), rtol=0, atol=1e-6)
    static = NuqCodec(4).fit(CodecSamples(x))
    torch.testing.assert_close(round_trip(static, x), x.double(), rtol=0, atol=1e-6)


def test_ranges_for_any_position_contain_the_envelope():
    given = samples()
    envelope = given.x.abs().amax(1) * 2
    plain = NuqCodec(4, keep=1.0).fit(given)
    wide = NuqCodec(4, keep=1.0, any_position=True).fit(
        dataclasses.replace(given, envelope=envelope)
    )
    reach = torch.tensor(wide.width) - torch.tensor(wide.center).abs()
    torch.testing.assert_close(reach, envelope, rtol=1e-4, atol=1e-4)
    assert bool((torch.tensor(wide.width) >= torch.tensor(plain.width)).all())
    assert NuqCodec(4, keep=1.0, any_position=True).fit(given).width == plain.width  # no envelope


@pytest.mark.parametrize("codec", [NuqCodec(3), NuqCodec(4, "token"), NuqCodec(2, group=32)])
def test_plain_data_and_back(codec):
    assert codec.needs_calibration
    assert codec.needs_fisher
    fitted = codec.fit(samples())
    assert not fitted.needs_calibration
    assert make_codec(fitted.to_dict()) == fitted
    assert fitted.planes(WIDTH) == codec.planes(WIDTH)
    assert fitted.fit(samples(1)) is fitted


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 5}, "bits must"),
        ({"axis": "head"}, "axis must"),
        ({"levels": "uniform"}, "levels must"),
        ({"keep": 0.2}, "keep must"),
        ({"group": 0}, "group must"),
        ({"group": 8, "axis": "token"}, "group must"),
        ({"across_heads": True}, "across_heads must"),
        ({"any_position": True, "axis": "token"}, "any_position must"),
        ({"bits": 2, "table": [0.0, 1.0]}, "table must have 4 levels"),
    ],
)
def test_bad_options_are_refused_by_name(options, words):
    with pytest.raises(RecipeError, match=rf"KVX107 \[codec nuq\] {words}"):
        make_codec({"codec": "nuq", **options})


def test_a_head_dim_that_does_not_fit_is_refused():
    with pytest.raises(PassError, match=r"KVX203.*multiple of 8; got 12"):
        NuqCodec(3).check(12)
    with pytest.raises(PassError, match=r"KVX203.*fitted on a head_dim of 32; got 16"):
        NuqCodec(4).fit(samples()).check(32)
