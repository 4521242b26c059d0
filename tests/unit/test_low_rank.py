"""Codec low-rank-residual: how much of the error it takes back, and what that costs."""

from __future__ import annotations

import pytest
import torch

from kvxform.codecs.base import CodecSamples, make_codec
from kvxform.codecs.integer import IntCodec
from kvxform.codecs.low_rank import LowRankResidualCodec
from kvxform.codecs.outliers import OutliersCodec
from kvxform.errors import PassError, RecipeError

CHANNEL = IntCodec(2, "channel", 64, zero="float")


def coherent(*shape: int) -> torch.Tensor:
    """Return tokens whose quantisation error has a few strong directions."""
    generator = torch.Generator().manual_seed(0)
    *batch, width = shape
    strong = torch.randn(*batch, 4, generator=generator) @ torch.randn(
        4, width, generator=generator
    )
    return strong + torch.randn(*shape, generator=generator)


def error(codec, x: torch.Tensor) -> float:
    return float((codec.decode(codec.encode(x), torch.float64) - x).norm())


def test_the_error_falls_with_the_rank_down_to_rounding():
    x = coherent(3, 128, 32)
    errors = [error(LowRankResidualCodec(CHANNEL, rank), x) for rank in (1, 2, 4, 8, 16, 32)]
    assert [error(CHANNEL, x), *errors] == sorted([error(CHANNEL, x), *errors], reverse=True)
    assert errors[-1] < 2**-10 * float(x.norm())  # full rank is exact but for float16 factors


def test_subspace_iteration_is_nearly_the_best_product_of_its_rank():
    x = coherent(1, 64, 32)
    residual = x.double() - CHANNEL.decode(CHANNEL.encode(x), torch.float64)
    singular = torch.linalg.svdvals(residual[0])
    for rank in (1, 2, 4):
        best = float(singular[rank:].square().sum().sqrt())
        codec = LowRankResidualCodec(CHANNEL, rank)
        assert best * (1 - 1e-3) <= error(codec, x) <= 1.1 * best


def test_blocks_do_not_know_of_each_other():
    x = coherent(2, 256, 16)
    codec = LowRankResidualCodec(CHANNEL, 2)
    whole = codec.encode(x)
    first, second = codec.encode(x[:, :64]), codec.encode(x[:, 64:])
    for name, plane in whole.items():
        assert torch.equal(plane, torch.cat([first[name], second[name]], 1)), name


def test_what_has_no_error_gets_no_correction():
    x = torch.full((64, 8), 3.0)
    planes = LowRankResidualCodec(CHANNEL, 2).encode(x)
    assert not planes["low_rank_channels"].any()
    assert bool(LowRankResidualCodec(CHANNEL, 2).decode(planes, torch.float32).eq(x).all())


def test_all_three_parts_of_gear_lower_the_error():
    x = coherent(2, 128, 64)
    x[..., 3] *= 20
    x[:, 70, :] *= 5
    sparse = OutliersCodec(CHANNEL, axis="channel")
    parts = (CHANNEL, sparse, LowRankResidualCodec(sparse, 2), LowRankResidualCodec(sparse, 4))
    errors = [error(codec, x) for codec in parts]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.8 * errors[1] < 0.8 * 0.8 * errors[0]


@pytest.mark.parametrize(
    ("rank", "block", "head_dim", "extra"),
    [(2, 64, 128, 0.75), (4, 1024, 128, 0.5625), (2, 64, 64, 1.0), (2, 128, 64, 0.75)],
)
def test_bits_are_16_r_times_one_over_width_plus_one_over_block(rank, block, head_dim, extra):
    codec = LowRankResidualCodec(CHANNEL, rank, block)
    assert codec.bits_per_value(head_dim) == 2.5 + extra
    planes = codec.encode(torch.randn(2, block, head_dim))
    assert [s.name for s in codec.planes(head_dim)] == list(planes)
    for spec in codec.planes(head_dim):
        assert planes[spec.name].dtype == spec.torch_dtype
        assert planes[spec.name].shape == (2, block // spec.tokens_per_row, spec.width)


def test_blocks_hold_whole_groups():
    assert LowRankResidualCodec(CHANNEL, 2, 96).tokens_per_group == 192
    assert LowRankResidualCodec(IntCodec(4), 2, 20).tokens_per_group == 20


def test_plain_data_and_back():
    codec = LowRankResidualCodec(OutliersCodec(CHANNEL, 0.02, "channel"), 3)
    assert make_codec(codec.to_dict()) == codec
    assert codec.fit(CodecSamples(coherent(1, 8, 8))) is codec  # nothing in it is fitted


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "rank must"),
        ({"rank": 65}, "rank must"),
        ({"block": -1}, "block must"),
        ({"loops": 0.5}, "loops must"),
        ({"inner": {"codec": "low-rank-residual"}}, "inner must not"),
    ],
)
def test_bad_options_are_refused_by_name(options, words):
    with pytest.raises(RecipeError, match=rf"KVX107 \[codec low-rank-residual\] {words}"):
        make_codec({"codec": "low-rank-residual", **options})


def test_a_rank_beyond_head_dim_is_refused():
    with pytest.raises(PassError, match=r"KVX203.*at most head_dim 8; got 9"):
        LowRankResidualCodec(IntCodec(4), 9).check(8)
