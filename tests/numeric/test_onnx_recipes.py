"""Every bundled recipe through ONNX: logits and greedy tokens of the eager lowering."""

from __future__ import annotations

import pytest
import torch
from models import tiny_hf

import kvxform
from kvxform.recipe import bundled_recipes
from kvxform.runtime.onnx_session import OnnxSession

PROMPT, NEW = 300, 24  # longer than any recent region
TOLERANCE = 5e-2  # of the largest logit; a code that flips in layer 0 turns others in layer 1


@pytest.fixture
def model():
    sizes = {"hidden_size": 128, "head_dim": 64, "num_attention_heads": 4}
    return tiny_hf("llama", **sizes, max_position_embeddings=512)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", sorted(bundled_recipes()))
def test_a_bundled_recipe_is_as_in_eager(recipe, model, tmp_path):
    """Prompts have no token of the calibration, whose values lie right at ends of ranges."""
    generator = torch.Generator().manual_seed(0)
    calibration = torch.randint(3, 50, (8, 128), generator=generator)
    prompt = torch.randint(50, 97, (1, PROMPT), generator=generator)
    opt = kvxform.optimize(model, recipe, calibration=calibration, verify="none", progress=False)
    opt.export_onnx(tmp_path / "out")
    session = OnnxSession(tmp_path / "out", threads=1)
    expected = opt(prompt)
    off = (session.prefill(prompt, all_logits=True) - expected).abs().max()
    assert off <= TOLERANCE * expected.abs().max()
    options = {"max_new_tokens": NEW, "eos_token_id": -1}
    assert torch.equal(session.generate(prompt, **options), opt.generate(prompt, **options))
