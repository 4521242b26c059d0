"""Gather kernels in the interpreter: what they write are the bits that the codec decodes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_cases import (
    codec_stream,
    int_stream,
    live_copy,
    make_site,
    plain_stream,
    random_kv,
    store,
)

from kvxform.codecs.base import dtype_from_name
from kvxform.codecs.fib_vq import FibVqCodec
from kvxform.codecs.integer import IntCodec
from kvxform.codecs.lloyd_max import LloydMaxCodec
from kvxform.codecs.token_norm import TokenNormCodec
from kvxform.codegen.triton import fragment
from kvxform.codegen.triton.emit import emit
from kvxform.codegen.triton.loading import load
from kvxform.codegen.triton.spec import GatherSpec, SiteSpec

pytestmark = pytest.mark.triton

# Pages hold 32 tokens.
LENGTHS = (0, 1, 31, 32, 33, 70)
SOME_LENGTHS = (1, 45)
TABLE = (-3.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.25, 3.0)


def check(site: SiteSpec, lengths: tuple[int, ...] = LENGTHS, *, ulp: float = 0.0) -> None:
    """Compare with the codec in float64: rounding once more changes no result of one rounding.

    A token norm is a second rounding, in float32; `ulp` allows for it.
    """
    kv = random_kv(site, len(lengths), max(lengths) + 2)
    stored = store(site, *kv, lengths)
    dtype = dtype_from_name(site.dtype)
    outputs = [torch.full(x.shape, math.nan, dtype=dtype) for x in kv]
    module = load(emit(GatherSpec(site), interpret=True))
    rows = {"rows": stored.rows} if site.has_exact else {}
    config = module.CONFIGS[0]
    module.gather(
        stored.cache(module), stored.block_table, stored.lengths, *outputs, **rows, config=config
    )
    for out, x, stream in zip(outputs, kv, (site.key, site.value), strict=True):
        for b, length in enumerate(lengths):
            wanted = live_copy(stream, x[b], length).float().to(dtype)
            torch.testing.assert_close(out[b, :, :length], wanted, rtol=ulp, atol=0)
            assert out[b, :, length:].isnan().all()  # nothing is written behind the row


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_two_axes_two_zero_points(dtype: str) -> None:
    key = int_stream(32, 2, axis="channel", zero="float")
    check(make_site(key, int_stream(48, 4, group=16, keep=3), dtype=dtype), SOME_LENGTHS)


def test_three_bits_with_sink_and_ring() -> None:
    check(make_site(int_stream(40, 3, sink=4, keep=5), int_stream(24, 3, sink=4, group=8)))


def test_eight_bits_symmetric_and_plain_values() -> None:
    check(make_site(int_stream(32, 8, symmetric=True), plain_stream(20, "float32")), SOME_LENGTHS)


def test_table_and_plain_values_with_buffers() -> None:
    key = int_stream(32, 3, table=TABLE)
    check(make_site(key, plain_stream(32, sink=2, keep=7), dtype="float32"), SOME_LENGTHS)


def test_tables_of_directions_and_words() -> None:
    key = codec_stream(32, LloydMaxCodec(16), sink=2)
    check(make_site(key, codec_stream(32, FibVqCodec(64, 2), sink=2)), SOME_LENGTHS)
    key = codec_stream(32, FibVqCodec(16, 2), keep=5)
    check(make_site(key, codec_stream(32, LloydMaxCodec(8))), SOME_LENGTHS)
    levels = codec_stream(64, LloydMaxCodec(16))
    check(make_site(levels, layout="fragment"), SOME_LENGTHS)


def test_norms_of_all_heads() -> None:
    key = codec_stream(32, TokenNormCodec(IntCodec(2, axis="channel", group=32)))
    check(make_site(key, codec_stream(32, LloydMaxCodec(4)), dtype="float32"), ulp=2.0**-23)


def test_token_norm() -> None:
    site = make_site(int_stream(32, 4, token_norm="head", zero="float"), dtype="float32")
    check(site, SOME_LENGTHS, ulp=2.0**-22)


@pytest.mark.parametrize(("bits", "head_dim"), [(4, 64), (2, 128)])
def test_fragment_order(bits: int, head_dim: int) -> None:
    value = int_stream(head_dim, 8, symmetric=True)
    check(make_site(int_stream(head_dim, bits), value, layout="fragment"))


@settings(max_examples=4, deadline=None)
@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=2),
    st.integers(0, 5),
    st.integers(0, 20),
    st.sampled_from([1, 8]),
)
def test_any_lengths_and_regions(lengths: list[int], sink: int, keep: int, chunk: int) -> None:
    key = int_stream(32, 4, sink=sink, keep=keep, chunk=chunk)
    site = make_site(key, int_stream(32, 2, sink=sink), heads=(1, 1), page_size=16)
    check(site, tuple(lengths))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("zero", ["int", "float"])
@pytest.mark.parametrize(
    "fields", [{}, {"group": 16}, {"symmetric": True}, {"axis": "channel"}, {"sink": 4, "keep": 9}]
)
def test_codes(dtype: str, bits: int, zero: str, fields: dict[str, object]) -> None:
    check(make_site(int_stream(80, bits, zero=zero, **fields), dtype=dtype))


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("page_size", [32, 128])
def test_all_fragments(head_dim: int, bits: int, page_size: int) -> None:
    stream = plain_stream(head_dim) if bits == 16 else int_stream(head_dim, bits, zero="float")
    site = make_site(stream, layout="fragment", page_size=page_size)
    is_refused = (bits, head_dim) in ((2, 64), (16, 256))
    assert (fragment.reason_against(site) is not None) == is_refused
    if not is_refused:
        check(site, (1, page_size, 200))
