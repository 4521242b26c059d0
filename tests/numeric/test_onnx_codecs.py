"""Encode and decode as ONNX nodes: planes are equal to the codec's bit by bit."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_codecs import check_codec, check_empty, decoded, encoded, plane_inputs
from onnx_tools import make_model, run_model

from kvxform.codecs.integer import IntCodec
from kvxform.codecs.static_int import StaticIntCodec
from kvxform.codegen.onnx.builder import Builder
from kvxform.codegen.onnx.segments import FoldedSegment, can_fold

HEAD_DIM = 16


CODECS = st.builds(
    IntCodec,
    bits=st.sampled_from([2, 3, 4, 8]),
    axis=st.sampled_from(["token", "channel"]),
    group=st.sampled_from([None, 8, 4]),
    symmetric=st.booleans(),
    zero=st.sampled_from(["int", "float"]),
    clip=st.sampled_from([1.0, 0.9, "search"]),
    include_zero=st.booleans(),
)
ACROSS_HEADS = [
    IntCodec(4, across_heads=True),
    IntCodec(2, across_heads=True, clip="search"),
    IntCodec(2, across_heads=True, clip="search", symmetric=True),
]


def groups_of(codec, count):
    return codec.tokens_per_group * count


def values(codec, count, scale, shift):
    x = torch.randn(2, 3, groups_of(codec, count), HEAD_DIM) * scale + shift
    if count > 1:
        x[:, :, : codec.tokens_per_group] = 0.5  # a constant group
    return x


@settings(max_examples=30, deadline=None)
@given(
    codec=CODECS,
    count=st.integers(0, 4),
    scale=st.sampled_from([1.0, 1e-3, 300.0]),
    shift=st.sampled_from([0.0, 20.0]),
)
def test_encode_and_decode_equal_the_codec(codec, count, scale, shift):
    x = values(codec, count, scale, shift)
    if count == 0:
        check_empty(codec, HEAD_DIM)
        return
    found, expected = encoded(codec, x), codec.encode(x)
    for name, plane in expected.items():
        assert torch.equal(found[name], plane), name
    values_of = decoded(codec, expected, HEAD_DIM)
    torch.testing.assert_close(values_of, codec.decode(expected, torch.float32), rtol=0, atol=0)


@pytest.mark.parametrize("codec", ACROSS_HEADS, ids=str)
def test_groups_across_heads_equal_the_codec(codec):
    check_codec(codec, torch.randn(2, 3, 9, HEAD_DIM))
    check_empty(codec, HEAD_DIM)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("axis", ["tensor", "channel"])
def test_static_scales_equal_the_codec(bits, axis):
    count = 1 if axis == "tensor" else 3 * HEAD_DIM
    scale, offset = (
        tuple(torch.linspace(a, 0.5, n).tolist()) for a, n in ((0.01, count), (-1, 48))
    )
    check_codec(
        StaticIntCodec(bits, axis, center=True, scale=scale, offset=offset),
        torch.randn(1, 3, 9, 16),
    )
    codec = StaticIntCodec(bits, axis, scale=scale)
    x = torch.randn(2, 3, 9, HEAD_DIM) * 2
    x[:, :, 0] = torch.arange(HEAD_DIM) / 2 * codec.scale[0]  # ties, and beyond the last code
    check_codec(codec, x)
    check_empty(codec, HEAD_DIM, 3)


FOLDABLE = [
    IntCodec(4),
    IntCodec(8, symmetric=True),
    IntCodec(4, group=8),
    IntCodec(2, group=8, zero="float"),
    IntCodec(2, symmetric=True),
    IntCodec(4, across_heads=True),
]


@pytest.mark.parametrize("codec", FOLDABLE, ids=str)
def test_the_folded_form_equals_products_with_decoded_values(codec):
    assert can_fold(codec, HEAD_DIM)
    planes = codec.encode(torch.randn(2, 3, 7, HEAD_DIM))
    decoded = codec.decode(planes, torch.float64)
    q, p = torch.randn(2, 3, 5, HEAD_DIM), torch.rand(2, 3, 5, 7)
    for method, operand, expected in (
        ("scores", q, q.double() @ decoded.mT),
        ("mix", p, p.double() @ decoded),
    ):
        b, inputs = Builder(), plane_inputs(codec, HEAD_DIM)
        x = ir.Value(
            name="operand",
            type=ir.TensorType(ir.DataType.FLOAT),
            shape=ir.Shape(["b", "h", "r", operand.shape[3]]),
        )
        y = getattr(FoldedSegment(codec, HEAD_DIM, inputs), method)(b, x)
        model = make_model(b, [*inputs.values(), x], [y])
        (found,) = run_model(model, [*(p.numpy() for p in planes.values()), operand.numpy()])
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "codec", [IntCodec(3), IntCodec(4, axis="channel"), IntCodec(4, group=4)], ids=str
)
def test_codes_that_share_a_byte_with_another_group_are_not_folded(codec):
    assert not can_fold(codec, HEAD_DIM)


def test_every_byte_unpacks_to_its_codes():
    every = np.arange(256, dtype=np.uint8).reshape(1, 1, 32, 8)
    for bits in (2, 4):
        codec = IntCodec(bits, symmetric=True)
        width = HEAD_DIM * bits // 8
        codes = torch.from_numpy(every.reshape(1, 1, -1, width))
        planes = {"codes": codes, "scale": torch.ones(1, 1, codes.shape[2], 1).half()}
        found = decoded(codec, planes, HEAD_DIM)
        assert torch.equal(found, codec.decode(planes, torch.float32))
