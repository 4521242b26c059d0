from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_cases import codec_stream, int_stream, make_site, plain_stream

from kvxform.codecs.lloyd_max import LloydMaxCodec
from kvxform.codegen.triton import fragment
from kvxform.codegen.triton.spec import SiteSpec, StreamSpec


@st.composite
def streams(draw: st.DrawFn, head_dim: int) -> StreamSpec:
    bits = draw(st.sampled_from([2, 4, 8, 16] if head_dim > 64 else [4, 8, 16]))
    if bits < 8 and draw(st.booleans()):
        return codec_stream(head_dim, LloydMaxCodec(2**bits))
    if bits == 16:
        return plain_stream(head_dim, draw(st.sampled_from(["float16", "bfloat16"])))
    zero = draw(st.sampled_from(["int", "float"]))
    return int_stream(head_dim, bits, symmetric=draw(st.booleans()), zero=zero)


@st.composite
def sites(draw: st.DrawFn) -> SiteSpec:
    head_dim = draw(st.sampled_from([64, 128]))
    heads = draw(st.sampled_from([(1, 1), (6, 2), (16, 1)]))
    key, value = draw(streams(head_dim)), draw(streams(head_dim))
    page_size = draw(st.sampled_from([32, 64]))
    return make_site(key, value, heads=heads, page_size=page_size, layout="fragment")


def random_planes(site: SiteSpec, num_pages: int = 2) -> dict[str, dict[str, Tensor]]:
    """Return planes of random bits."""
    shape = (num_pages, site.num_kv_heads, site.page_size)
    return {
        name: {
            plane.name: torch.randint(0, 256, (*shape, plane.row_bytes))
            .byte()
            .view(plane.torch_dtype)
            for plane in stream.planes
        }
        for name, stream in site.streams.items()
    }


@given(site=sites())
@settings(max_examples=25, deadline=None)
def test_planes_survive_and_no_bit_is_unused(site: SiteSpec) -> None:
    assert fragment.reason_against(site) is None
    planes = random_planes(site)
    pool = fragment.from_planes(site, planes)
    words = fragment.chunk_words(site)
    assert (pool.dtype, pool.shape) == (torch.int32, (2, site.num_kv_heads, words))
    assert words * site.num_kv_heads * 4 == site.bytes_per_token * site.page_size
    back = fragment.to_planes(site, pool)
    for name, stream in site.streams.items():
        assert list(back[name]) == [plane.name for plane in stream.planes]
        for plane in stream.planes:
            one, other = planes[name][plane.name], back[name][plane.name]
            assert one.dtype == other.dtype
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
    noise = torch.randint(-(2**31), 2**31 - 1, pool.shape, dtype=torch.int32)
    assert torch.equal(fragment.from_planes(site, fragment.to_planes(site, noise)), noise)


def place_of_key(stream: StreamSpec, page_size: int, token: int, channel: int) -> tuple[int, int]:
    """Return word and bit of a code of a key, from the words of the module's docstring."""
    group, column = divmod(channel, 16)
    slots, groups = 32 // stream.bits, stream.head_dim // 16
    shared = max(1, slots // groups)
    plane, slot = divmod(group, slots)
    if shared == 2:
        slot += token // 16 % 2 * groups
    row = token // (16 * shared) * 16 + token % 16
    word = column // 2 * 2 + slot // (slots // 2)
    bit = column % 2 * 16 + slot % (slots // 2) * stream.bits
    return (plane * page_size // shared + row) * 16 + word, bit


def place_of_value(stream: StreamSpec, page_size: int, token: int, channel: int) -> tuple[int, int]:
    """Return the same of a value: channels of a group and labels of tokens change places."""
    block = token // 16 * 16
    return place_of_key(stream, page_size, block + channel % 16, channel // 16 * 16 + token % 16)


@pytest.mark.parametrize(
    "stream",
    [int_stream(128, 2), int_stream(128), int_stream(128, 8), plain_stream(128), int_stream(64)],
    ids=["int2", "int4", "int8", "float16", "int4-64"],
)
def test_each_code_is_where_the_documentation_says(stream: StreamSpec) -> None:
    site = make_site(stream, page_size=64, layout="fragment", heads=(1, 1))
    empty = {
        name: {plane: torch.zeros_like(x) for plane, x in planes.items()}
        for name, planes in random_planes(site, 1).items()
    }
    main = "codes" if stream.is_coded else "value"
    values_start = fragment.areas(site)["key"].words(64)
    for name, place in (("key", place_of_key), ("value", place_of_value)):
        for token, channel in ((0, 0), (5, 3), (21, 127), (47, 16), (63, 95)):
            channel %= stream.head_dim
            codes = torch.zeros(64, stream.head_dim, dtype=torch.int64)
            codes[token, channel] = 2**stream.bits - 1
            planes = {**empty, name: {**empty[name], main: _pack(stream, codes)}}
            pool = fragment.from_planes(site, planes)[0, 0]
            word, bit = place(stream, 64, token, channel)
            assert pool.nonzero().flatten().tolist() == [
                word + (values_start if name == "value" else 0)
            ]
            found = int(pool[pool != 0].item()) & 0xFFFFFFFF
            assert found == (2**stream.bits - 1) << bit


def _pack(stream: StreamSpec, codes: Tensor) -> Tensor:
    """Return codes `[T, D]` as a plane `[1, 1, T, width]`, split-half."""
    if not stream.is_coded:
        return codes.to(torch.int16).view(torch.float16)[None, None]
    parts = codes.chunk(8 // stream.bits, -1)
    packed = sum(part << (stream.bits * i) for i, part in enumerate(parts))
    assert isinstance(packed, Tensor)
    return packed.byte()[None, None]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_token_owns_whole_halves_of_words(bits: int) -> None:
    site = make_site(int_stream(128, bits), page_size=64, layout="fragment", heads=(1, 1))
    planes = random_planes(site, 1)
    before = fragment.from_planes(site, planes)
    for stream in planes.values():
        for plane in stream.values():
            plane[:, :, 21] = 0
    changed = (fragment.from_planes(site, planes) ^ before)[0, 0]
    start = fragment.areas(site)["key"].words(64)
    values = changed[start : fragment.record_start(site)]
    assert values.count_nonzero() > 0
    assert not (values & 0xFFFF).any()  # token 21 has an odd label: the high halves are its own
    owned = 128 * bits // 32
    assert 0 < changed[:start].count_nonzero() <= owned
    assert 0 < changed[fragment.record_start(site) :].count_nonzero() <= 2


GOOD = make_site(int_stream(128), layout="fragment", page_size=32)


def _with_key(**fields: object) -> SiteSpec:
    return dataclasses.replace(GOOD, key=dataclasses.replace(GOOD.key, **fields))


@pytest.mark.parametrize(
    ("site", "reason"),
    [
        (dataclasses.replace(GOOD, dtype="float32"), "float32"),
        (_with_key(head_dim=64), "different head_dim"),
        (make_site(int_stream(96), layout="fragment"), "head_dim is none of"),
        (make_site(int_stream(128), heads=(17, 1), layout="fragment"), "query heads"),
        (make_site(plain_stream(256), layout="fragment"), "registers"),
        (make_site(int_stream(256), heads=(9, 1), layout="fragment"), "registers"),
        (_with_key(sink=4, exact_dtype="float16"), "key: some tokens stay exact"),
        (_with_key(keep=1, exact_dtype="float16"), "key: some tokens stay exact"),
        (_with_key(bits=3), "3 bits"),
        (_with_key(table=tuple(range(16))), "table"),
        (_with_key(table=tuple(range(16)), gain="norm"), "table"),
        (_with_key(bits=8, block=4, table=(0.0,) * 1024, gain="norm"), "table"),
        (_with_key(token_norm="head"), "norm"),
        (_with_key(group=64), "more than one scale"),
        (make_site(int_stream(64, 2), layout="fragment"), "more than two tokens"),
        (make_site(plain_stream(128, "float32"), layout="fragment"), "stored as float32"),
        (dataclasses.replace(GOOD, page_size=48), "power of two"),
        (make_site(int_stream(128, 2), page_size=16, layout="fragment"), "at least 32"),
    ],
)
def test_reason_against(site: SiteSpec, reason: str) -> None:
    assert reason in (fragment.reason_against(site) or "")


@pytest.mark.parametrize(
    "site",
    [
        GOOD,
        dataclasses.replace(GOOD, dtype="bfloat16"),
        make_site(int_stream(128), heads=(16, 1), layout="fragment"),
        make_site(int_stream(256), heads=(8, 1), layout="fragment"),
        make_site(int_stream(256, 2), page_size=16, layout="fragment"),
        make_site(int_stream(64, 8), page_size=16, layout="fragment"),
        make_site(int_stream(128, clip=0.9, include_zero=True), layout="fragment"),
        make_site(codec_stream(64, LloydMaxCodec(16)), layout="fragment"),
        make_site(codec_stream(128, LloydMaxCodec(4)), int_stream(128), layout="fragment"),
        dataclasses.replace(GOOD, page_size=256),
    ],
)
def test_near_misses_have_no_reason_against(site: SiteSpec) -> None:
    assert fragment.reason_against(site) is None
