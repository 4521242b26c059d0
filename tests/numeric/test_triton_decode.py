"""Decode kernels in Triton's interpreter, against float64 attention over what is live."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decode_cases import check_decode, run_decode
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_cases import (
    codec_stream,
    int_stream,
    make_site,
    plain_stream,
    random_kv,
    random_q,
    store,
)

from kvxform.codecs.fib_vq import FibVqCodec
from kvxform.codecs.integer import IntCodec
from kvxform.codecs.lloyd_max import LloydMaxCodec
from kvxform.codecs.token_norm import TokenNormCodec
from kvxform.codegen.triton.emit import emit
from kvxform.codegen.triton.loading import load
from kvxform.codegen.triton.spec import DecodeSpec, SiteSpec, StreamSpec

pytestmark = pytest.mark.triton

TABLE = (-1.0, -0.7, -0.5, -0.4, -0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.25, 0.3, 0.4, 0.6, 0.7, 1.0)
EVERY_OPTION: dict[str, Any] = {
    "window": 29,
    "softcap": 5.0,
    "has_sink_logits": True,
    "has_alibi": True,
    "has_slot_bias": True,
    "has_lse": True,
}


def site(key: StreamSpec, value: StreamSpec | None = None, **fields: Any) -> SiteSpec:
    """Return a site with one KV head and small pages."""
    return make_site(key, value, **{"heads": (2, 1), "page_size": 16, **fields})


KIVI = site(
    int_stream(32, 2, axis="channel", zero="float", group=16),
    int_stream(32, 2, zero="float", group=16, keep=20),
)
CASES = {
    "int4, small pages, rotation": (
        DecodeSpec(site(int_stream(32)), query_block=32, has_signs=True, has_lse=True),
        [0, 1, 15, 16, 17, 70],
    ),
    "int3 with groups": (DecodeSpec(site(int_stream(64, 3, group=32))), [0, 37]),
    "int8 symmetric, int2": (
        DecodeSpec(site(int_stream(32, 8, symmetric=True), int_stream(32, 2))),
        [33],
    ),
    "kivi": (DecodeSpec(KIVI), [19, 57]),
    "channels, both symmetric, sink": (
        DecodeSpec(site(int_stream(32, 4, axis="channel", symmetric=True, sink=3, group=16))),
        [2, 40],
    ),
    "exact regions": (
        DecodeSpec(site(plain_stream(32, sink=2, keep=9), int_stream(32, 8, sink=2, keep=20))),
        [1, 30, 44],
    ),
    "levels of directions": (
        DecodeSpec(
            site(
                codec_stream(32, LloydMaxCodec(16)),
                codec_stream(32, LloydMaxCodec(8, gain="corrected"), keep=3),
            ),
            query_block=32,
        ),
        [0, 1, 20],
    ),
    "words": (DecodeSpec(site(codec_stream(32, FibVqCodec(64, 2))), query_block=16), [20]),
    "words of a float32 model": (
        DecodeSpec(
            site(
                codec_stream(32, FibVqCodec(16, 2)),
                codec_stream(32, LloydMaxCodec(4)),
                dtype="float32",
            )
        ),
        [21],
    ),
    "norms of all heads": (
        DecodeSpec(
            site(
                codec_stream(32, TokenNormCodec(IntCodec(2, axis="channel", group=16))),
                codec_stream(32, LloydMaxCodec(4)),
                heads=(2, 2),
            )
        ),
        [20],
    ),
    "norms and tables": (
        DecodeSpec(
            site(
                int_stream(32, 4, table=TABLE, token_norm="head"),
                int_stream(32, 4, table=TABLE, token_norm="head", axis="channel", group=16),
            )
        ),
        [38],
    ),
    "float32": (
        DecodeSpec(
            site(plain_stream(16, "float32"), int_stream(16, 4), dtype="float32"), has_lse=True
        ),
        [0, 17],
    ),
    "every option of scores": (
        DecodeSpec(site(int_stream(32, sink=4, keep=8)), **EVERY_OPTION),
        [0, 1, 60],
    ),
    "chunk, odd shapes": (
        DecodeSpec(
            site(int_stream(80, 4), plain_stream(48), heads=(5, 1), page_size=100), chunk=24
        ),
        [23, 24, 25],
    ),
    "twin, int4": (
        DecodeSpec(site(int_stream(64), layout="fragment", page_size=32), query_block=64),
        [0, 1, 32, 33, 70],
    ),
    "twin, levels of directions": (
        DecodeSpec(
            site(
                codec_stream(64, LloydMaxCodec(16)),
                codec_stream(64, LloydMaxCodec(16, gain="projected")),
                layout="fragment",
                page_size=32,
            ),
            query_block=64,
        ),
        [0, 33],
    ),
    "twin, every option": (
        DecodeSpec(site(int_stream(128, 2), layout="fragment", page_size=32), **EVERY_OPTION),
        [0, 65],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_kernel_equals_attention_over_what_is_live(name: str) -> None:
    spec, lengths = CASES[name]
    check_decode(spec, lengths, num_sms=1)


def test_split_tokens_are_joined() -> None:
    spec = DecodeSpec(site(int_stream(32)), has_lse=True)
    one, lse, _, _ = run_decode(spec, [130], num_sms=0)
    parts, parts_lse, expected, _ = run_decode(spec, [130], num_sms=3)
    assert not torch.equal(one, parts) or not torch.equal(lse, parts_lse)  # there were several
    torch.testing.assert_close(one, parts, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(parts, expected, rtol=3e-3, atol=3e-3)


def test_idle_rows_are_zero_and_have_no_sum() -> None:
    spec = DecodeSpec(site(int_stream(32)), has_lse=True, has_sink_logits=True)
    out, lse, _, _ = run_decode(spec, [0, 0])
    assert lse is not None
    assert out.count_nonzero() == 0
    assert lse.isneginf().all()


def test_slots_with_a_bias_of_minus_infinity_are_not_seen() -> None:
    spec = DecodeSpec(site(int_stream(32)), has_slot_bias=True, has_lse=True)
    check_decode(spec, [40])  # a fifth of the slots


def test_a_workspace_for_fewer_sequences_is_refused() -> None:
    spec = DecodeSpec(site(int_stream(32)))
    module = load(emit(spec, interpret=True))
    stored = store(spec.site, *random_kv(spec.site, 2, 5), [5, 5])
    q = random_q(spec.site, 2, 2)
    work = module.make_workspace(1, 5, 0, "cpu")
    with pytest.raises(ValueError, match="room for 1 items; got 2"):
        module.decode(
            q, stored.cache(module), stored.block_table, stored.lengths, work, q, scale=1.0
        )


@settings(max_examples=4, deadline=None, derandomize=True)
@given(data=st.data())
def test_shapes(data: st.DataObject) -> None:
    head_dim = data.draw(st.sampled_from([16, 32, 48, 80]), label="head_dim")
    bits = data.draw(st.sampled_from([2, 3, 4, 8]), label="bits")
    group = data.draw(st.sampled_from([head_dim, head_dim // 2]), label="group")
    keep = data.draw(st.sampled_from([0, 5]), label="keep")
    heads = data.draw(st.sampled_from([(1, 1), (3, 1), (16, 1)]), label="heads")
    page_size = data.draw(st.sampled_from([16, 24, 64]), label="page_size")
    length = data.draw(st.integers(0, 2 * page_size), label="length")
    stream = int_stream(head_dim, bits, group=group, keep=keep)
    check_decode(DecodeSpec(site(stream, heads=heads, page_size=page_size)), [length], num_sms=1)


def stream_sweep() -> list[StreamSpec]:
    """Return one stream for each combination of how codes are stored."""
    streams = [plain_stream(64)]
    for bits in (2, 3, 4, 8):
        for zero in ({"zero": "int"}, {"zero": "float"}, {"symmetric": True}):
            streams += [int_stream(64, bits, group=group, **zero) for group in (32, 64)]
            streams += [int_stream(64, bits, axis="channel", group=32, **zero)]
    return streams


@pytest.mark.slow
@pytest.mark.parametrize("stream", stream_sweep(), ids=str)
@pytest.mark.parametrize("page_size", [32, 64])
def test_every_form_of_codes(stream: StreamSpec, page_size: int) -> None:
    spec = DecodeSpec(make_site(stream, page_size=page_size), has_lse=True, query_block=16)
    check_decode(spec, [0, 1, page_size - 1, page_size, page_size + 1, 150])


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("groups", [1, 2, 3, 8, 16, 32])
def test_every_head_dim(head_dim: int, groups: int) -> None:
    stream = int_stream(head_dim, 3 if groups == 2 else 4)
    check_decode(DecodeSpec(make_site(stream, heads=(2 * groups, 2)), query_block=16), [33, 100])


@pytest.mark.slow
@pytest.mark.parametrize("page_size", [16, 32, 64, 128, 256, 200])
@pytest.mark.parametrize("config", range(8))
def test_every_config(page_size: int, config: int) -> None:
    spec = DecodeSpec(make_site(int_stream(64), page_size=page_size))
    check_decode(spec, [page_size - 1, page_size, page_size + 1], config=config)


@pytest.mark.slow
@pytest.mark.parametrize("span", [{}, {"window": 40}, {"chunk": 48}, {"window": 30, "chunk": 64}])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ({"sink": 4}, {"sink": 4}),
        ({"keep": 16}, {"keep": 16}),
        ({"sink": 4, "keep": 9, "chunk": 8}, {"sink": 4, "keep": 30}),
        ({"axis": "channel", "sink": 4}, {"sink": 4, "keep": 40}),
        ({"keep": 5, "chunk": 8}, {"axis": "channel"}),
        ({"axis": "channel"}, {}),
        ({}, {"axis": "channel"}),
    ],
)
def test_every_kind_of_region(
    span: dict[str, int], key: dict[str, Any], value: dict[str, Any]
) -> None:
    streams = (int_stream(64, 4, **key), int_stream(64, 4, **value))
    spec = DecodeSpec(make_site(*streams, page_size=64), has_lse=True, **span)
    check_decode(spec, [1, 3, 4, 5, 31, 32, 36, 37, 68, 69, 150])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(
    "codec",
    [
        FibVqCodec(256, 4),
        FibVqCodec(64, 4, gain="projected"),
        FibVqCodec(256, 2),
        FibVqCodec(16, 4),
    ],
    ids=str,
)
def test_every_size_of_words(codec: FibVqCodec, dtype: str) -> None:
    spec = DecodeSpec(site(codec_stream(64, codec), dtype=dtype, page_size=12), query_block=64)
    check_decode(spec, [0, 50], num_sms=2)
