"""Folded reads equal decode-then-multiply in float64, for both axes, groups and grouped heads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvxform.codecs.folded import folded_scores, folded_values
from kvxform.codecs.integer import IntCodec

CODECS = [
    IntCodec(bits, axis, group, symmetric, zero)
    for bits, axis, group, symmetric, zero in [
        (4, "token", None, False, "int"),
        (4, "token", 8, False, "float"),
        (3, "token", 8, True, "int"),
        (2, "channel", 4, False, "float"),
        (4, "channel", 8, False, "int"),
        (8, "channel", 4, True, "int"),
    ]
]


@settings(deadline=None, max_examples=60)
@given(
    codec=st.sampled_from(CODECS),
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    queries=st.integers(1, 3),
    tokens=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_folded_reads_equal_decoding_first(codec, batch, kv_heads, groups, queries, tokens, seed):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = randn(batch, kv_heads, 8 * tokens, 16) + 0.5
    q = randn(batch, kv_heads * groups, queries, 16)
    planes = codec.encode(x)
    decoded = codec.decode(planes, torch.float64).repeat_interleave(groups, 1)
    form = codec.affine(planes, torch.float64)

    scores = folded_scores(q, form)
    torch.testing.assert_close(scores, q @ decoded.mT, rtol=0, atol=1e-12)

    p = torch.softmax(scores, -1)
    torch.testing.assert_close(folded_values(p, form), p @ decoded, rtol=0, atol=1e-12)


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_folding_uses_scale_and_offset(codec):
    x = torch.randn(1, 2, 8, 16, dtype=torch.float64)
    q = torch.randn(1, 4, 1, 16, dtype=torch.float64)
    form = codec.affine(codec.encode(x), torch.float64)
    bare = q @ form.codes.repeat_interleave(2, 1).mT
    assert float((folded_scores(q, form) - bare).abs().max()) > 0.1
