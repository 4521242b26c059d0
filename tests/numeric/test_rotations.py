"""Rotations on captured models: exact in float64, whatever the family."""

from __future__ import annotations

import pytest
import torch
from models import VOCAB, tiny_hf
from programs import apply, fired, run

import kvxform.ir.ops as kvx
from kvxform.capture import capture
from kvxform.passes.rotation.fuse_norms import FuseNorms
from kvxform.passes.rotation.rotate_residual import RotateResidual

TOLERANCE = 1e-8
pytestmark = pytest.mark.slow


@pytest.fixture(params=["llama", "qwen3", "gpt2", "gpt_neox"], scope="module")
def captured(request):
    """Return a model in float64, its norms too: Hugging Face computes them in float32."""
    model = tiny_hf(request.param, dtype=torch.float64, tie_word_embeddings=True)
    program = capture(model).program
    for node in program.calls(kvx.RMS_NORM):
        node.kwargs = {**node.kwargs, "compute_dtype": None}
    generator = torch.Generator().manual_seed(1)
    return program, torch.randint(0, VOCAB, (2, 9), generator=generator)


@pytest.mark.parametrize("online_down", [False, True])
def test_the_residual_stream_of_a_family_is_rotated_exactly(captured, online_down):
    program, ids = captured
    fused, _ = apply(FuseNorms(untie=True), program)
    rotated, found = apply(RotateResidual(seed=1, online_down=online_down), fused)
    assert fired(found) == 1
    assert any("untied" in name for name in rotated.weights)
    torch.testing.assert_close(run(rotated, ids), run(program, ids), rtol=0, atol=TOLERANCE)
