"""Append kernels in the interpreter: every byte of the cache against the codecs."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
import triton
import triton.language as tl
from append_cases import Appender
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_cases import codec_stream, encode, int_stream, make_site, plain_stream, random_kv

import kvxform.ir.ops as kvx
from kvxform.codecs.fib_vq import FibVqCodec
from kvxform.codecs.hadamard import block_hadamard, make_signs
from kvxform.codecs.integer import IntCodec
from kvxform.codecs.lloyd_max import LloydMaxCodec
from kvxform.codecs.packing import unpack
from kvxform.codecs.token_norm import TokenNormCodec
from kvxform.codegen.triton import fragment
from kvxform.codegen.triton.emit import emit
from kvxform.codegen.triton.loading import load
from kvxform.codegen.triton.spec import AppendSpec, RopeSpec, SiteSpec

pytestmark = pytest.mark.triton

# New tokens of two rows in each step: several tiles, ragged ends, one token, none for a row.
STEPS = ((3, 1), (1, 0), (0, 35), (1, 1))
TABLE = (-1.0, -0.45, -0.1, 0.0, 0.12, 0.5, 0.7, 1.1)


def check(spec: AppendSpec | SiteSpec, steps: tuple[tuple[int, ...], ...] = STEPS) -> Appender:
    """Append in steps, comparing all of the cache with the codec after each of them."""
    spec = AppendSpec(spec) if isinstance(spec, SiteSpec) else spec
    ends = [sum(counts) for counts in zip(*steps, strict=True)]
    appender = Appender(spec, ends)
    k, v = random_kv(spec.site, len(ends), max(ends))
    appender.append_all(k, v, steps)
    return appender


def small(key: object, value: object = None, **options: object) -> SiteSpec:
    options.setdefault("heads", (2, 1))
    return make_site(key, value, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("key_bits", "value_bits"), [(4, 3), (8, 2)])
def test_codes_scales_and_zeros_are_those_of_the_codec(key_bits: int, value_bits: int) -> None:
    check(small(int_stream(32, key_bits), int_stream(32, value_bits)))


def test_symmetric_and_clipped_codes() -> None:
    key = int_stream(32, 8, symmetric=True)
    check(small(key, int_stream(32, 4, symmetric=True, clip=0.9)))


def test_zero_points_that_are_values_and_ranges_that_contain_zero() -> None:
    key = int_stream(32, 4, zero="float", clip=0.8)
    check(small(key, int_stream(32, 2, include_zero=True, zero="float")))


def test_groups_smaller_than_a_head() -> None:
    check(small(int_stream(64, 4, group=32), int_stream(32, 8, group=16, include_zero=True)))


def test_heads_that_are_no_power_of_two() -> None:
    check(small(int_stream(80, 8), int_stream(48, 4, group=24)))


def test_a_table_of_values() -> None:
    check(small(int_stream(32, 3, table=TABLE), plain_stream(32)))


def test_token_norms() -> None:
    check(small(int_stream(32, 4, token_norm="head"), int_stream(32, 2, symmetric=True)))


METHODS = {
    "levels16": (LloydMaxCodec(16), {}),
    "words16": (FibVqCodec(16, 2), {}),
    "norms of all heads": (TokenNormCodec(IntCodec(2, axis="channel", group=16)), {"chunk": 16}),
    "levels8": (LloydMaxCodec(8, gain="corrected"), {"sink": 2}),
    "levels4": (LloydMaxCodec(4, gain="projected"), {"keep": 3}),
    "words64": (FibVqCodec(64, 2), {"keep": 3}),
    "norms of groups": (TokenNormCodec(IntCodec(4, group=16)), {}),
}


@pytest.mark.parametrize(
    "name",
    [*list(METHODS)[:3], *(pytest.param(n, marks=pytest.mark.slow) for n in list(METHODS)[3:])],
)
def test_norms_and_tables(name: str) -> None:
    codec, regions = METHODS[name]
    check(make_site(codec_stream(32, codec, **regions)), steps=((18, 1), (1, 1)))


def test_norms_in_fragment_order() -> None:
    streams = codec_stream(64, LloydMaxCodec(16)), int_stream(64, 8)
    check(make_site(*streams, layout="fragment"), steps=((18, 1), (1, 1)))


def test_norms_are_of_all_heads() -> None:
    """Near miss: norms of heads give other codes."""
    site = make_site(codec_stream(32, TokenNormCodec(IntCodec(4, group=16))))
    k, _ = random_kv(site, 1, 8)
    apart = dataclasses.replace(site.key, token_norm="head")
    assert not torch.equal(encode(site.key, k[0])["norm"], encode(apart, k[0])["norm"])


def test_plain_values_of_a_float32_model() -> None:
    key, value = plain_stream(32, "float32"), plain_stream(48, "float16")
    check(small(key, value, dtype="float32"))


@pytest.mark.parametrize("heads", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_one_token_of_several_heads_a_program(heads: int) -> None:
    """Three KV heads: programs of two and of four have rows to spare."""
    site = make_site(int_stream(64), int_stream(64, 8), heads=(3, 3), layout="fragment")
    rope = RopeSpec(32)
    appender = Appender(AppendSpec(site, rope=rope), [2, 3])
    k, v = random_kv(site, 2, 3)
    cos, sin, turned = rope_of(k, rope)
    config = appender.module.CONFIGS[0]._replace(heads=heads)
    for counts in ((1, 1), (0, 1), (1, 1)):
        at = torch.tensor(appender.lengths)[:, None, None].expand(2, 1, 16)
        angles = {"cos": cos.expand(2, -1, -1), "sin": sin.expand(2, -1, -1)}
        angles = {name: angle.gather(1, at) for name, angle in angles.items()}
        appender.append(k, v, counts, config=config, **angles)
    appender.check(turned, v)


def test_sinks_alone() -> None:
    check(small(int_stream(32, 4, sink=5), plain_stream(32, sink=5)))


@pytest.mark.parametrize(("keep", "chunk", "sink"), [(4, 1, 0), (0, 8, 3)])
def test_rings_of_recent_tokens(keep: int, chunk: int, sink: int) -> None:
    regions = {"keep": keep, "chunk": chunk, "sink": sink}
    value = int_stream(32, 2, keep=9, sink=sink)  # V has a rule of its own
    check(small(int_stream(32, 4, **regions), value))


def test_a_ring_beside_a_stream_without_one() -> None:
    check(small(int_stream(32, 4), int_stream(32, 2, keep=6)))


def test_groups_of_tokens() -> None:
    key = int_stream(32, 2, axis="channel", group=16, zero="float", keep=4)
    check(small(key, int_stream(32, 4, axis="channel", group=16, sink=0)))


def test_blocks_of_several_groups_of_tokens() -> None:
    key = int_stream(32, 2, axis="channel", group=16, chunk=32, sink=2)
    check(small(key, int_stream(32, 2, keep=32, sink=2)), ((4, 1), (28, 60), *((1, 1),) * 2))


@pytest.mark.parametrize("bits", [2, 4])
def test_pages_in_fragment_order(bits: int) -> None:
    dim = 128 if bits == 2 else 64
    site = make_site(int_stream(dim, bits), heads=(2, 1), layout="fragment", page_size=64)
    check(site, ((3, 1), (1, 0), (70, 34), (1, 1)))


def test_fragments_of_unlike_streams() -> None:
    key, value = int_stream(64, 4, zero="float"), int_stream(64, 8, symmetric=True)
    check(make_site(key, value, heads=(2, 1), layout="fragment"))
    check(make_site(plain_stream(64), key, heads=(2, 1), layout="fragment", page_size=64))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, of NaN that is not stored
def test_the_padding_of_short_rows_is_not_trusted() -> None:
    site = small(int_stream(32, 4), int_stream(32, 8, keep=3))
    appender = Appender(AppendSpec(site), [9, 2], garbage=math.nan)
    appender.append_all(*random_kv(site, 2, 9), [(9, 2)])


@pytest.mark.parametrize("scale", [1e-6, 1.0, 3e4])
def test_groups_at_the_limits_of_float16(scale: float) -> None:
    site = small(int_stream(32, 4), int_stream(32, 8, zero="float"), dtype="float32")
    appender = Appender(AppendSpec(site), [8])
    k, v = random_kv(site, 1, 8)
    k, v = k * scale, v * scale + 7.0
    k[..., 2, :], v[..., 3, :] = 0.0, 5.0  # groups without a range
    appender.append_all(k, v, [(8,)])


@pytest.mark.parametrize("layout", ["rows", "fragment"])
@pytest.mark.parametrize("rope", [RopeSpec(64), RopeSpec(24, interleaved=True)])
def test_rope_has_the_rounding_of_the_graph(layout: str, rope: RopeSpec) -> None:
    site = make_site(int_stream(64, 8), heads=(2, 1), layout=layout)
    appender = Appender(AppendSpec(site, rope=rope), [21])
    k, v = random_kv(site, 1, 21)
    cos, sin, turned = rope_of(k, rope)
    for first, last in ((0, 20), (20, 21)):
        angles = {"cos": cos[:, first:last], "sin": sin[:, first:last]}
        appender.append(k, v, [last - first], **{n: x.contiguous() for n, x in angles.items()})
    appender.check(turned, v)


def rope_of(k: Tensor, rope: RopeSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Return cosines and sines `[B, S, rotary_dim / 2]`, and what `kvx::rope` makes of k."""
    inv_freq = 1e4 ** -(torch.arange(0, rope.rotary_dim, 2) / rope.rotary_dim)
    positions = 5 + torch.arange(k.shape[2])[None]
    turned = kvx.rope(
        k,
        positions,
        inv_freq,
        rotary_dim=rope.rotary_dim,
        attention_scaling=1.1,
        interleaved=rope.interleaved,
    )
    angles = positions[..., None] * inv_freq
    return (angles.cos() * 1.1).to(k.dtype), (angles.sin() * 1.1).to(k.dtype), turned


@pytest.mark.parametrize(
    ("layout", "dim", "bits", "block"),
    [("rows", 64, 4, 64), ("rows", 96, 8, 32), ("fragment", 64, 4, 64), ("fragment", 128, 2, 32)],
)
def test_hadamard_is_within_a_code_of_the_rotated_keys(
    layout: str, dim: int, bits: int, block: int
) -> None:
    site = make_site(int_stream(dim, bits), heads=(2, 1), layout=layout)
    appender = Appender(AppendSpec(site, key_block=block, has_signs=True), [33])
    k, v = random_kv(site, 1, 33)
    signs = make_signs(dim, seed=3)
    appender.append(k, v, [32], signs=signs)
    appender.append(k, v, [1], signs=signs)
    codes = stored_codes(appender, 33)
    wanted = unpack(encode(site.key, block_hadamard(k.float(), block, signs))["codes"], bits)[0]
    apart = (codes.int() - wanted.int()).abs()
    assert apart.max() <= 1
    assert (apart > 0).double().mean() < 1e-3


def stored_codes(appender: Appender, length: int) -> Tensor:
    """Return the codes of the keys of row 0, `[Hk, length, D]`."""
    site, pool = appender.site, appender.tensors.get("pool")
    planes = appender.tensors["key_codes"] if pool is None else None
    packed = fragment.to_planes(site, pool)["key"]["codes"] if planes is None else planes
    pages = packed[appender.block_table[0].long()].transpose(0, 1).flatten(1, 2)
    return unpack(pages[:, :length], site.key.bits)


def test_keys_that_are_kept_exact_are_rotated_too() -> None:
    site = small(int_stream(32, 4, keep=40, sink=2))
    appender = Appender(AppendSpec(site, key_block=32), [9])
    k, v = random_kv(site, 1, 9)
    appender.append(k, v, [8])
    appender.append(k, v, [1])
    row = int(appender.rows[0])
    exact = [appender.tensors[f"key_{n}"][row] for n in ("sink", "recent")]
    wanted = block_hadamard(k.float(), 32, None)[0]
    found = torch.cat([exact[0], exact[1][:, :7]], 1)
    torch.testing.assert_close(found.float(), wanted, rtol=1e-3, atol=1e-4)


def test_strided_operands() -> None:
    site = small(int_stream(32, 4), heads=(4, 2))
    appender = Appender(AppendSpec(site), [20, 20], is_token_major=True)
    appender.append_all(*random_kv(site, 2, 20), [(19, 4), (1, 1)])


RULES = st.tuples(st.integers(0, 3), st.integers(0, 5), st.sampled_from([1, 4, 16]))


@settings(max_examples=3, deadline=None)
@given(
    rules=st.tuples(RULES, RULES),
    steps=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 40)), min_size=1, max_size=3),
)
def test_any_rule_any_steps(
    rules: tuple[tuple[int, int, int], tuple[int, int, int]], steps: list[tuple[int, int]]
) -> None:
    (sink, *key), (_, *value) = rules
    streams = [int_stream(16, 4, sink=sink, keep=a, chunk=b) for a, b in (key, value)]
    check(small(*streams, page_size=16), tuple(steps))


@pytest.mark.parametrize("rule", [(0, 3, 1), (1, 2, 4)])
def test_token_by_token_is_all_at_once(rule: tuple[int, int, int]) -> None:
    sink, keep, chunk = rule
    site = small(int_stream(16, 4, sink=sink, keep=keep, chunk=chunk), page_size=16)
    k, v = random_kv(site, 1, 23)
    for steps in ([(23,)], [(1,)] * 23):
        appender = Appender(AppendSpec(site), [23])
        for counts in steps:
            appender.append(k, v, counts)
        appender.check(k, v)


FORMATS = [
    {"bits": bits, "group": group, "zero": zero, "symmetric": symmetric}
    for bits, group, (zero, symmetric) in itertools.product(
        (2, 3, 4, 8), (32, 64, 128), (("int", False), ("float", False), ("int", True))
    )
]


@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 192, 256])
def test_every_format_at_every_head_dim(dim: int) -> None:
    formats = [f for f in FORMATS if dim % f["group"] == 0] or [
        {**f, "group": dim} for f in FORMATS if f["group"] == 32
    ]
    for key, value in zip(formats, formats[1:] + formats[:1], strict=True):
        check(small(int_stream(dim, **key), int_stream(dim, **value)), ((5, 3), (1, 33)))


@pytest.mark.slow
@pytest.mark.parametrize("page_size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_groups_of_tokens_in_pages_of_every_size(page_size: int, bits: int) -> None:
    for group in (16, 32, 64, 128):
        if page_size % group == 0:
            key = int_stream(32, bits, axis="channel", group=group)
            value = int_stream(32, bits, axis="channel", group=group, chunk=2 * group, sink=0)
            check(small(key, value, page_size=page_size), ((3, 3 * group), (1, 1), (group, 1)))


@pytest.mark.slow
@pytest.mark.parametrize("page_size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_fragments_of_every_size(page_size: int, dim: int) -> None:
    for bits in (2, 4, 8):
        site = make_site(int_stream(dim, bits), heads=(2, 1), layout="fragment")
        site = make_site(site.key, heads=(2, 1), layout="fragment", page_size=page_size)
        if fragment.reason_against(site) is None:
            check(site, ((3, 16), (page_size, 64), (1, 1)))


@pytest.mark.slow
@pytest.mark.parametrize("block", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("layout", ["rows", "fragment"])
def test_every_hadamard_block(layout: str, block: int) -> None:
    test_hadamard_is_within_a_code_of_the_rotated_keys(layout, max(block, 64), 4, block)


@triton.jit
def _code_kernel(x, codes, quantise: tl.constexpr, COUNT: tl.constexpr):  # noqa: N803
    i = tl.arange(0, COUNT)
    tl.store(codes + i, quantise(tl.load(x + i)))


@pytest.mark.parametrize("levels", [4, 16])
def test_values_on_and_beside_bounds_of_a_table(levels: int) -> None:
    stream = codec_stream(128, LloydMaxCodec(levels=levels))
    module = load(emit(AppendSpec(small(stream, layout="fragment")), interpret=True))
    table = torch.tensor(stream.table, dtype=torch.float64)
    bounds = ((table[:-1] + table[1:]) / 2).float()
    assert bounds[levels // 2 - 1] == 0.0
    x = torch.cat([bounds, bounds.nextafter(table[0].float()), bounds.nextafter(table[-1].float())])
    x = torch.cat([x, -torch.zeros(1), torch.tensor([-1.0, 1.0])])
    x = torch.nn.functional.pad(x, (0, 64 - len(x)))
    codes = torch.full((64,), -1.0)
    _code_kernel[(1,)](x, codes, module.quantise, 64)
    assert torch.equal(codes, torch.bucketize(x, bounds).float())
