"""Every bundled recipe at level L5, against the eager lowering."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest
import torch
from models import tiny_hf
from onnx_tools import open_export

import kvxform
from kvxform.codegen.onnx.forms import OnnxOptions
from kvxform.recipe import bundled_recipes

PROMPT, NEW = 300, 3  # longer than any recent region
TOLERANCE = 5e-2  # of the largest logit; a code that flips in layer 0 turns others in layer 1
REFUSED = ("kv-direct", "minicache", "onnx-paged-int8")  # by every level, or by all but L4


@pytest.mark.slow
@pytest.mark.parametrize("recipe", sorted(set(bundled_recipes()) - set(REFUSED)))
def test_a_bundled_recipe_as_functions_is_as_in_eager(recipe, tmp_path):
    sizes = {"hidden_size": 128, "head_dim": 64, "num_attention_heads": 4}
    layers = 4 if recipe.startswith("kvsharer") else 2  # a quarter of them is at least one
    model = tiny_hf("llama", **sizes, num_hidden_layers=layers, max_position_embeddings=512)
    generator = torch.Generator().manual_seed(0)
    calibration = torch.randint(3, 50, (8, 128), generator=generator)
    ids = torch.randint(50, 97, (1, PROMPT + NEW), generator=generator)
    opt = kvxform.optimize(model, recipe, calibration=calibration, verify="none", progress=False)
    session = open_export(opt.program, tmp_path / "out", OnnxOptions(level="L5"))
    found = [session.prefill(ids[:, :PROMPT])]
    found += [session.decode(ids[:, t]) for t in range(PROMPT, PROMPT + NEW)]
    expected = opt(ids)[:, PROMPT - 1 :]
    off = (torch.stack(found, 1) - expected).abs().max()
    assert off <= TOLERANCE * expected.abs().max()
    path = tmp_path / "out" / "model.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    graph = ir.load(path).graph
    calls = [node for node in graph if node.domain == "kvx"]
    assert len(calls) == sum(1 for _ in opt.program.sites)
