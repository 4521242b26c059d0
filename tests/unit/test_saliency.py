"""Codec saliency: classes, ranks, planes, and what quantize-kv refuses."""

from __future__ import annotations

import pytest
import torch
from cached import cached_program
from hypothesis import given, settings
from hypothesis import strategies as st

from kvxform.codecs.base import CodecSamples, make_codec
from kvxform.codecs.exact import ExactCodec
from kvxform.codecs.integer import IntCodec
from kvxform.codecs.nuq import NuqCodec
from kvxform.codecs.saliency import SaliencyCodec
from kvxform.errors import PassError, RecipeError
from kvxform.passes.quantize.quantize_kv import QuantizeKv

HIGH, LOW = IntCodec(8, zero="float"), IntCodec(2, zero="float")


def decoded(codec, x, scores):
    return codec.decode(codec.encode_ranked(x, scores), torch.float32)


@settings(deadline=None, max_examples=15)
@given(
    share=st.sampled_from([0.125, 0.5, 0.875]),
    score=st.sampled_from(["mean", "sum"]),
    chunks=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_each_token_goes_through_the_codec_of_its_class(share, score, chunks, seed):
    generator = torch.Generator().manual_seed(seed)
    codec = SaliencyCodec(HIGH, LOW, share, 16, score, 0.1, 0.3)
    x = torch.randn(2, 3, 16 * chunks, 8, generator=generator)
    scores = torch.rand(2, 3, 16 * chunks, generator=generator)
    value = scores
    if score == "mean":
        seen = [sum(p >= i for p in codec.probes) for i in range(16)]
        value = scores / torch.tensor(seen).repeat(chunks)
    best = value.unflatten(-1, (chunks, 16)).topk(int(share * 16)).indices
    is_high = torch.zeros(2, 3, chunks, 16, dtype=torch.bool).scatter(-1, best, True).flatten(-2)
    high, low = (c.decode(c.encode(x), torch.float32) for c in (HIGH, LOW))
    expected = torch.where(is_high[..., None], high, low)
    torch.testing.assert_close(decoded(codec, x, scores), expected, rtol=0, atol=0)


def test_a_group_of_channels_is_a_class():
    high, low = (IntCodec(bits, "channel", 8, zero="float") for bits in (4, 2))
    codec = SaliencyCodec(high, low, 0.5, 16, "sum")
    x, scores = torch.randn(1, 32, 8), torch.arange(32.0)[None]
    for first in (0, 16):
        own = slice(first, first + 16)
        parts = [
            c.decode(c.encode(x[:, r]), torch.float32)
            for c, r in ((low, slice(first, first + 8)), (high, slice(first + 8, first + 16)))
        ]
        got = decoded(codec, x, scores)[:, own]
        torch.testing.assert_close(got, torch.cat(parts, 1), rtol=0, atol=0)


def test_with_the_same_codec_for_both_classes_ranks_do_not_matter():
    codec = SaliencyCodec(LOW, LOW, 0.25, 8, "sum")
    x = torch.randn(2, 24, 8)
    plain = LOW.decode(LOW.encode(x), torch.float32)
    assert torch.equal(decoded(codec, x, torch.rand(2, 24)), plain)


def test_normalised_scores_do_not_favour_early_tokens():
    """Where every query that sees a token pays it as much, means are flat and sums fall."""
    options = {"chunk": 64, "last": 1.0, "random": 0.0}
    mean, total = (SaliencyCodec(HIGH, LOW, score=score, **options) for score in ("mean", "sum"))
    generator = torch.Generator().manual_seed(0)
    received = torch.rand(400, 64, 64, generator=generator, dtype=torch.float64).tril().sum(-2)
    early = {
        codec.score: codec._choose(received)[:, :32].double().mean() for codec in (mean, total)
    }
    assert float(early["mean"]) == pytest.approx(0.5, abs=0.03)
    assert float(early["sum"]) > 0.9


def test_uniform_attention_still_falls_with_the_place_but_far_less_than_its_sum():
    uniform = torch.ones(64, 64).tril() / torch.arange(1, 65)[:, None]  # rows sum to one
    raw = uniform.sum(0)
    seen = torch.arange(64, 0, -1)
    assert float(raw[0] / raw[-1]) > 300 > 5 > float((raw / seen)[0] / (raw / seen)[-1])


def test_probes_are_the_end_of_the_chunk_and_some_fixed_places():
    codec = SaliencyCodec(chunk=128)
    assert codec.probes == SaliencyCodec(chunk=128).probes
    assert len(codec.probes) == 7 + 7
    assert codec.probes[-7:] == tuple(range(121, 128))
    assert len(set(codec.probes)) == 14
    assert SaliencyCodec(chunk=16, last=1.0, random=0.0).probes == tuple(range(16))


def test_spread_finds_tokens_that_are_out_of_range():
    x = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(0))
    x[0, 5] *= 40
    x[1, 60, 3] = -70
    low = IntCodec(2, "channel", 63, zero="float")
    codec = SaliencyCodec(HIGH, low, 1 / 64, 64, "spread")
    assert not codec.needs_queries
    y = codec.decode(codec.encode(x), torch.float32)
    every = IntCodec(2, "channel", 64, zero="float")
    plain = every.decode(every.encode(x), torch.float32)
    assert float((y - x).abs().max()) < 1.5 < 5 < float((plain - x).abs().max())
    assert float((y - x).square().mean()) < 0.1 * float((plain - x).square().mean())


def test_a_massive_token_stays_exact_and_costs_the_others_nothing():
    """RotateKV's exact tokens, wherever they are: other codes are as if it were not there."""
    x = torch.randn(2, 32, 8, generator=torch.Generator().manual_seed(0))
    places = [3, 16 + 11]
    x[:, places, 5] += 40
    x = x.half().float()
    low = IntCodec(2, "channel", 15, zero="int", clip=0.8)
    codec = SaliencyCodec(ExactCodec("float16"), low, 1 / 16, 16, "spread")
    y = codec.decode(codec.encode(x), torch.float32)
    assert torch.equal(y[:, places], x[:, places])
    others = [i for i in range(32) if i not in places]
    alone = low.decode(low.encode(x[:, others]), torch.float32)
    assert torch.equal(y[:, others], alone)


def test_separable_values_lose_less_where_channels_differ():
    tokens, channels = torch.rand(1, 16, 1) + 0.5, torch.rand(1, 1, 8) * 8 + 0.1
    signs = torch.randint(0, 2, (1, 16, 8)) * 2 - 1
    x = tokens * channels.square() * signs  # sqrt(max) of a channel takes half of its power away
    inner = IntCodec(2, symmetric=True)
    plain, separable = (
        SaliencyCodec(inner, inner, 0.5, 16, "spread", separable=s) for s in (False, True)
    )
    errors = [float((c.decode(c.encode(x), torch.float32) - x).norm()) for c in (plain, separable)]
    assert errors[1] < 0.7 * errors[0]
    flat = tokens * signs  # channels alike: their common factor cancels
    torch.testing.assert_close(
        separable.decode(separable.encode(flat), torch.float32), flat, rtol=2e-3, atol=1e-3
    )


@pytest.mark.parametrize("separable", [False, True])
def test_bits_are_those_of_both_classes_and_one_a_token(separable):
    high = IntCodec(4, "channel", 80, zero="float")
    low = IntCodec(2, "channel", 48, zero="float")
    codec = SaliencyCodec(high, low, 0.625, 128, "spread", separable=separable)
    # (80 (4 + 32 / 80) + 48 (2 + 32 / 48)) / 128, and one bit a token of 64 channels
    bits = 3.25 + 0.5 + 1 / 64 + (16 / 128 if separable else 0)
    assert codec.bits_per_value(64) == pytest.approx(bits, abs=1e-12)
    planes = codec.encode(torch.randn(2, 256, 64))
    assert [s.name for s in codec.planes(64)] == list(planes)
    for spec in codec.planes(64):
        assert planes[spec.name].dtype == spec.torch_dtype
        assert planes[spec.name].shape == (2, 256 // spec.tokens_per_row, spec.width)


def test_both_codecs_are_fitted():
    x = torch.randn(2, 256, 16)
    nuq = NuqCodec(2, "token")
    fitted = SaliencyCodec(nuq, nuq, 0.5, 16, "spread").fit(CodecSamples(x))
    assert not fitted.needs_calibration
    assert make_codec(fitted.to_dict()) == fitted
    assert SaliencyCodec().fit(CodecSamples(x)) == SaliencyCodec()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"chunk": 12}, "chunk must"),
        ({"share": 1.0}, "share must"),
        ({"score": "h2o"}, "score must"),
        ({"last": 0.0}, "last and random must"),
        ({"last": 0.8, "random": 0.3}, "last and random must"),
        ({"high": 4}, "high must be a codec"),
        ({"low": {"codec": "int", "across_heads": True}}, "low must encode heads"),
        ({"high": {"codec": "saliency"}}, "high must encode heads"),
        ({"high": {"codec": "int", "axis": "channel"}, "share": 0.3}, "the 38 tokens of high"),
        ({"share": 0.001}, "the 0 tokens of high"),
    ],
)
def test_bad_options_are_refused_by_name(options, words):
    with pytest.raises(RecipeError, match=rf"KVX107 \[codec saliency\] {words}"):
        make_codec({"codec": "saliency", **options})


def test_a_head_dim_that_does_not_fit_is_refused():
    with pytest.raises(PassError, match=r"KVX203.*multiple of 4; got 6"):
        SaliencyCodec().check(6)


RANKED = {"codec": "saliency", "chunk": 16}


def test_scores_of_waiting_tokens_are_planned():
    program = cached_program({"key": RANKED, "value": RANKED, "regions": {"sink": 2}})
    key = program.plan.site(0).key
    assert (key.score_bytes, key.recent_capacity) == (4, 15)
    assert key.exact_bytes() == (2 + 15) * 16 * 2 + 15 * 4
    spread = {**RANKED, "score": "spread"}
    assert cached_program({"key": spread}).plan.site(0).key.score_bytes == 0


@pytest.mark.parametrize(
    "options",
    [
        {"key": RANKED, "value": {"codec": "int"}},
        {"key": {"codec": "int"}, "value": RANKED},
        {"key": RANKED, "value": None},
        {"key": RANKED, "value": {**RANKED, "share": 0.25}},
        {"key": RANKED, "value": {**RANKED, "chunk": 8}},
        {"key": RANKED, "value": RANKED, "key_regions": {"sink": 4}},
        {"key": RANKED, "value": {**RANKED, "score": "spread"}},
    ],
)
def test_keys_and_values_are_ranked_alike_or_refused(options):
    with pytest.raises(PassError, match=r"KVX205 \[quantize-kv\].*equal chunks, probes"):
        QuantizeKv(**options).match(cached_program())
