"""Norm, rotary embedding and rotation as ONNX nodes, against the dialect's reference."""

from __future__ import annotations

import pytest
import torch
from onnx_tools import Call

import kvxform.ir.ops as kvx


def rope_args(rotary_dim):
    inv_freq = 100.0 ** (-torch.arange(0, rotary_dim, 2) / rotary_dim)

    def make(b, s):
        positions = torch.randint(0, 50, (b, s))
        return torch.randn(b, 2, s, 8), positions, inv_freq

    return make


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [8, 4])
@pytest.mark.parametrize("scaling", [1.0, 1.25])
def test_rope(rotary_dim, interleaved, scaling):
    options = {
        "rotary_dim": rotary_dim,
        "interleaved": interleaved,
        "attention_scaling": scaling,
    }
    call = Call(kvx.ROPE, rope_args(rotary_dim), **options)
    assert "RotaryEmbedding" in call.op_types
    for batch, tokens in ((2, 5), (1, 1)):
        call.check(batch, tokens, tolerance=1e-5)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize(
    ("dtype", "compute_dtype", "fused"),
    [
        (torch.float32, None, True),
        (torch.float16, torch.float32, True),
        (torch.float16, None, False),  # statistics in float16, which RMSNormalization cannot
    ],
)
def test_rms_norm(dtype, compute_dtype, fused, offset):
    def make(b, s):
        return torch.randn(b, s, 8).to(dtype), torch.randn(8).to(dtype), 1e-5

    call = Call(kvx.RMS_NORM, make, weight_offset=offset, compute_dtype=compute_dtype)
    assert ("RMSNormalization" in call.op_types) == fused
    call.check(2, 5, tolerance=1e-5 if dtype == torch.float32 else 4e-3)


def test_rms_norm_without_gain():
    call = Call(kvx.RMS_NORM, lambda b, s: (torch.randn(b, s, 8), None, 1e-5))
    call.check(2, 5, tolerance=1e-5)


@pytest.mark.parametrize("block", [8, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_hadamard(block, dtype):
    call = Call(kvx.HADAMARD, lambda b, s: (torch.randn(b, 2, s, 8).to(dtype),), block=block)
    assert call.op_types.count("MatMul") == 1
    call.check(2, 5, tolerance=1e-5 if dtype == torch.float32 else 2e-3)
