"""Codecs with tables in ONNX, and codes of any number of levels in bytes."""

from __future__ import annotations

import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_codecs import check_codec, check_empty, klt_codec
from onnx_tools import make_model, run_model

from kvxform.codecs.fib_vq import FibVqCodec
from kvxform.codecs.fp8 import FORMATS, Fp8Codec
from kvxform.codecs.lloyd_max import LloydMaxCodec
from kvxform.codecs.octahedral import OctahedralCodec
from kvxform.codecs.packing import pack, unpack
from kvxform.codecs.polar import PolarCodec
from kvxform.codecs.radix import pack_levels, unpack_levels
from kvxform.codegen.onnx import codec_bytes, codec_lookup, codec_radix
from kvxform.codegen.onnx.builder import INT64, Builder

FLOAT, UINT8 = ir.DataType.FLOAT, ir.DataType.UINT8
HEAD_DIM = 16


def run(function, x, dtype):
    b = Builder()
    value = ir.Value(
        name="x",
        type=ir.TensorType(dtype),
        shape=ir.Shape([*"bht", *x.shape[3:]]),
    )
    model = make_model(b, [value], [b.op("Identity", function(b, value))])
    return run_model(model, [x.numpy()])[0]


@settings(max_examples=12, deadline=None)
@given(
    levels=st.sampled_from([2, 3, 5, 11, 20, 32, 100, 128, 256]),
    count=st.sampled_from([1, 8, 27, 64]),
    tokens=st.integers(0, 3),
)
def test_codes_of_any_number_of_levels_are_packed_alike(levels, count, tokens):
    codes = torch.randint(0, levels, (1, 2, tokens, count))
    codes[..., 0] = levels - 1
    expected = pack_levels(codes, levels)
    packed = run(lambda b, x: codec_radix.pack_levels(b, x, levels, count), codes, INT64)
    assert torch.equal(packed, expected)
    found = run(lambda b, x: codec_radix.unpack_levels(b, x, levels, count), expected, UINT8)
    assert torch.equal(found, unpack_levels(expected, levels, count))
    assert torch.equal(found, codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_of_whole_bits_are_packed_alike(bits):
    codes = torch.randint(0, 2**bits, (1, 2, 5, 24), dtype=torch.uint8)
    expected = pack(codes, bits)
    packed = run(lambda b, x: codec_bytes.pack(b, x, bits, 24), codes.float(), FLOAT)
    assert torch.equal(packed, expected)
    found = run(lambda b, x: codec_bytes.unpack(b, x, bits, 24), expected, UINT8)
    assert torch.equal(found.to(torch.uint8), unpack(expected, bits))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 10, 15, 255])
def test_a_value_is_placed_among_bounds_as_by_bucketize(count):
    bounds = torch.randn(count).sort().values
    x = torch.cat([torch.randn(200) * 2, bounds, torch.tensor([float("inf"), -100.0])])
    found = run(lambda b, x: codec_lookup.count_below(b, x, bounds), x[None, None, None], FLOAT)
    assert torch.equal(found[0, 0, 0], torch.bucketize(x, bounds))


CODECS = [
    LloydMaxCodec(levels=4),
    LloydMaxCodec(levels=5, gain="corrected"),
    LloydMaxCodec(levels=16, gain="projected"),
    LloydMaxCodec(levels=8, qjl=True),
    FibVqCodec(words=16, k=2),
    FibVqCodec(words=5, k=3, gain="projected"),
    FibVqCodec(words=11, k=1),
    OctahedralCodec(),
    OctahedralCodec(direction_bits=5, radius_bits=3, joint=False, gain="corrected"),
]


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_a_codec_with_a_table_is_as_in_torch(codec):
    x = torch.randn(2, 3, 50, HEAD_DIM) * torch.logspace(-3, 3, 50)[:, None]
    x[:, :, 7] = 0.0
    check_codec(codec, x, ties=0.04)
    check_empty(codec, HEAD_DIM)


@pytest.mark.parametrize("bits", [(4, 2, 2, 2), (3, 5, 3, 1), (2, 4, 1, 2), (1, 1, 1, 2)])
def test_angles_are_coded_as_in_torch(bits):
    x = torch.randn(2, 2, 50, 64) * torch.logspace(-3, 3, 50)[:, None]
    x[:, :, 7] = 0.0
    x[:, :, 8, ::2] = 0.0
    x[:, :, 9, 1::2] = 0.0
    check_codec(PolarCodec(bits), x, ties=0.06)
    check_empty(PolarCodec(bits), 64)


@pytest.mark.parametrize(
    "codec",
    [
        klt_codec(((0, 1, 2, 3, 4), (5, 0, 0, 1, 1)), gain=True),
        klt_codec(((2,) * 8, (2,) * 8), tails="normal"),
        klt_codec(((1, 2, 3),), gain=True),
        klt_codec(((0, 1, 2, 3, 2), (4, 0, 0, 1, 1)), memory=2, gain=True),
        klt_codec(((1, 2, 3, 1), (2, 2, 2, 1)), memory=3),
        klt_codec(((1, 0),), memory=2),
    ],
    ids=["all", "two", "one head", "trellis of all", "trellis of 8", "trellis of one"],
)
def test_components_of_unequal_bits_are_as_in_torch(codec):
    heads, width = len(codec.bits), len(codec.bits[0])
    check_codec(codec, torch.randn(2, heads, 40, width) * torch.logspace(-2, 2, 40)[:, None])
    check_empty(codec, width, heads)


@pytest.mark.parametrize("name", FORMATS)
def test_every_byte_of_fp8_and_every_border_is_as_in_torch(name):
    every = torch.arange(256, dtype=torch.uint8).view(FORMATS[name]).float()
    finite = every[every.isfinite()].sort().values
    middle = (finite[1:] + finite[:-1]) / 2
    x = torch.cat([finite, middle, torch.randn(240) * 100, torch.tensor([1e9, -1e9])])
    x = x[: len(x) // 16 * 16].where(x[: len(x) // 16 * 16] != 0, 1.0)  # no negative zeros
    x = x.reshape(1, 1, -1, 16)
    for codec in (Fp8Codec(name, scaled=False), Fp8Codec(name)):
        check_codec(codec, x)
        check_empty(codec, HEAD_DIM)
