"""Every bundled recipe through ONNX: logits and tokens of the eager lowering."""

from __future__ import annotations

import json

import onnx
import pytest
import torch
from models import tiny_hf

import kvxform
from kvxform.codegen.onnx.forms import OnnxOptions
from kvxform.ir.kv_scales import read_kv_scales
from kvxform.recipe import bundled_recipes
from kvxform.runtime.exporting import recipe_options
from kvxform.runtime.onnx_session import OnnxSession

PROMPT, NEW = 300, 24  # longer than any recent region
OTHERS = ("onnx-paged-int8", "kv-direct", "minicache")  # for CUDA alone; refused by every level
TOLERANCE = 5e-2  # of the largest logit; a code that flips in layer 0 turns others in layer 1


@pytest.fixture
def model(recipe):
    layers = 4 if recipe.startswith("kvsharer") else 2  # a quarter of them is at least one
    sizes = {"hidden_size": 128, "head_dim": 64, "num_attention_heads": 4}
    return tiny_hf("llama", **sizes, num_hidden_layers=layers, max_position_embeddings=512)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [name for name in bundled_recipes() if name not in OTHERS])
def test_a_bundled_recipe_is_as_in_eager(recipe, model, tmp_path):
    """Tokens are none of the calibration, whose values lie right at the ends of fitted ranges."""
    generator = torch.Generator().manual_seed(0)
    calibration = torch.randint(3, 50, (8, 128), generator=generator)
    ids = torch.randint(50, 97, (1, PROMPT + NEW), generator=generator)
    opt = kvxform.optimize(model, recipe, calibration=calibration, verify="none", progress=False)
    expected, own = opt(ids), recipe_options(opt).changed(logits="all")
    for options in (own, OnnxOptions("L0"), OnnxOptions(opset=24)):
        folder = opt.export_onnx(tmp_path / "out", options, verify="none")
        check_steps(OnnxSession(folder, threads=1), ids, expected)


def check_steps(session, ids, expected):
    """Assert that a prompt and steps give the logits and tokens of the eager lowering."""
    found = [session.prefill(ids[:, :PROMPT], all_logits=True)]
    found += [session.decode(ids[:, t])[:, None] for t in range(PROMPT, PROMPT + NEW)]
    off = (torch.cat(found, 1) - expected).abs().max()
    assert off <= TOLERANCE * expected.abs().max()
    tokens = [logits[:, -1].argmax(-1) for logits in found]
    assert torch.equal(torch.stack(tokens, 1), expected[:, PROMPT - 1 :].argmax(-1))


def of_a_step(graph):
    """Yield the nodes that run for one new token a row; prompts may have a branch."""
    for node in graph.node:
        branches = [a.g for a in node.attribute if a.name == "then_branch"]
        yield from branches[0].node if branches else [node]


@pytest.mark.parametrize(
    ("recipe", "level", "cache", "provider", "bits"),
    [
        pytest.param("onnx-fp16", "L3", "buffer", "cpu", None, marks=pytest.mark.slow),
        pytest.param("onnx-int8", "L3", "buffer", "cpu", 128, marks=pytest.mark.slow),
        ("onnx-int4", "L3", "buffer", "cpu", 8),
        ("onnx-paged-int8", "L4", "paged", "cuda", 128),
    ],
)
def test_recipes_for_onnx_runtime_choose_their_operators(
    recipe, level, cache, provider, bits, model, tmp_path
):
    ids = torch.randint(3, 97, (2, 64), generator=torch.Generator().manual_seed(0))
    own = model.half() if provider == "cuda" else model
    opt = kvxform.optimize(own, recipe, calibration=ids, verify="none", progress=False)
    folder = opt.export_onnx(tmp_path / "out", verify="none")
    description = json.loads((folder / "kvxform.json").read_text(encoding="utf-8"))
    form = description["onnx"]
    found = form["level"], form["cache"], form["provider"], form["logits"]
    assert found == (level, cache, provider, "last")
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    operator = {"L3": "GroupQueryAttention", "L4": "PagedAttention"}[level]
    assert sum(node.op_type == operator for node in of_a_step(graph)) == 2
    scales = folder / "kv_cache_scales.json"
    assert scales.exists() == (bits is not None)
    if bits is not None:
        data = json.loads(scales.read_text(encoding="utf-8"))
        assert data["qmax"] == bits
        assert read_kv_scales(scales).to_data() == data
