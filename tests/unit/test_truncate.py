"""Codec truncate: which channels are stored, planes of joined heads, fitting, refusals."""

from __future__ import annotations

import pytest
import torch
from distortion import check_planes
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_codecs import check_codec, check_empty

from kvxform.codecs.base import CodecSamples, make_codec
from kvxform.codecs.exact import ExactCodec
from kvxform.codecs.integer import IntCodec
from kvxform.codecs.truncate import TruncateCodec
from kvxform.errors import PassError, RecipeError

INNER = [ExactCodec("float32"), IntCodec(4), IntCodec(2, axis="channel", group=4), IntCodec(8)]


def codec_of(rank: int, heads: int, inner=INNER[0]) -> TruncateCodec:
    return TruncateCodec(rank, 8, heads, inner)


@settings(deadline=None, max_examples=25)
@given(
    heads=st.sampled_from([1, 2, 3]),
    groups=st.integers(1, 3),
    blocks=st.integers(1, 6),
    inner=st.sampled_from(INNER),
)
def test_it_stores_the_first_channels_of_joined_heads(heads, groups, blocks, inner):
    rank = min(4 * blocks, 8 * heads)
    codec, x = codec_of(rank, heads, inner), torch.randn(2, heads * groups, 8, 8)
    planes = codec.encode(x)
    assert {plane.shape[1] for plane in planes.values()} == {groups}
    check_planes(codec, x)
    decoded = codec.decode(planes, torch.float32)
    for group in range(groups):
        own = x[:, group * heads : (group + 1) * heads]
        vectors = torch.cat(own.unbind(1), -1)[..., :rank]  # [B, T, rank]
        stored = inner.decode(inner.encode(vectors), torch.float32)
        back = torch.cat(decoded[:, group * heads : (group + 1) * heads].unbind(1), -1)
        torch.testing.assert_close(back[..., :rank], stored, rtol=0, atol=0)
        assert not back[..., rank:].any()


@pytest.mark.parametrize("heads", [1, 2])
def test_what_is_left_out_comes_back_as_it_is_told(heads):
    groups = 4 // heads
    fill = torch.randn(groups, 8 * heads - 4)
    codec = TruncateCodec(4, 8, heads, INNER[0], tuple(map(tuple, fill.tolist())))
    x = torch.randn(2, 4, 8, 8)
    back = codec.decode(codec.encode(x), torch.float32)
    for group in range(groups):
        own = slice(group * heads, (group + 1) * heads)
        joined, given = (torch.cat(y[:, own].unbind(1), -1) for y in (back, x))
        assert torch.equal(joined[..., :4], given[..., :4])
        assert torch.equal(joined[..., 4:], fill[group].expand(2, 8, -1))
    assert not codec.is_headwise
    assert make_codec(codec.to_dict()) == codec
    check_codec(codec, x)
    check_empty(codec, 8, 4)


@pytest.mark.parametrize("heads", [1, 3])
def test_bytes_are_those_of_the_rank(heads):
    full, part = (codec_of(rank, heads, ExactCodec("float16")) for rank in (8 * heads, 4))
    assert full.bits_per_value(8, 6) == 16
    assert part.bits_per_value(8, 6) == pytest.approx(16 * 4 / (8 * heads))
    int4 = TruncateCodec(32, 64, 1, IntCodec(4))
    assert int4.bits_per_value(64) == (32 * 4 + 32) / 64


@pytest.mark.parametrize(
    ("rank", "heads"), [(4, 1), (8, 1), (4, 3), (12, 3), (16, 3), (20, 3), (24, 3)]
)
def test_onnx_encodes_and_decodes_alike(rank, heads):
    for inner in (INNER[0], IntCodec(4), IntCodec(2, axis="channel", group=4)):
        codec = codec_of(rank, heads, inner)
        check_codec(codec, torch.randn(2, 6, 8, 8))
        check_empty(codec, 8, 6)


def test_the_inner_codec_is_fitted_on_what_is_stored():
    codec = codec_of(4, 2, IntCodec(2, clip="fit"))
    x = torch.randn(4, 64, 8)
    x[1::2] = 1e4  # left out
    fitted = codec.fit(CodecSamples(x, torch.ones_like(x), torch.ones(4, 8)))
    assert fitted.inner == IntCodec(2, clip="fit").fit(CodecSamples(x[::2, :, :4]))
    assert codec.needs_calibration
    assert not fitted.needs_calibration


def test_it_is_plain_data():
    codec = codec_of(4, 2, IntCodec(4))
    assert make_codec(codec.to_dict()) == codec
    assert not codec.is_headwise
    assert codec_of(4, 1).is_headwise


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"rank": 0}, "rank must be a positive"),
        ({"heads": 0}, "heads must be a positive"),
        ({"rank": 17, "heads": 2}, "at most the 16 channels"),
        ({"fill": ((0.0,) * 3,)}, "fill must have 4 numbers"),
        ({"inner": "int"}, "takes each head alone"),
        ({"inner": IntCodec(4, across_heads=True)}, "takes each head alone"),
    ],
)
def test_bad_options_are_refused(options, rule):
    with pytest.raises(RecipeError, match=rule):
        TruncateCodec(**{"rank": 4, "head_dim": 8, **options})


def test_vectors_that_do_not_fit_are_refused():
    with pytest.raises(PassError, match="head_dim of 16"):
        codec_of(4, 1).check(16)
    with pytest.raises(PassError, match="multiple of 2"):
        codec_of(5, 1, IntCodec(4)).check(8)
