"""Codec token-norm in ONNX."""

from __future__ import annotations

import pytest
import torch
from onnx_codecs import check_codec, check_empty, encoder, op_types

from kvxform.codecs.integer import IntCodec
from kvxform.codecs.token_norm import TokenNormCodec

CASES = [
    TokenNormCodec(),
    TokenNormCodec(IntCodec(4), over="head"),
    TokenNormCodec(IntCodec(2, axis="channel", group=8), norm="max"),
    TokenNormCodec(IntCodec(3, zero="float"), over="head", norm="mean"),
]


@pytest.mark.parametrize("codec", CASES, ids=str)
def test_norms_and_inner_planes_are_those_of_the_codec(codec):
    x = torch.randn(2, 3, 64, 16) * torch.logspace(-2, 2, 64)[:, None]
    x[:, :, 5] = 0.0
    check_codec(codec, x, ties=0.04)
    check_empty(codec, 16)


@pytest.mark.parametrize(
    ("kind", "op_type"), [("l2", "ReduceL2"), ("max", "ReduceMax"), ("mean", "ReduceMean")]
)
def test_every_kind_of_norm_has_its_reduction(kind, op_type):
    codec = TokenNormCodec(IntCodec(8, symmetric=True), norm=kind)
    assert op_type in op_types(encoder(codec, 16))
