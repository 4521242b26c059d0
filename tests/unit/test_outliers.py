"""Codec outliers: what is exact, what the inner codec sees, bits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvxform.codecs.base import CodecSamples, make_codec
from kvxform.codecs.integer import IntCodec
from kvxform.codecs.nuq import NuqCodec
from kvxform.codecs.outliers import OutliersCodec
from kvxform.errors import PassError, RecipeError

TOKEN = IntCodec(2, zero="float")
CHANNEL = IntCodec(2, "channel", 32, zero="float")


def heavy(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return values with some far out, all of them float16 numbers."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    far = torch.rand(*shape, generator=generator) < 0.02
    return torch.where(far, x * 30, x).half().float()


def defined(codec: OutliersCodec, x: torch.Tensor) -> torch.Tensor:
    """Return what decodes from `x` `[T, D]`, vector by vector."""
    vectors = x if codec.axis == "token" else x.unflatten(0, (-1, codec.group)).transpose(1, 2)
    kept, filled = torch.zeros_like(vectors, dtype=torch.bool), vectors.clone()
    for place in torch.cartesian_prod(*(torch.arange(n) for n in vectors.shape[:-1])).tolist():
        index = tuple(place) if isinstance(place, list) else (place,)
        vector = vectors[index]
        if codec.pick == "extremes":
            side = math.ceil(codec.share / 2 * len(vector))
            chosen = [*vector.topk(side).indices, *vector.topk(side, largest=False).indices]
        else:
            count = math.ceil(codec.share * len(vector))
            distance = (vector - vector.median()).abs()
            chosen = distance.argsort(descending=True, stable=True)[:count]  # the first of equals
        kept[index][[int(i) for i in chosen]] = True
        filled[index][kept[index]] = vector[~kept[index]].mean()
    if codec.axis == "channel":
        kept, filled = (t.transpose(1, 2).flatten(0, 1) for t in (kept, filled))
    rest = codec.inner.decode(codec.inner.encode(filled), torch.float32)
    return torch.where(kept, x, rest)


@settings(deadline=None, max_examples=8)
@given(
    axis=st.sampled_from(["token", "channel"]),
    pick=st.sampled_from(["extremes", "deviation"]),
    share=st.sampled_from([0.001, 0.02, 0.1]),
    seed=st.integers(0, 99),
)
def test_outliers_are_exact_and_the_rest_is_coded_without_them(axis, pick, share, seed):
    inner, group = (TOKEN, None) if axis == "token" else (CHANNEL, 32)
    codec = OutliersCodec(inner, share, axis, group, pick)
    x = heavy(64, 16, seed=seed)
    decoded = codec.decode(codec.encode(x), torch.float32)
    torch.testing.assert_close(decoded, defined(codec, x), rtol=0, atol=1e-5)
    assert float((decoded == x).float().mean()) >= share


def test_more_outliers_never_cost_accuracy():
    x = heavy(4, 256, 32)
    for codec in (OutliersCodec(TOKEN), OutliersCodec(CHANNEL, axis="channel")):
        errors = []
        for share in (0.02, 0.1, 0.2, 0.4):
            wider = OutliersCodec(codec.inner, share, codec.axis)
            error = wider.decode(wider.encode(x), torch.float64) - x
            errors.append(float(error.norm()))
        plain = codec.inner.decode(codec.inner.encode(x), torch.float64) - x
        assert [float(plain.norm()), *errors] == sorted([*errors, float(plain.norm())])[::-1]


@pytest.mark.parametrize(
    ("options", "head_dim", "bits"),
    [
        # 2 of 64 elements of a token, 24 bits each, beside 2 + 32 / 64
        ({"inner": TOKEN, "share": 0.02}, 64, 2.5 + 2 * 24 / 64),
        ({"inner": TOKEN, "share": 0.01, "pick": "deviation"}, 64, 2.5 + 24 / 64),
        # ceil(0.01 * 32) on either side of a run of 32 tokens: never more than the run holds
        ({"inner": CHANNEL, "share": 0.02, "axis": "channel"}, 64, 3.0 + 2 * 24 / 32),
        (
            {"inner": CHANNEL, "share": 0.02, "axis": "channel", "group": 128},
            16,
            3.0 + 4 * 24 / 128,
        ),
    ],
)
def test_bits_count_values_and_indices_and_match_real_planes(options, head_dim, bits):
    codec = OutliersCodec(**options)
    assert codec.bits_per_value(head_dim) == bits
    planes = codec.encode(torch.randn(2, 128, head_dim))
    assert [s.name for s in codec.planes(head_dim)] == list(planes)
    for spec in codec.planes(head_dim):
        assert planes[spec.name].dtype == spec.torch_dtype
        assert planes[spec.name].shape == (2, 128 // spec.tokens_per_row, spec.width)


def test_groups_of_both_codecs_are_flushed_whole():
    assert OutliersCodec(CHANNEL, axis="channel", group=48).tokens_per_group == 96
    assert OutliersCodec(CHANNEL).tokens_per_group == 32
    assert OutliersCodec(CHANNEL, axis="channel").group is None  # that of the inner codec


def test_equal_values_choose_the_first():
    x = torch.ones(1, 8)
    index = OutliersCodec(TOKEN, 0.2, pick="deviation").encode(x)["outlier_index"]
    assert index.tolist() == [[0, 1]]


def test_an_inner_codec_with_ranges_says_what_lies_out():
    center, width = ((0.0, 100.0),), ((1.0, 50.0),)
    inner = NuqCodec(8, levels="normal", center=center, width=width)
    x = torch.tensor([[[0.5, 149.0], [3.0, 149.0], [0.5, 151.0]]])
    index = OutliersCodec(inner, 0.5, pick="deviation").encode(x)["outlier_index"]
    assert index.flatten().tolist() == [1, 0, 1]  # 0.98 > 0.5, 3 > 0.98, 1.02 > 0.5


def test_fitting_passes_on_what_is_left():
    x = heavy(2, 512, 16)
    codec = OutliersCodec(NuqCodec(2, "token"), 0.1, pick="deviation")
    fitted = codec.fit(CodecSamples(x))
    assert (codec.needs_calibration, codec.needs_fisher) == (True, True)
    assert not fitted.needs_calibration
    assert fitted.inner.table != NuqCodec(2, "token").fit(CodecSamples(x)).table
    assert make_codec(fitted.to_dict()) == fitted


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"share": 0.0}, "share must"),
        ({"share": 1.0}, "share must"),
        ({"axis": "head"}, "axis must"),
        ({"pick": "largest"}, "pick must"),
        ({"group": 32}, "group must"),
        ({"axis": "channel", "group": 512}, "group must"),
        ({"axis": "channel"}, "group must"),
        ({"inner": {"codec": "outliers"}}, "inner must not"),
        ({"inner": 4}, "inner must be a codec"),
    ],
)
def test_bad_options_are_refused_by_name(options, words):
    with pytest.raises(RecipeError, match=rf"KVX107 \[codec outliers\] {words}"):
        make_codec({"codec": "outliers", **options})


@pytest.mark.parametrize(
    ("options", "head_dim", "words"),
    [
        ({}, 288, "at most 256 elements"),
        ({"share": 0.99, "pick": "deviation"}, 16, "16 would be"),
        ({"inner": {"codec": "int", "bits": 3}}, 60, "multiple of 8"),
    ],
)
def test_a_head_dim_that_does_not_fit_is_refused(options, head_dim, words):
    with pytest.raises(PassError, match=f"KVX203.*{words}"):
        make_codec({"codec": "outliers", **options}).check(head_dim)
