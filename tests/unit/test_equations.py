"""The equations of the checker, against loops over single tokens and the dialect's attention."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvxform.ir.ops as kvx
from kvxform.codecs.base import make_codec
from kvxform.ir.scoring import Scoring
from kvxform.ir.stream_plan import Regions, StreamPlan
from kvxform.verify.equations import attend, two_copies


def make_stream(spec: dict, regions: Regions, head_dim: int = 16) -> StreamPlan:
    codec = make_codec(spec)
    return StreamPlan(
        codec.to_dict(), codec.planes(head_dim), codec.tokens_per_group, head_dim, regions=regions
    )


EXACT = make_stream({"codec": "none", "dtype": "float64"}, Regions())


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(1, 40),
    sink=st.integers(0, 5),
    recent=st.sampled_from([0, 8, 16]),
    flush=st.sampled_from(["sliding", "block"]),
    axis=st.sampled_from(["token", "channel"]),
)
def test_a_token_is_encoded_exactly_when_the_rule_says(tokens, sink, recent, flush, axis):
    group = {"group": 8} if axis == "channel" else {}
    stream = make_stream(
        {"codec": "int", "bits": 4, "axis": axis, **group}, Regions(sink, recent, flush)
    )
    x = torch.randn(2, tokens, 16, dtype=torch.float64)
    copies = two_copies(stream, x)
    codec, size = make_codec(stream.codec), stream.tokens_per_group
    buffered = x.half().double() if sink or stream.recent_capacity else x
    source = buffered if stream.recent_capacity else x
    for t in range(tokens):
        body = stream.body_tokens(t + 1)
        for j in range(tokens):
            assert bool(copies.is_encoded[t, j]) == (sink <= j < sink + body)
    last = stream.body_tokens(tokens)
    held = copies.held()
    for first in range(sink, sink + last, size):
        run = source[:, first : first + size]
        expected = codec.decode(codec.encode(run), torch.float64)
        torch.testing.assert_close(held[:, first : first + size], expected, rtol=0, atol=0)
    rest = [*range(min(sink, tokens)), *range(sink + last, tokens)]
    torch.testing.assert_close(held[:, rest], buffered[:, rest], rtol=0, atol=0)


def test_attention_over_an_exact_cache_is_the_attention_of_the_dialect():
    q, k, v = (torch.randn(1, h, 9, 16, dtype=torch.float64) for h in (4, 2, 2))
    positions = torch.arange(9)
    per_head = torch.randn(4, dtype=torch.float64)
    for options in (
        {},
        {"window": 4, "softcap": 2.0, "sink_logits": per_head},
        {"chunk": 3, "alibi_slopes": per_head},
        {"window": 2, "chunk": 4, "softcap": 1.0, "alibi_slopes": per_head},
    ):
        expected = kvx.attention(q, k, v, positions[None], layer=0, scale=0.3, **options)
        scoring = Scoring(0.3, **options)
        got = attend(q[0], positions, two_copies(EXACT, k[0]), two_copies(EXACT, v[0]), scoring)
        torch.testing.assert_close(got, expected[0], rtol=0, atol=1e-12)


def test_each_query_reads_the_copy_that_was_live_at_its_time():
    stream = make_stream({"codec": "int", "bits": 2}, Regions(sink=1, recent=2))
    q, k, v = (torch.randn(2, 6, 16, dtype=torch.float64) for _ in range(3))
    key, value = two_copies(stream, k), two_copies(stream, v)
    got = attend(q, torch.arange(6), key, value, Scoring(0.25))
    for t in range(6):  # the cache as it stands once token t has been appended
        now_k = two_copies(stream, k[:, : t + 1]).held()
        now_v = two_copies(stream, v[:, : t + 1]).held()
        weights = torch.softmax(0.25 * q[:, t : t + 1] @ now_k.transpose(1, 2), -1)
        torch.testing.assert_close(got[:, t : t + 1], weights @ now_v, rtol=0, atol=1e-12)
    assert (key.exact - key.encoded).abs().max() > 0.1
