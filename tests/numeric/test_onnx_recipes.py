"""Every bundled recipe through ONNX: logits and tokens of the eager lowering."""

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
def model(recipe):
    layers = 4 if recipe.startswith("kvsharer") else 2  # a quarter of them is at least one
    sizes = {"hidden_size": 128, "head_dim": 64, "num_attention_heads": 4}
    return tiny_hf("llama", **sizes, num_hidden_layers=layers, max_position_embeddings=512)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", sorted(bundled_recipes()))
def test_a_bundled_recipe_is_as_in_eager(recipe, model, tmp_path):
    """Tokens are none of the calibration, whose values lie right at the ends of fitted ranges."""
    generator = torch.Generator().manual_seed(0)
    calibration = torch.randint(3, 50, (8, 128), generator=generator)
    ids = torch.randint(50, 97, (1, PROMPT + NEW), generator=generator)
    opt = kvxform.optimize(model, recipe, calibration=calibration, verify="none", progress=False)
    opt.export_onnx(tmp_path / "out")
    session = OnnxSession(tmp_path / "out", threads=1)
    expected = opt(ids)
    found = [session.prefill(ids[:, :PROMPT], all_logits=True)]
    found += [session.decode(ids[:, t])[:, None] for t in range(PROMPT, PROMPT + NEW)]
    off = (torch.cat(found, 1) - expected).abs().max()
    assert off <= TOLERANCE * expected.abs().max()
    tokens = [logits[:, -1].argmax(-1) for logits in found]
    assert torch.equal(torch.stack(tokens, 1), expected[:, PROMPT - 1 :].argmax(-1))
