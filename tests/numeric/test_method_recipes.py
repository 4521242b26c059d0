"""Recipes of published methods on a small model, through the verifier of the pipeline."""

from __future__ import annotations

import pytest
import torch
from models import tiny_hf

import kvxform

RECIPES = [
    "quarot-kv4",
    "saw-int4",
    "oscar-omni2",
    "turboquant-2",
    "turboquant-3",
    "turboquant-4",
    "polarquant",
    "fibquant-1.5",
    "fibquant-2",
    "fibquant-3",
    "fibquant-4",
    "octopus-2",
    "octopus-3",
    "octopus-4",
]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_compiles_verifies_saves_and_generates(recipe, tmp_path):
    model = kvxform.optimize(tiny_hf("qwen3", head_dim=64), recipe)
    assert model.plan.bits_per_value <= model.recipe.bounds.bits_per_value
    prompt = torch.tensor([[5, 6, 7, 8]])
    expected = model.generate(prompt, max_new_tokens=4)
    model.save(tmp_path / "out")
    again = kvxform.load(tmp_path / "out")
    assert again.plan == model.plan
    assert torch.equal(again.generate(prompt, max_new_tokens=4), expected)
