"""Codec slerp-pair: directions between two layers, norms of both, tokens that stay as they are."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvxform.codecs.base import make_codec
from kvxform.codecs.slerp_pair import SlerpPairCodec
from kvxform.errors import PassError, RecipeError


def codec(kept: int = 0, dtype: str = "float64", **options) -> SlerpPairCodec:
    return SlerpPairCodec(key_dim=4, chunk=8, kept=kept, dtype=dtype, **options)


def pairs(tokens: int = 16, value_dim: int = 6, seed: int = 0) -> tuple[Tensor, ...]:
    """Return K_a, V_a, K_b, V_b of two heads."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, tokens, width) for width in (4, value_dim) * 2)
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)


def round_trip(which: SlerpPairCodec, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    whole = torch.cat(parts, -1)
    return which.decode(which.encode(whole), torch.float64).split([p.shape[-1] for p in parts], -1)


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Return the direction between two vectors, by turning one in the plane of both."""
    a, b = a / a.norm(), b / b.norm()
    angle = math.acos(float(a @ b))
    beside = b - (a @ b) * a
    return math.cos(t * angle) * a + math.sin(t * angle) * beside / beside.norm()


@pytest.mark.parametrize("t", [0.0, 0.3, 0.6, 1.0])
def test_both_layers_point_between_their_directions_and_keep_their_norms(t):
    parts = pairs()
    decoded = round_trip(codec(t=t), parts)
    for stream in (0, 1):
        below, above = parts[stream], parts[stream + 2]
        for head, token in ((0, 0), (1, 7), (1, 15)):
            between = slerp(below[head, token], above[head, token], t)
            for layer in (stream, stream + 2):
                norm = parts[layer][head, token].norm()
                torch.testing.assert_close(decoded[layer][head, token], norm * between)


@given(st.integers(1, 5), st.integers(1, 7), st.integers(0, 8), st.floats(0, 1))
@settings(max_examples=25, deadline=None)
def test_equal_layers_are_exact_and_norms_stay(chunks, value_dim, kept, t):
    parts = pairs(8 * chunks, value_dim)
    which = codec(kept, t=t)
    same = (*parts[:2], 3 * parts[0], 0.5 * parts[1])  # one direction, two norms
    for got, wanted in zip(round_trip(which, same), same, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    for got, wanted in zip(round_trip(which, parts), parts, strict=True):
        torch.testing.assert_close(got.norm(dim=-1), wanted.norm(dim=-1))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_the_tokens_that_differ_most_stay_bit_for_bit(dtype):
    rounded = tuple(p.to(getattr(torch, dtype)).double() for p in pairs())
    decoded = round_trip(codec(3, dtype), rounded)
    angles = torch.arccos(torch.cosine_similarity(rounded[0], rounded[2], dim=-1))  # K decides
    for head in range(2):
        for first in (0, 8):
            order = angles[head, first : first + 8].argsort(descending=True) + first
            for token in order[:3].tolist():
                assert all(
                    torch.equal(got[head, token], wanted[head, token])
                    for got, wanted in zip(decoded, rounded, strict=True)
                )
            for token in order[3:].tolist():
                assert not torch.equal(decoded[0][head, token], rounded[0][head, token])


def test_all_kept_is_the_identity_and_none_kept_has_no_planes():
    parts = pairs()
    for got, wanted in zip(round_trip(codec(8), parts), parts, strict=True):
        assert torch.equal(got, wanted)
    assert [p.name for p in codec(0).planes(20)] == ["direction", "norm"]


def test_opposed_and_empty_vectors_give_numbers():
    k, v, *_ = pairs()
    for t in (0.5, 0.6):
        for got in round_trip(codec(t=t), (k, v, -k, -v)):
            assert torch.isfinite(got).all()
        decoded = round_trip(codec(t=t), (k, 0 * v, -k, 0 * v))
        torch.testing.assert_close(decoded[0].norm(dim=-1), k.norm(dim=-1))
        assert not decoded[1].any()
        assert not decoded[3].any()


def test_bytes_are_half_and_what_is_kept():
    which = SlerpPairCodec(64, chunk=64, kept=3)
    wanted = 2 * 128 + 2 * 4 + 3 * (2 * 128 + 1) / 64
    assert sum(p.bytes_per_token(1) for p in which.planes(256)) == wanted
    assert which.bits_per_value(256) == pytest.approx(8.63, abs=0.01)  # of 16


def test_plain_data_and_refusals():
    assert make_codec(codec(3).to_dict()) == codec(3)
    for options in ({"chunk": 0}, {"chunk": 257}, {"kept": 65}, {"t": 1.5}):
        with pytest.raises(RecipeError, match="KVX107"):
            SlerpPairCodec(4, **options)
    for width in (8, 21):
        with pytest.raises(PassError, match="KVX203"):
            codec().check(width)
