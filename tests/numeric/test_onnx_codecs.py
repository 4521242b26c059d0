"""Encode and decode as ONNX nodes: planes are equal to the codec's bit by bit."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_tools import make_model, run_model

from kvxform.codecs.integer import IntCodec
from kvxform.codegen.onnx.builder import Builder
from kvxform.codegen.onnx.codec_int import IntEmitter
from kvxform.codegen.onnx.segments import FoldedSegment, can_fold

HEAD_DIM = 16
FORBIDDEN = {"BitShift", "BitwiseAnd", "BitwiseOr", "Mod"}  # no CUDA kernel, or not for these types


def encoder(codec):
    b = Builder()
    x = ir.Value(
        name="x",
        type=ir.TensorType(ir.DataType.FLOAT),
        shape=ir.Shape(["b", "h", "t", HEAD_DIM]),
    )
    planes = IntEmitter(codec, HEAD_DIM).encode(b, x)
    return make_model(b, [x], [planes[p.name] for p in codec.planes(HEAD_DIM)])


def plane_inputs(codec):
    dtypes = {"uint8": ir.DataType.UINT8, "float16": ir.DataType.FLOAT16}
    return {
        p.name: ir.Value(
            name=p.name,
            type=ir.TensorType(dtypes[p.dtype]),
            shape=ir.Shape(["b", "h", f"rows_{p.name}", p.width]),
        )
        for p in codec.planes(HEAD_DIM)
    }


def decoder(codec):
    b, planes = Builder(), plane_inputs(codec)
    values = IntEmitter(codec, HEAD_DIM).decode(b, planes, ir.DataType.FLOAT)
    return make_model(b, list(planes.values()), [b.op("Identity", values)])


CODECS = st.builds(
    IntCodec,
    bits=st.sampled_from([2, 3, 4, 8]),
    axis=st.sampled_from(["token", "channel"]),
    group=st.sampled_from([None, 8, 4]),
    symmetric=st.booleans(),
    zero=st.sampled_from(["int", "float"]),
    clip=st.sampled_from([1.0, 0.9]),
    include_zero=st.booleans(),
)


def groups_of(codec, count):
    return codec.tokens_per_group * count


def values(codec, count, scale, shift):
    x = torch.randn(2, 3, groups_of(codec, count), HEAD_DIM) * scale + shift
    if count > 1:
        x[:, :, : codec.tokens_per_group] = 0.5  # a constant group
    return x


@settings(max_examples=40, deadline=None)
@given(
    codec=CODECS,
    count=st.integers(0, 4),
    scale=st.sampled_from([1.0, 1e-3, 300.0]),
    shift=st.sampled_from([0.0, 20.0]),
)
def test_encode_and_decode_equal_the_codec(codec, count, scale, shift):
    x = values(codec, count, scale, shift)
    model = encoder(codec)
    assert not FORBIDDEN & {node.op_type for node in model.graph}
    names = [p.name for p in codec.planes(HEAD_DIM)]
    found = dict(zip(names, run_model(model, [x.numpy()]), strict=True))
    if count == 0:
        assert all(plane.shape[2] == 0 for plane in found.values())
        return
    expected = codec.encode(x)
    for name, plane in expected.items():
        assert torch.equal(found[name], plane), name
    arrays = [plane.numpy() for plane in expected.values()]
    (decoded,) = run_model(decoder(codec), arrays)
    torch.testing.assert_close(decoded, codec.decode(expected, torch.float32), rtol=0, atol=0)


FOLDABLE = [
    IntCodec(4),
    IntCodec(8, symmetric=True),
    IntCodec(4, group=8),
    IntCodec(2, group=8, zero="float"),
    IntCodec(2, symmetric=True),
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
        b, inputs = Builder(), plane_inputs(codec)
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
        (found,) = run_model(decoder(codec), [p.numpy() for p in planes.values()])
        assert torch.equal(found, codec.decode(planes, torch.float32))
