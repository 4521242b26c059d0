"""Codecs with side information in ONNX: outliers, low-rank residual, levels in ranges."""

from __future__ import annotations

import onnx_ir as ir
import pytest
import torch
from onnx_codecs import check_codec, check_empty, decoded, encoded
from onnx_tools import make_model, run_model

from kvxform.codecs.base import CodecSamples
from kvxform.codecs.integer import IntCodec
from kvxform.codecs.low_rank import LowRankResidualCodec
from kvxform.codecs.nuq import NuqCodec
from kvxform.codecs.outliers import OutliersCodec
from kvxform.codecs.saliency import SaliencyCodec
from kvxform.codegen.onnx.builder import Builder
from kvxform.codegen.onnx.codec_saliency import SaliencyEmitter

HEADS, HEAD_DIM = 3, 16


def values(tokens=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, HEADS, tokens, HEAD_DIM, generator=generator)
    x[:, :, :, 3] *= 8
    x[:, :, 5] = 0.25  # equal elements
    return x


def fitted(codec):
    return codec.fit(CodecSamples(values(64, seed=1)[0]))


CODECS = {
    "outliers of tokens": OutliersCodec(share=0.2),
    "outliers of channels": OutliersCodec(IntCodec(2, axis="channel", group=8), 0.3, "channel"),
    "outliers far from the median": OutliersCodec(IntCodec(4, group=8), 0.1, pick="deviation"),
    "outliers beyond ranges": fitted(OutliersCodec(NuqCodec(3), 0.05, pick="deviation")),
    "nuq": fitted(NuqCodec(4)),
    "nuq, q_norm": fitted(NuqCodec(2, q_norm=True)),
    "nuq of tokens": fitted(NuqCodec(3, axis="token")),
    "nuq across heads": NuqCodec(4, axis="token", across_heads=True, levels="normal"),
    "nuq of runs": NuqCodec(4, group=8, levels="normal"),
    "saliency": SaliencyCodec(IntCodec(4), IntCodec(2), chunk=16, score="spread"),
    "saliency, separable": SaliencyCodec(
        IntCodec(4, axis="channel", group=4),
        NuqCodec(2, axis="token", levels="normal"),
        share=0.25,
        chunk=16,
        score="spread",
        separable=True,
    ),
    "nuq, 8 bits": NuqCodec(8, axis="token", levels="normal"),
}


@pytest.mark.parametrize("name", CODECS)
def test_planes_are_those_of_the_codec(name):
    check_codec(CODECS[name], values())
    check_empty(CODECS[name], HEAD_DIM, HEADS)


LOW_RANK = [
    LowRankResidualCodec(rank=1, block=16),
    LowRankResidualCodec(IntCodec(2, axis="channel", group=8), rank=3, block=16, loops=2),
    LowRankResidualCodec(OutliersCodec(IntCodec(2)), rank=4, block=32),
]


@pytest.mark.parametrize("codec", LOW_RANK, ids=str)
def test_low_rank_factors_have_the_product_of_the_codec(codec):
    """Planes but the factors are equal; columns of these may have another sign."""
    x = values(64)
    x[:, :, :32] = 0.5  # no error: factors of zero
    check_empty(codec, HEAD_DIM, HEADS)
    found, expected = encoded(codec, x), codec.encode(x)
    for spec in codec.inner.planes(HEAD_DIM):
        assert torch.equal(found[spec.name], expected[spec.name]), spec.name
    have, want = (codec.decode(planes, torch.float32) for planes in (found, expected))
    uncorrected = codec.inner.decode(expected, torch.float32)
    scale = float((want - uncorrected).abs().max())
    assert scale > 0.01
    torch.testing.assert_close(have, want, rtol=0, atol=2e-3 * scale)
    values_of = decoded(codec, expected, HEAD_DIM)
    torch.testing.assert_close(values_of, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("score", ["mean", "sum"])
def test_tokens_with_scores_are_ranked_as_by_the_codec(score):
    codec, x = SaliencyCodec(chunk=8, score=score, last=0.5, random=0.25), values()
    scores = torch.rand(2, HEADS, 32)
    scores[:, :, ::4] = 0.5  # equal ones
    b = Builder()
    inputs = [
        ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
        for name, shape in (("x", ["b", HEADS, "t", HEAD_DIM]), ("scores", ["b", HEADS, "t"]))
    ]
    planes = SaliencyEmitter(codec, HEAD_DIM).encode_ranked(b, *inputs)
    names = [spec.name for spec in codec.planes(HEAD_DIM)]
    model = make_model(b, inputs, [planes[name] for name in names])
    found = dict(zip(names, run_model(model, [x.numpy(), scores.numpy()]), strict=True))
    for name, plane in codec.encode_ranked(x, scores).items():
        assert torch.equal(found[name], plane), name
